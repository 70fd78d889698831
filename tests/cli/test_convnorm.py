"""The console script `convnorm`: its commands, what it says of a wrong one, configs by name in an empty folder."""

import builtins
import json
import sys

import pytest

from convnorm_jax.cli import convnorm
from convnorm_jax.version import __version__

pytestmark = pytest.mark.usefixtures('quick_compilation')


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['convnorm', *arguments])
    return convnorm.main()


@pytest.mark.parametrize('arguments', [(), ('--help',), ('help',), ('-h',)])
def test_help_names_every_command(arguments, monkeypatch, capsys):
    assert run(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert all(f'\n{name} ' in text for name in convnorm.COMMANDS)


@pytest.mark.parametrize('name', convnorm.COMMANDS)
def test_every_command_has_a_help_of_its_own(name, monkeypatch, capsys):
    assert run(monkeypatch, name, '--help') == 0
    assert f'convnorm {name}' in capsys.readouterr().out


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, '--version') == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    assert run(monkeypatch, 'fly') == 2
    assert capsys.readouterr().err == (
        f"error: 'fly': no such command; expected one of {', '.join(convnorm.COMMANDS)}\n"
    )


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    original = builtins.__import__

    def without_absl(name, *rest, **more):
        if name.split('.')[0] == 'absl':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, '__import__', without_absl)
    for name in [name for name in sys.modules if name.startswith('convnorm_jax.cli.')]:
        if name != 'convnorm_jax.cli.convnorm':
            monkeypatch.delitem(sys.modules, name)
    assert run(monkeypatch, 'train', '--config=digits_convnorm') == 2
    assert capsys.readouterr().err == (
        "error: absl is not installed, and the commands need it: pip install 'convnorm_jax[experiments]'\n"
    )


@pytest.mark.slow
def test_a_config_by_its_name_in_an_empty_folder(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = ['--config.train.steps=2', '--config.attack.names=()', '--noconfig.plots', '--config.model.width=4']
    code, _, err = command('--config=digits_convnorm', *small)
    assert code == 0, err
    (folder,) = (tmp_path / 'runs').iterdir()
    assert folder.name == 'digits_convnorm-simple_cnn-convnorm-seed0'
    assert 0 <= json.loads((folder / 'result.json').read_text())['test_accuracy'] <= 1
    code, _, err = command('--config=configs/digits_convnorm.py', *small)  # the same run
    assert code == 0, err
    assert [path.name for path in (tmp_path / 'runs').iterdir()] == [folder.name]


def test_a_file_of_ones_own_comes_first(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'digits_convnorm.py').write_text('raise RuntimeError("mine")')
    code, _, err = command('--config=configs/digits_convnorm.py')
    assert (code, err) == (2, ['error: --config=configs/digits_convnorm.py: RuntimeError: mine'])


def test_a_file_that_is_not_python(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'notes.txt').write_text('config = None')
    code, _, (err,) = command('--config=notes.txt')
    assert code == 2 and err.startswith('error: --config=notes.txt: is not a Python file, NAME.py; give one of cifar')
