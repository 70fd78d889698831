"""The command, in this process: absl's flags are global and are put back."""

import sys

import jax
import pytest
from absl import flags, logging
from absl.testing import flagsaver


@pytest.fixture
def devices():
    """How many of the fake devices a `command` uses; a test may ask for another number by parametrization."""
    return 1


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, devices):
    """Function of arguments -> (exit code, stdout, lines of stderr), run in the repository's root."""
    from convnorm_jax import mesh
    from convnorm_jax.cli import run as main_command

    create_mesh = mesh.create_mesh
    monkeypatch.setattr(mesh, 'create_mesh', lambda given=None: create_mesh(given or jax.devices()[:devices]))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'no_tfds'))
    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'cache'))
    verbosity = logging.get_verbosity()

    def run(*arguments, main=None):
        before = flagsaver.save_flag_values()
        flags.FLAGS.unparse_flags()
        capsys.readouterr()
        # ml_collections looks for overrides there, not in what absl is given.
        monkeypatch.setattr(sys, 'argv', ['main', *arguments])
        try:
            code = (main or main_command.main)()
        finally:
            flagsaver.restore_flag_values(before)
            logging.set_verbosity(verbosity)
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def run_main(monkeypatch, capsys, quick_environment):
    """Function of (main, arguments) -> (exit code, stdout, lines of stderr); what it starts compiles quickly."""
    for name in ('JAX_DISABLE_MOST_OPTIMIZATIONS', 'XLA_FLAGS'):
        monkeypatch.setenv(name, quick_environment.get(name, ''))

    def run(main, *arguments):
        monkeypatch.setattr(sys, 'argv', ['main', *map(str, arguments)])
        capsys.readouterr()
        code = main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run
