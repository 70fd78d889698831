"""What a user can get wrong: one line that names it, exit code 2, nothing written."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = f'--config={ROOT}/configs/digits_convnorm.py'
CIFAR = f'--config={ROOT}/configs/cifar10_convnorm.py'


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No mistake may get as far as training."""
    from convnorm_jax.training import loop

    def train(*_):
        raise AssertionError('got as far as training')

    monkeypatch.setattr(loop, 'train', train)


@pytest.fixture
def fails(command, monkeypatch, tmp_path):
    """Function of arguments and words that the one line must hold, in this order."""
    workdir = tmp_path / 'run'

    def check(arguments, *words, workdir_given=True):
        before = set(os.listdir(ROOT))
        code, out, err = command(*arguments, *([f'--workdir={workdir}'] if workdir_given else []))
        assert code == 2 and out == ''
        assert len(err) == 1 and err[0].startswith('error: '), err
        place = 0
        for word in words:
            place = err[0].find(word, place)
            assert place >= 0, f'{word!r} not (in this order) in {err[0]!r}'
        assert not workdir.exists() and set(os.listdir(ROOT)) == before

    return check


@pytest.mark.parametrize(
    ('override', 'words'),
    [
        # A misspelt key, with a suggestion.
        ('config.train.epoch=3', ['config.train.epoch:', 'did you mean config.train.epochs?', 'epochs']),
        ('config.trian.epochs=3', ['config.trian.epochs:', 'did you mean config.train.epochs?']),
        ('config.pgd_steps=3', ['config.pgd_steps:', 'did you mean config.attack.pgd_steps?']),
        ('config.seed.x=3', ['config.seed.x:', 'config.seed is a value']),
        ('config.optimizer=sgd', ['config.optimizer is a section', 'learning_rate']),
        ('noconfig.plot', ['config.plot:', 'did you mean config.plots?']),
        # A wrong type.
        ('config.train.epochs=many', ['config.train.epochs=many', 'type']),
        ('config.seed=1.5', ['config.seed=1.5', 'type']),
        ('config.model.width=wide', ['config.model.width=wide', 'type']),
        ('config.plots=perhaps', ['config.plots=perhaps', 'type']),
        # An unknown choice, a value out of range.
        ('config.model.layer=convnrom', ["config.model.layer='convnrom'", 'convnorm', 'batchnorm']),
        ('config.model.name=resnet20', ["config.model.name='resnet20'", 'resnet18']),
        ('config.data.name=mnist', ["config.data.name='mnist'", 'digits']),
        ('config.attack.names=fgsm,cw', ['config.attack.names', 'cw', 'pgd']),
        ('config.train.epochs=-1', ['config.train.epochs=-1', 'at least 0']),
        ('config.train.epochs=nan', ['config.train.epochs=nan', 'at least 0']),
        ('config.optimizer.learning_rate=0', ['config.optimizer.learning_rate=0', 'above 0']),
        ('config.schedule.milestones=(40,80)', ['config.schedule.milestones=(40, 80)', 'shares']),
        # Depth nonsense.
        ('config.model.depth=(1,0)', ['model.depth=(1, 0)', '1 to 3 whole numbers']),
        ('config.model.depth=abc', ['model.depth=', 'abc', '1 to 3 whole numbers']),
        ('config.model.depth=(1,1,1,1)', ['model.depth=(1, 1, 1, 1)', '1 to 3 whole numbers']),
        ('config.model.stem=cifar', ["model.stem='cifar'", 'simple_cnn']),
        # Flags.
        ('epochs=3', ['epochs']),
        ('mode=test', ['mode=test', 'train', 'eval']),
    ],
)
def test_a_wrong_option(fails, override, words):
    fails([DIGITS, f'--{override}'], *words)


def test_a_word_that_is_no_option(fails):
    fails([DIGITS, 'config.train.epochs=3'], "'config.train.epochs=3': not understood", '--config.')


def test_no_config(fails):
    fails([], '--config is missing', 'give one of')
    fails(['--config'], '--config', workdir_given=False)


def test_no_such_config(fails):
    fails(['--config=configs/cifar11.py'], '--config=configs/cifar11.py: no such file', 'give one of')
    fails(['--config', 'configs/cifar11.py'], '--config=configs/cifar11.py: no such file')


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('def get_config():\n    raise RuntimeError("no\\nluck")\n', ['RuntimeError: no luck']),
        ('def get_config(:\n', ['SyntaxError']),
        ('x = 1\n', ['AttributeError', 'get_config']),
        ('def get_config():\n    return {"seed": 1}\n', ['returns a dict', 'ConfigDict']),
        (
            'from configs import default\n\ndef get_config():\n    c = default.get_config()\n'
            '    c.train.epochs = "ten"\n    return c\n',
            ['TypeError'],
        ),
        # A misspelt key within the file is no better than one on the command line.
        (
            'from configs import default\n\ndef get_config():\n    c = default.get_config()\n'
            '    c.train.epoch = 3.0\n    return c\n',
            ['train.epoch'],
        ),
        # A config that does not start from the base.
        (
            'from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({"seed": 1})\n',
            ['config'],
        ),
    ],
    ids=['raises', 'syntax', 'without', 'dict', 'type', 'misspelt', 'not the base'],
)
def test_a_config_file_of_ones_own(fails, tmp_path, text, words):
    path = tmp_path / 'own.py'
    path.write_text(text)
    fails([f'--config={path}'], *words)


def test_missing_data_names_three_ways(fails, tmp_path):
    fails(
        [CIFAR], 'no_tfds', '(1)', '--config.data.data_dir', 'tfds build cifar10', '(2)', 'cifar-10-', '(3)', 'digits'
    )
    fails([CIFAR, f'--config.data.data_dir={tmp_path}'], str(tmp_path), '(1)', '(2)', '(3)')


def test_a_batch_larger_than_the_data(fails):
    fails([DIGITS, '--config.data.batch_size=4096'], 'batch_size=4096', '1292')


@pytest.mark.parametrize('mode', [['--mode=eval'], ['--mode', 'eval']])
def test_evaluation_needs_a_run(fails, mode):
    fails(mode, '--workdir is missing', workdir_given=False)
    fails(mode, '--workdir=', 'no run there', 'train one first')
    fails([DIGITS, *mode], '--workdir=', 'no run there')
    fails([*mode, '--config.attack.pgd_step=3'], 'did you mean config.attack.pgd_steps?')


def test_overrides_reach_the_config(monkeypatch):
    from absl import flags
    from absl.testing import flagsaver

    from experiments import command_line, main  # main defines --workdir and --mode

    assert main.run
    arguments = ['--config', f'{ROOT}/configs/digits_convnorm.py', '--config.model.depth=(1,2)', '--noconfig.plots']
    arguments += ['--config.attack.names=pgd,fgsm', '--config.train.epochs=3', '--config.seed', '7']
    before = flagsaver.save_flag_values()
    flags.FLAGS.unparse_flags()
    monkeypatch.setattr(sys, 'argv', ['main', *arguments])
    try:
        config, workdir, mode = command_line.parse(sys.argv)
    finally:
        flagsaver.restore_flag_values(before)
    assert config.model.depth == (1, 2) and config.attack.names == ('pgd', 'fgsm')
    assert config.train.epochs == 3.0 and config.plots is False and config.seed == 7
    assert mode == 'train' and workdir == os.path.join('runs', 'digits_convnorm-simple_cnn-convnorm-seed7')
    assert config.is_locked
