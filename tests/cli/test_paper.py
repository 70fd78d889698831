"""`convnorm paper`: its options, its plan, its report; and a small grid that runs, diverges and goes on."""

import functools
import json
import os
import pathlib

import pytest

from convnorm_jax.cli import paper
from convnorm_jax.paper import claims
from convnorm_jax.paper.record import Record
from convnorm_jax.paper.study import Study, cells, tuning_cells
from convnorm_jax.runs import sweep as sweep_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = {
    'model.width': 4, 'model.depth': (1,), 'attack.names': (), 'plots': False, 'train.steps': 12, 'log.every_steps': 1,
}  # fmt: skip
ARMS = {'ConvNorm': {'model.layer': 'convnorm'}, 'BatchNorm': {'model.layer': 'batchnorm'}}


def small(**fields):
    given = {'arms': ARMS, 'settings': {'data.label_noise.rate': (0.0, 0.4)}, 'rates': (0.05, 1e30), **fields}
    options = {**TINY, 'data.label_noise.kind': 'symmetric', **given.pop('options', {})}
    return Study('noise', 'symmetric label noise', 'digits_convnorm', options, **given)


@pytest.fixture
def command(monkeypatch, tmp_path, run_main):
    """Function of arguments -> (exit code, stdout, lines of stderr), in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(run_main, paper.main)


@pytest.fixture
def study(monkeypatch):
    """The only study of the claim 'noise'; a test may set another."""

    def use(study):
        monkeypatch.setitem(
            claims.CLAIMS, 'noise', (lambda small: [study], 'ConvNorm is more robust under label noise')
        )
        return study

    return use


def filled(study, path, seeds):
    """The record of a study whose runs are written by hand: ConvNorm is 10 points better with noise."""
    record, rates = Record(path), dict.fromkeys(study.arms, study.rates[0])
    for cell in tuning_cells(study):
        record.add(cell, {study.chosen_by: 0.5 + (cell.rate == study.rates[0])}, 1800, '1')
    for cell in cells(study, rates, seeds):
        noise = cell.settings['data.label_noise.rate']
        gain = (cell.arm == 'ConvNorm') * (0.1 + 0.001 * cell.seed) * (noise > 0)
        record.add(cell, {'test_accuracy': 0.5 + 0.01 * cell.seed + gain, 'data': 'digits'}, 3600, '1')
    record.write({})
    return record


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--claims=noise,robbust',), "no claim 'robbust'; expected some of training, robust, noise, scarcity, gan"),
        (('--claims=noise,noise',), 'each once'),
        (('--claims=',), 'expected some of training'),
        (('--seeds=a',), '--seeds=a: expected whole numbers'),
        (('--seeds=1,1',), 'each once'),
        (('--scale=huge',), 'small|full'),
        (('--jobs=0',), 'jobs'),
        (('--config=digits_convnorm',), 'config'),
        (('--mode=report', '--claims=noise'), '--output=results: no finished run there'),
        (('--claims=noise', '--data_dir=nowhere'), 'nowhere'),
    ],
)
def test_a_mistake_is_one_line(command, arguments, words):
    code, _, err = command(*arguments)
    assert code == 2 and err[-1].startswith('error: ') and words in err[-1]
    assert not os.path.exists('results') or not os.listdir('results')
    assert not os.path.exists('runs')


def test_the_plan_says_what_is_left(command, study, tmp_path):
    of = study(small())
    code, out, _ = command('--claims=noise', '--mode=plan', '--seeds=0,1')
    assert code == 0 and '| noise | noise |    0 |   12 |' in out and not os.path.exists('results')
    (tmp_path / 'results').mkdir()
    filled(of, 'results/noise.json', [0])
    _, out, _ = command('--claims=noise', '--mode=plan', '--seeds=0,1', '--jobs=2')
    assert '| noise | noise |    8 |    4 |        2.0 |' in out  # 4 hours, two runs at a time


def test_the_report_of_known_runs_needs_no_run(command, study, tmp_path, monkeypatch):
    of = study(small())
    (tmp_path / 'results').mkdir()
    filled(of, 'results/noise.json', [0, 1, 2])
    monkeypatch.setattr(sweep_lib, '_start', lambda *_: pytest.fail('a run was started'))
    code, out, _ = command('--claims=noise', '--jobs=2')
    assert code == 0
    assert 'ConvNorm is better than BatchNorm at 0.4 and not separated from BatchNorm at 0 (n=3).' in out
    assert '| ConvNorm            | 51.00 ± 1.00 | 61.10 ± 1.10 |' in out
    assert '| BatchNorm      | +0.00 [+0.00, +0.00] | +10.10 [+9.85, +10.35] |' in out
    assert 'ConvNorm 0.05, BatchNorm 0.05' in out and 'Planned, and not run' not in out
    report = (tmp_path / 'results' / 'report.md').read_text()
    assert report.partition('\n')[2].strip() in out
    for name in ('noise_noise.png', 'noise_noise_differences.png'):
        assert f'({name})' in report and (tmp_path / 'results' / name).read_bytes()[:4] == b'\x89PNG'
    content = json.loads((tmp_path / 'results' / 'noise.json').read_text())
    assert content['command'] == 'convnorm paper --claims=noise' and len(content['runs']) == 16
    assert content['hours'] == pytest.approx(4 * 0.5 + 12)
    (difference,) = (d for d in content['studies'][0]['differences'] if d['setting'] == '0.4')
    assert difference['interval'] == pytest.approx([9.8516, 10.3484], abs=1e-3)
    (table,) = content['tables']
    assert table['columns'] == ['layer / label noise', '0', '0.4'] and table['rows'][0][1] == [51.0, pytest.approx(1.0)]
    # And again from what that wrote.
    assert command('--claims=noise', '--mode=report')[1].partition('wrote')[0].strip().endswith(report[-200:].strip())


def test_what_was_not_run_is_listed_with_its_cost(command, study, tmp_path):
    of = study(small(seconds=3600.0))
    (tmp_path / 'results').mkdir()
    filled(of, 'results/noise.json', [0, 1])
    code, out, _ = command('--claims=noise', '--seeds=0,1,2', '--mode=report')
    assert code == 0 and 'Planned, and not run: noise: 4 runs, about 4.0 h of a core.' in out


@pytest.mark.slow
def test_a_grid_that_runs_and_goes_on(command, study):
    arms = {'A': {'model.layer': 'none'}, 'B': {'model.layer': 'none', 'model.width': 5}}
    study(small(settings={'data.label_noise.rate': (0.4,)}, arms=arms, rates=(0.05, 1e6)))
    code, out, err = command('--claims=noise', '--seeds=0', '--jobs=2')
    assert code == 0, err
    runs = json.loads(pathlib.Path('results/noise.json').read_text())['runs']
    # The rate of 1e6 diverges, which is an answer: it is not tried again, and not chosen.
    assert [run['result'] is None for run in runs] == [False, False, True, True, False, False]
    assert all(run['rate'] == 0.05 for run in runs if not run['tuning'])
    assert all(0 < run['result']['test_accuracy'] < 1 for run in runs if not run['tuning'])
    assert out.count('A 0.05, B 0.05') == 1
    code, _, err = command('--claims=noise', '--seeds=0,1', '--jobs=2')
    assert code == 0 and [line for line in err if 'runs to do' in line] == ['noise, seed 1: 2 of 2 runs to do']
    assert len(json.loads(pathlib.Path('results/noise.json').read_text())['runs']) == 8


@pytest.mark.slow
def test_a_run_that_fails_is_tried_again(command, study, monkeypatch):
    study(small(settings={'data.label_noise.rate': (0.4,)}, rates=()))
    start = sweep_lib._start
    broken = lambda run, log: start(
        sweep_lib.Run(run.values, run.seed, run.folder, (*run.arguments, '--config.data.batch_size=9999'), run.config),
        log,
    )  # more than there are
    monkeypatch.setattr(sweep_lib, '_start', broken)
    code, _, err = command('--claims=noise', '--seeds=0')
    assert code != 0 and any('failed' in line for line in err)
    monkeypatch.setattr(sweep_lib, '_start', start)
    code, _, err = command('--claims=noise', '--seeds=0')
    assert code == 0 and 'noise, seed 0: 2 of 2 runs to do' in err


@pytest.mark.slow
def test_a_trial_runs_each_study_and_records_nothing(command, study):
    study(small(options={'train.steps': 10**6}))
    code, _, err = command('--claims=noise', '--mode=trial', '--seeds=3')
    assert code == 0 and err[-1] == '1 of 1 trials ended well' and not os.path.exists('results')
    (folder,) = pathlib.Path('runs/paper/trial/small/noise/noise').iterdir()
    assert folder.name == 'ConvNorm,rate=0,rate=0.05,seed=3'
    assert json.loads((folder / 'result.json').read_text())['total_steps'] == 10
