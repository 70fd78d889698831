"""What a user can get wrong: one line that names it, exit code 2, nothing written."""

import errno
import os
import pathlib
import sys

import cv2
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from convnorm_jax.cli import command_line
from convnorm_jax.configs import default
from convnorm_jax.configs.keys import flatten
from convnorm_jax.errors import UserError
from convnorm_jax.runs import workdir as workdir_lib
from convnorm_jax.training import setup

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
        ('config.train.epochs=many', ['config.train.epochs=many', 'type float']),
        ('config.seed=1.5', ['config.seed=1.5', 'type int']),
        ('config.model.width=wide', ['config.model.width=wide', 'type int, or None']),
        ('config.model.width=none', ['config.model.width=none', 'type int, or None']),
        ('config.plots=perhaps', ['config.plots=perhaps', 'type bool']),
        # None where it is not the default.
        ('config.seed=None', ['config.seed=None: expected a value of type int, as in configs/default.py']),
        ('config.train.epochs=None', ['config.train.epochs=None: expected a value of type float']),
        ('config.plots=None', ['config.plots=None: expected a value of type bool']),
        (
            'config.data.data_dir=None',
            ['config.data.data_dir=None: expected', 'for nothing give --config.data.data_dir='],
        ),
        (
            'config.attack.names=None',
            ['config.attack.names=None: expected', "for nothing give '--config.attack.names=()'"],
        ),
        # Of the evaluation, found before anything is read.
        ('config.attack.epsilon=0', ['config.attack.epsilon=0.0: expected above 0 for config.attack.names=fgsm,pgd']),
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


SUITE = '--config.eval.suite=standard'


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['attack.epsilon=0', 'attack.names=()'], ['config.attack.epsilon=0.0: expected above 0', 'autoattack']),
        (['attack.epsilon=0', 'attack.names=()', 'eval.parts=curve'], ['config.attack.epsilon=0.0', "'curve'"]),
        (['eval.curve=()'], ['config.eval.curve=(): expected at least one factor']),
        (['eval.curve=(1,40)'], ['config.eval.curve=(1, 40): 40 times config.attack.epsilon=8 is 320', 'at most 255']),
        (['eval.curve=(1.0,1e999)'], ['config.eval.curve=(1.0, inf)', 'at most 255']),
        (['eval.autoattack.attacks=()'], ['config.eval.autoattack.attacks=(): expected at least one', 'apgd-ce']),
    ],
)
def test_a_suite_that_would_fail_after_hours(fails, options, words):
    fails([DIGITS, SUITE, *(f'--config.{option}' for option in options)], *words)


@pytest.mark.parametrize('key', ['gan.score_examples', 'eval.samples'])
@pytest.mark.parametrize('number', [2, 9])
def test_images_too_few_for_a_score(fails, key, number):
    gan = f'--config={ROOT}/configs/digits_gan.py'
    fails([gan, f'--config.{key}={number}'], f'config.{key}={number}: expected ', 'at least 10')


def test_what_scores_a_GAN_is_there_before_its_training(fails, tmp_path):
    gan = [f'--config={ROOT}/configs/digits_gan.py', '--config.gan.score_examples=0']
    fails([*gan, '--config.gan.classifier=nowhere'], '--workdir=nowhere: no run there')
    inception = ['--config.eval.features=inception', f'--config.eval.inception={tmp_path}/none.pth']
    fails([*gan, *inception], 'none.pth', 'cannot be read')


@pytest.mark.parametrize(
    ('loss', 'suite', 'words'),
    [
        ('dlr', [], 'config.attack.loss=dlr needs at least 3 classes, config.data.name=folder has 2 here'),
        ('margin', ['autoattack.attacks=apgd-ce,apgd-dlr'], "'apgd-dlr' of config.eval.autoattack.attacks needs at"),
        ('dlr', ['parts=curve'], 'config.attack.loss=dlr needs at least 3 classes'),
        ('margin', ['parts=corruptions'], "'corruptions' of config.eval.parts needs images of at least 8 x 8 pixels"),
    ],
)
def test_data_that_the_evaluation_cannot_be_made_on(fails, folder_of_two, loss, suite, words):
    options = [f'--config.eval.{option}' for option in suite] + [SUITE] * bool(suite)
    options += ['--config.attack.names=()'] * bool(suite)
    options += ['--config.data.image_size=7'] * ('parts=corruptions' in suite)
    fails([DIGITS, *folder_of_two, f'--config.attack.loss={loss}', *options], words)


@pytest.fixture
def folder_of_two(tmp_path):
    """Options for class folders of two classes."""
    for part in ('train', 'val'):
        for name in 'ab':
            (tmp_path / 'data' / part / name).mkdir(parents=True)
            for i in range(4):
                cv2.imwrite(f'{tmp_path}/data/{part}/{name}/{i}.png', np.full((16, 16, 3), 20 * i, np.uint8))
    sizes = {'image_size': 16, 'batch_size': 4, 'validation_fraction': 0, 'workers': 0, 'data_dir': f'{tmp_path}/data'}
    return ['--config.data.name=folder', *(f'--config.data.{key}={value}' for key, value in sizes.items())]


def test_two_configs(fails):
    other = f'--config={ROOT}/configs/digits_trades.py'
    fails([DIGITS, other], '--config is given 2 times', 'digits_convnorm.py', 'digits_trades.py')
    fails([DIGITS, *other.split('=')], '--config is given 2 times')
    fails([DIGITS, '--config.seed=1', DIGITS], '--config is given 2 times')


