"""The standard suite from the command line: the report, and the same report after an interruption."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from convnorm_jax.attacks.auto_attack import ensemble
from convnorm_jax.data.corruptions import CORRUPTIONS
from convnorm_jax.evaluation import suite as suite_lib
from convnorm_jax.reports import classifier as report
from convnorm_jax.reports import robustness
from convnorm_jax.runs import disk

pytestmark = pytest.mark.usefixtures('quick_compilation')

TRAIN = (
    '--config=configs/digits_convnorm.py',
    '--config.model.layer=batchnorm',
    '--config.model.width=4',
    '--config.model.depth=(1,)',
    '--config.train.epochs=6',
    '--config.attack.names=()',
    '--noconfig.plots',
)
SUITE = (
    '--mode=eval',
    '--config.eval.suite=standard',
    '--config.eval.examples=24',
    '--config.eval.batch_size=8',
    '--config.attack.names=fgsm,pgd',
    '--config.attack.epsilon=8',
    '--config.attack.pgd_steps=2',
    '--config.eval.autoattack.steps=4',
    '--config.eval.autoattack.queries=20',
    '--config.eval.autoattack.targets=2',
    '--config.eval.curve=(0.0,1.0)',
    '--config.eval.simba.examples=6',
    '--config.eval.simba.queries=50',
    '--config.eval.parts=autoattack,curve,simba,corruptions,operators',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('runs') / 'run'


@pytest.fixture
def workdir(command, folder):
    """Of an evaluated run, which the first test makes; what the evaluation printed is in `printed.txt`."""
    if not folder.exists():
        code, _, err = command(*TRAIN, f'--workdir={folder}')
        assert code == 0, err
        code, out, err = command(*SUITE, f'--workdir={folder}', '--config.plots=True')
        assert code == 0, err
        (folder / 'printed.txt').write_text(out)
    return folder


def without_seconds(data):
    """A report without its times."""
    if isinstance(data, dict):
        return {k: without_seconds(v) for k, v in data.items() if 'seconds' not in k}
    return [without_seconds(item) for item in data] if isinstance(data, list) else data


@pytest.mark.slow
def test_the_report(workdir):
    report = json.loads((workdir / 'report.json').read_text())
    result = json.loads((workdir / 'result.json').read_text())
    assert (report['eps'], report['norm'], report['architecture'], report['examples']) == (
        '8/255',
        'Linf',
        'simple_cnn',
        24,
    )
    found = report['figures']
    assert float(report['autoattack_acc']) == pytest.approx(100 * result['autoattack_accuracy'], abs=0.005)
    assert result['autoattack_accuracy'] <= result['pgd_accuracy'] <= float(report['clean_acc']) / 100
    assert [a['name'] for a in found['autoattack']['attacks']] == list(ensemble.STANDARD)
    # Accuracy at a radius of 0 is that of the clean pictures, at the full one PGD's.
    (zero, clean), (radius, attacked) = found['curve']
    assert (zero, radius) == (0, pytest.approx(8 / 255)) and attacked == pytest.approx(result['pgd_accuracy'])
    assert 100 * clean == pytest.approx(float(report['clean_acc']), abs=0.005)
    table = found['corruptions']['table']
    assert list(table) == list(CORRUPTIONS)
    mean = np.mean([accuracy for row in table.values() for accuracy in row.values()])
    assert result['corruption_accuracy'] == pytest.approx(mean)
    assert set(found['simba']) == {'pixel', 'dct'} and len(found['simba']['dct']['queries']) == 6
    layers = found['operators']['layers']
    assert result['largest_conv_norm'] == max(layer['conv_norm'] for layer in layers)
    # The steepest secant is of pixels, the product of normalized images: the digits' deviation is above 0.2.
    assert 0 < result['lipschitz_lower_bound'] < 5 * result['product_bound']
    text = (workdir / 'report.md').read_text()
    for words in (
        '## Layers',
        'conv1_1',
        'APGD-CE',
        '+ Square',
        'PGD-2',
        f'AutoAttack: **{report["autoattack_acc"]} %**',
        'elastic transform',
    ):
        assert words in text
    for line in text.splitlines():
        if line.startswith('!['):
            assert (workdir / line.split('(')[1].rstrip(')')).read_bytes().startswith(b'\x89PNG')
    assert text.count('![') == 4 and '| + FAB-T' in (workdir / 'printed.txt').read_text()


@pytest.mark.slow
def test_an_interrupted_evaluation_ends_in_the_same_report(command, workdir, monkeypatch):
    before = json.loads((workdir / 'report.json').read_text())
    text = (workdir / 'report.md').read_text()
    parts = '--config.eval.parts=autoattack,corruptions'
    options = (*SUITE, parts, f'--workdir={workdir}', '--noconfig.plots', '--config.eval.simba.step_size=0.3')
    monkeypatch.setattr(ensemble, '_SAVE_EVERY', 0.0)
    moments = {
        'in AutoAttack': (ensemble._Run, '_note', 5),
        'in the corruptions': (suite_lib, 'corrupt', 9),
    }
    for holder, name, moment in moments.values():
        original, calls = getattr(holder, name), []

        def interrupt(*arguments, original=original, calls=calls, moment=moment):
            calls.append(1)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(holder, name, interrupt)
        assert command(*options)[0] == 130
        monkeypatch.setattr(holder, name, original)
    (interrupted,) = [f for f in (workdir / 'evaluation').iterdir() if not (f / 'corruption-pixelate.json').exists()]
    code, _, err = command(*options)
    assert code == 0 and any('resuming from' in line for line in err), err
    assert (interrupted / 'corruption-pixelate.json').exists()
    # Another folder, for SimBA's step is another one; the same figures as without any interruption.
    after = json.loads((workdir / 'report.json').read_text())
    for part in ('simba', 'curve', 'operators', *robustness.OPERATOR_FIGURES):
        before['figures'].pop(part)
    assert without_seconds(after['figures']) == without_seconds(before['figures'])
    assert after['autoattack_acc'] == before['autoattack_acc']
    assert (workdir / 'report.md').read_text() != text


@pytest.mark.slow
def test_a_finished_evaluation_is_not_repeated(command, workdir, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(suite_lib, 'corrupt', never)
    monkeypatch.setattr(suite_lib, '_simba', never)
    monkeypatch.setattr(ensemble._Run, 'attack', never)
    code, _, err = command(*SUITE, f'--workdir={workdir}', '--noconfig.plots')
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize('devices', [4])
def test_the_command_on_four_devices(command, tmp_path):
    """Training, attacks and AutoAttack with every batch cut over the devices."""
    folder = tmp_path / 'run'
    code, _, err = command(*TRAIN, f'--workdir={folder}', '--config.train.epochs=1', '--config.model.layer=convnorm')
    assert code == 0, err
    options = '--config.eval.parts=autoattack', '--config.eval.autoattack.attacks=apgd-ce', '--config.attack.names=fgsm'
    code, _, err = command(*SUITE, *options, f'--workdir={folder}')
    assert code == 0, err
    result, report = (json.loads((folder / f'{name}.json').read_text()) for name in ('result', 'report'))
    assert result['device'].startswith('4 x ') and report['figures']['autoattack']['attacks'][0]['name'] == 'apgd-ce'
    assert 0 <= float(report['autoattack_acc']) <= float(report['clean_acc'])


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('--config.eval.suite=all', "config.eval.suite='all': expected one of '', 'standard'"),
        ('--config.eval.parts=autoattack,apgd', "config.eval.parts=('autoattack', 'apgd'): expected some of"),
        ('--config.eval.autoattack.attacks=pgd', "config.eval.autoattack.attacks=('pgd',): expected some of"),
        ('--config.eval.curve=(1.0,0.5)', 'config.eval.curve=(1.0, 0.5): expected rising factors'),
        ('--config.attack.norm=l1', "config.attack.norm='l1': expected one of 'linf', 'l2'"),
        ('--config.attack.epsilon=300', 'config.attack.epsilon=300.0: expected at most 255'),
        ('--config.train.algorithm=mart', "config.train.algorithm='mart': expected one of 'clean', 'free'"),
        ('--config.train.adversarial.replays=0', 'config.train.adversarial.replays=0: expected at least 1'),
        ('--config.train.ocnn.pattern=nothing --config.train.ocnn.weight=0.1', 'nothing'),
    ],
)
def test_what_a_user_gets_wrong(command, tmp_path, option, message):
    code, _, err = command('--config=configs/digits_convnorm.py', f'--workdir={tmp_path}/run', *option.split())
    assert code == 2 and message in err[-1] and len(err) < 3


@pytest.fixture
def copy(workdir, tmp_path):
    """A copy of the evaluated run, whose measured parts are found again."""
    shutil.copytree(workdir, tmp_path / 'copy', ignore=shutil.ignore_patterns('result*', 'report*', 'plots'))
    return tmp_path / 'copy'


FAST = (*SUITE, '--config.attack.names=fgsm', '--config.eval.parts=autoattack,curve,corruptions')


def broken(*_, **__):
    raise ValueError('of NumPy')


@pytest.mark.slow
def test_a_part_that_fails_costs_no_other_figure(command, copy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(suite_lib, 'run_corruptions', broken)
        code, out, err = command(*FAST, f'--workdir={copy}', '--config.plots=True')
    assert code == 1 and err[-2] == 'ValueError: of NumPy' and '| + Square' in out
    result = json.loads((copy / 'result.json').read_text())
    assert result['incomplete'] == 'ValueError: of NumPy' and 'corruption_accuracy' not in result
    assert {'test_accuracy', 'fgsm_accuracy', 'autoattack_accuracy'} <= set(result)
    report, text = json.loads((copy / 'report.json').read_text()), (copy / 'report.md').read_text()
    assert len(report['figures']['curve']) == 2 and '**Not complete**: ValueError: of NumPy' in text
    # The whole one takes its place; what fails afterwards leaves that as it is.
    code, _, err = command(*FAST, f'--workdir={copy}', '--noconfig.plots')
    whole = json.loads((copy / 'result.json').read_text())
    assert code == 0 and 'incomplete' not in whole and 0 <= whole['corruption_accuracy'] <= 1, err
    assert json.loads((copy / 'result-1.json').read_text()) == result
    with monkeypatch.context() as patch:
        patch.setattr(suite_lib, 'run_curve', broken)
        assert command(*FAST, f'--workdir={copy}', '--noconfig.plots')[0] == 1
    assert json.loads((copy / 'result.json').read_text()) == whole
    assert 'autoattack_accuracy' in json.loads((copy / 'result-incomplete.json').read_text())
    assert (copy / 'report-incomplete.md').exists() and 'Not complete' not in (copy / 'report.md').read_text()


@pytest.mark.slow
def test_a_picture_that_fails_costs_no_figure(command, copy, monkeypatch):
    monkeypatch.setattr(robustness.plots, 'epsilon_curve', broken)
    code, _, _ = command(*FAST, f'--workdir={copy}', '--config.plots=True')
    assert code == 1 and 'incomplete' not in json.loads((copy / 'result.json').read_text())
    assert 'curve' in json.loads((copy / 'report.json').read_text())['figures']
    assert 'Accuracy against epsilon' in (copy / 'report.md').read_text()


@pytest.mark.slow
def test_a_damaged_figure_is_measured_again(command, copy):
    places = list(copy.glob('evaluation/*/curve-1.json'))
    (whole,) = {json.loads(place.read_text())['accuracy'] for place in places}
    for place in places:
        place.write_text('{"accuracy": 0.')
    code, _, err = command(*SUITE, '--config.eval.parts=curve', f'--workdir={copy}', '--noconfig.plots')
    assert code == 0 and any('curve-1.json is damaged' in line and 'measured again' in line for line in err), err
    again = [place.read_text() for place in places if '}' in place.read_text()]
    assert [json.loads(text)['accuracy'] for text in again] == [whole]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_told_first(command, copy, monkeypatch):
    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(disk.tempfile, 'TemporaryFile', read_only)
    monkeypatch.setattr(report, 'restore_variables', broken)
    code, out, err = command(*FAST, f'--workdir={copy}')
    assert code == 2 and out == '' and err[-1].startswith(f'error: --workdir={copy}: the file system is read-only;')
