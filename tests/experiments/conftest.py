"""The command, in this process: absl's flags are global and are put back."""

import sys

import pytest
from absl import flags, logging
from absl.testing import flagsaver


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Function of arguments -> (exit code, stdout, lines of stderr), run in the repository's root."""
    from experiments import main

    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'no_tfds'))
    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'cache'))
    verbosity = logging.get_verbosity()

    def run(*arguments):
        before = flagsaver.save_flag_values()
        flags.FLAGS.unparse_flags()
        capsys.readouterr()
        # ml_collections looks for overrides there, not in what absl is given.
        monkeypatch.setattr(sys, 'argv', ['main', *arguments])
        try:
            code = main.main()
        finally:
            flagsaver.restore_flag_values(before)
            logging.set_verbosity(verbosity)
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run