@pytest.mark.parametrize('error', [ValueError('of JAX'), KeyError('x'), OSError(5, 'x'), TypeError('b')])
def test_a_fault_of_the_program_keeps_its_traceback(command, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(setup, 'build', fail)
    code, out, err = command(DIGITS, f'--workdir={tmp_path}/run')
    assert code == 1 and out == '' and not any(line.startswith('error: ') for line in err)
    assert err[0].startswith('Traceback') and any('in fail' in line for line in err)
    assert type(error).__name__ in err[-2] and err[-1] == command_line.FAULT and 'please report it' in err[-1]


@pytest.mark.parametrize(
    ('error', 'words'),
    [
        (UserError('config.x=1: expected\n2'), 'error: config.x=1: expected 2'),
        (PermissionError(errno.EACCES, 'Permission denied', '/data/x.jpg'), '/data/x.jpg: cannot be read (Permission'),
        (
            OSError(errno.ENOSPC, 'No space left on device'),
            'shared memory (/dev/shm) is too small for the batches of the data workers',
        ),
        (
            RuntimeError('Worker process was terminated unexpectedly with exit code -7. Search'),
            'is too small for the batches',
        ),
        (JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), 'give a smaller config.data.batch_size'),
    ],
)
def test_what_a_user_can_do_something_about(command, tmp_path, monkeypatch, error, words):
    def fail(*_):
        raise error

    monkeypatch.setattr(setup, 'build', fail)
    monkeypatch.delenv('CONVNORM_TRACEBACK', raising=False)
    code, out, err = command(DIGITS, f'--workdir={tmp_path}/run')
    assert code == 2 and out == '' and len(err) == 1 and words in err[0] and '--workdir' not in err[0]
    monkeypatch.setenv('CONVNORM_TRACEBACK', '1')
    code, out, err = command(DIGITS, f'--workdir={tmp_path}/run')
    assert code == 2 and err[0].startswith('Traceback') and words in err[-1] and command_line.FAULT not in err


def test_the_help_names_the_traceback(command):
    from convnorm_jax.cli import spectra, sweep

    for main in (None, sweep.main, spectra.main):
        code, out, _ = command('--help', main=main)
        assert code == 0 and 'CONVNORM_TRACEBACK=1' in out and 'please report its traceback' in out


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


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['model.width=None'], {'model.width': None}),
        (['model.width=4', 'model.width=None'], {'model.width': None}),
        (['model.width=None', 'model.width=4'], {'model.width': 4}),
        (['model.depth=None', 'model.convnorm.method=None'], {'model.depth': None, 'model.convnorm.method': None}),
        (['model.convnorm.momentum=None', 'data.workers=None'], {'model.convnorm.momentum': None}),
        (['model.oni.use_batch_norm=None'], {'model.oni.use_batch_norm': None}),
        # Given twice, the last one counts, of every type.
        (['seed=1', 'seed=2'], {'seed': 2}),
        (['attack.names=fgsm', 'attack.names=pgd'], {'attack.names': ['pgd']}),
        (['eval.curve=(0.0,1.0)', 'eval.curve=(2.0,)'], {'eval.curve': [2.0]}),
        (['plots=False', 'plots=True'], {'plots': True}),
    ],
)
def test_none_and_keys_given_twice(tmp_path, arguments, expected):
    path = tmp_path / 'own.py'
    path.write_text(
        'from configs import default\n\ndef get_config():\n    c = default.get_config()\n'
        '    c.model.width, c.model.depth, c.data.workers = 8, (1,), 3\n    c.model.convnorm.method = "spatial"\n'
        '    c.model.oni.use_batch_norm = True\n    return c\n'
    )
    for form in (str, lambda a: a.replace('=', ' ', 1)):
        if 'plots' in arguments[0] or 'use_batch_norm' in arguments[0]:
            form = str  # absl takes no word of its own for a boolean
        words = [word for a in arguments for word in f'--config.{form(a)}'.split(' ', 1)]
        config = flatten(command_line.read_config([f'--config={path}', *words]))
        assert {key: config[key] for key in expected} == expected
    config = flatten(
        command_line.read_config([f'--config={path}', '--noconfig.plots', '--config.plots', '--config.seed=3'])
    )
    assert config['plots'] is True and config['seed'] == 3 and config['model.width'] == 8


def test_none_at_an_evaluation(command, monkeypatch, tmp_path):
    """Of a run that was trained with another value."""
    config = default.get_config()
    config.model.convnorm.method, config.eval.examples = 'spatial', 7
    workdir_lib.save_config(str(tmp_path), config)
    seen = []
    monkeypatch.setattr(
        setup, 'build', lambda given: seen.append(given) or (_ for _ in ()).throw(UserError('far enough'))
    )
    for options, method in (([], 'spatial'), (['--config.model.convnorm.method=None'], None)):
        assert command('--mode=eval', f'--workdir={tmp_path}', *options)[0] == 2
        assert seen[-1].model.convnorm.method == method and seen[-1].eval.examples == 7


def test_every_key_whose_default_is_none_takes_it():
    keys = [key for key, value in flatten(default.get_config()).items() if value is None]
    assert len(keys) > 10
    config = flatten(command_line.read_config([DIGITS, *(f'--config.{key}=None' for key in keys)]))
    assert all(config[key] is None for key in keys)


def test_overrides_reach_the_config(monkeypatch):
    from absl import flags
    from absl.testing import flagsaver

    from convnorm_jax.cli import run as main

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
