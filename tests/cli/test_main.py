"""One run from the command line to the pictures, and what may follow it."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN = [
    '--config=configs/digits_convnorm.py',
    '--config.model.width=4',
    '--config.model.depth=(1,)',
    '--config.train.epochs=2',
    '--config.attack.pgd_steps=2',
    '--config.attack.epsilon=4',
    '--config.eval.examples=100',
    '--config.eval.checkpoint=best',
]


@pytest.fixture(scope='module')
def trained(quick_environment, tmp_path_factory):
    """(folder of a run, its finished process)."""
    workdir = tmp_path_factory.mktemp('runs') / 'run'
    process = subprocess.run(
        [sys.executable, '-m', 'convnorm_jax.cli.run', *TRAIN, f'--workdir={workdir}'],
        cwd=ROOT,
        env=quick_environment,
        capture_output=True,
        text=True,
    )
    return workdir, process


@pytest.fixture
def result(trained):
    return json.loads((trained[0] / 'result.json').read_text())


def png_size(path):
    """(width, height) of a whole PNG file."""
    content = path.read_bytes()
    assert content.startswith(b'\x89PNG\r\n\x1a\n') and b'IEND' in content[-12:]
    return int.from_bytes(content[16:20], 'big'), int.from_bytes(content[20:24], 'big')


def test_it_ends_well_and_says_little(trained):
    workdir, process = trained
    assert process.returncode == 0, process.stderr
    assert 'Traceback' not in process.stderr and 'WARNING' not in process.stderr
    assert 'digits' in process.stderr and str(workdir) in process.stderr and '40 steps' in process.stderr
    assert 'epoch   2/2' in process.stderr


def test_the_runs_folder(trained):
    workdir, _ = trained
    config = json.loads((workdir / 'config.json').read_text())
    assert config['model']['depth'] == [1] and config['train']['epochs'] == 2.0
    with open(workdir / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['epoch'], row['step']) for row in rows] == [('1', '20'), ('2', '40')]
    assert all(row['validation_accuracy'] and row['train_loss'] for row in rows)
    assert [p.stat().st_size > 100 for p in workdir.glob('events.out.tfevents.*')] == [True]
    assert '40' in os.listdir(workdir / 'checkpoints')
    assert (workdir / 'splits.npz').exists()
    plots = {path.name: png_size(path) for path in (workdir / 'plots').iterdir()}
    assert set(plots) == {'learning_curves.png', 'attacks.png', 'layer_spectra.png'}
    assert all(min(size) > 200 for size in plots.values())
    assert not list(workdir.rglob('*.tmp'))


def test_the_result(result):
    assert not any(isinstance(value, (dict, list)) for value in result.values())
    for name in ('test_accuracy', 'fgsm_accuracy', 'pgd_accuracy', 'best_validation_accuracy'):
        assert 0 <= result[name] <= 1
    assert result['test_accuracy'] > 0.3  # ten classes
    assert result['pgd_accuracy'] <= result['test_accuracy'] + 0.1
    expected = {
        'model': 'simple_cnn',
        'layer': 'convnorm',
        'seed': 0,
        'test_examples': 360,
        'attacked_examples': 100,
        'train_examples': 1292,
        'epsilon': 4.0,
        'pgd_steps': 2,
        'total_steps': 40,
        'checkpoint': 'best',
    }
    assert {key: result[key] for key in expected} == expected
    assert result['checkpoint_step'] in (20, 40) and result['examples_per_second'] > 0
    assert 'digits' in result['data'] and result['parameters'] > 100


def test_the_table(trained, result):
    lines = trained[1].stdout.splitlines()
    for name, key, examples in (
        ('clean', 'test_accuracy', 360),
        ('FGSM', 'fgsm_accuracy', 100),
        ('PGD-2', 'pgd_accuracy', 100),
    ):
        cells = next([c.strip() for c in line.split('|')[1:-1]] for line in lines if line.startswith(f'| {name}'))
        assert cells[2] == f'{100 * result[key]:.2f} %' and cells[3] == str(examples)
    assert sum('wrote ' in line for line in lines) == 4


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run that a test may change, without its pictures."""
    workdir = tmp_path / 'copy'
    shutil.copytree(trained[0], workdir)
    shutil.rmtree(workdir / 'plots')
    return workdir


@pytest.mark.slow
def test_evaluation_with_another_attack(command, copy, result, quick_compilation):
    code, out, _ = command(
        '--mode=eval',
        f'--workdir={copy}',
        '--config.attack.pgd_steps=3',
        '--config.attack.names=pgd',
        '--noconfig.plots',
    )
    found = json.loads((copy / 'result.json').read_text())
    assert code == 0 and 'PGD-3' in out
    assert found['pgd_steps'] == 3 and 'fgsm_accuracy' not in found
    assert found['test_accuracy'] == result['test_accuracy']
    assert found['epsilon'] == 4.0 and found['attacked_examples'] == 100  # as the run was started
    assert json.loads((copy / 'config.json').read_text())['attack']['pgd_steps'] == 2
    assert not (copy / 'plots').exists()


def test_the_same_command_again_only_evaluates(command, copy, result, quick_compilation):
    config, *rest = TRAIN
    before = (copy / 'metrics.csv').read_bytes(), sorted(os.listdir(copy / 'checkpoints'))
    (copy / 'result.json').unlink()
    code, out, err = command(config.replace('=', f'={ROOT}/'), *rest, f'--workdir={copy}', '--noconfig.plots')
    assert code == 0 and '| clean' in out
    assert not any(line.startswith('epoch ') for line in err)
    again = json.loads((copy / 'result.json').read_text())
    # Here there are four devices, there was one: another order of summation.
    assert again.pop('test_loss') == pytest.approx(result.pop('test_loss'), rel=1e-5)
    assert again.pop('device') and result.pop('device') and again == result
    assert ((copy / 'metrics.csv').read_bytes(), sorted(os.listdir(copy / 'checkpoints'))) == before


def test_a_changed_model_is_refused(command, copy):
    config, *rest = TRAIN
    before = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()}
    for arguments in ([config.replace('=', f'={ROOT}/'), *rest], ['--mode=eval']):
        code, out, err = command(*arguments, f'--workdir={copy}', '--config.model.layer=batchnorm')
        assert code == 2 and out == '' and len(err) == 1
        assert "config.model.layer was 'convnorm', is now 'batchnorm'" in err[0] and str(copy) in err[0]
    assert {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()} == before


def test_a_damaged_checkpoint_is_one_line(command, copy):
    for path in (copy / 'checkpoints').rglob('*'):
        if path.is_file() and 'arrays' in path.parts:
            path.write_bytes(b'')
    code, _, err = command('--mode=eval', f'--workdir={copy}')
    assert code == 2 and len(err) == 1 and 'the checkpoint cannot be read' in err[0]
