"""The loop: resuming bit for bit, what ends a run early, what a run's folder holds."""

import dataclasses
import math
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from convnorm_jax.configs.keys import flatten
from convnorm_jax.data import splits
from convnorm_jax.runs.checkpoint import Checkpointer
from convnorm_jax.runs.metrics import read_rows
from convnorm_jax.runs.workdir import load_config
from convnorm_jax.training import loop
from convnorm_jax.training.totals import zero_totals
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

STEPS = 10  # two epochs of five


def rows(workdir):
    """metrics.csv without the speed."""
    found = read_rows(os.path.join(workdir, 'metrics.csv'))
    return [{k: v for k, v in row.items() if k != 'examples_per_second'} for row in found]


def saved(experiment, workdir, step=None):
    """(arrays, progress) of the newest checkpoint, or of a step."""
    checkpointer = Checkpointer(workdir, read_only=True)
    like = {'state': experiment.initial_state(), 'totals': jax.device_put(zero_totals(experiment.metric_names))}
    found = checkpointer.restore(checkpointer.latest_step if step is None else step, like)
    checkpointer.close()
    return found


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def but_time(progress):
    return {k: v for k, v in progress.items() if k not in ('seconds', 'examples')}


class Kill(Exception):
    """Ends a run from within."""


def train_until(experiment, workdir, steps, monkeypatch):
    """`loop.train` that dies before step number `steps` + 1 of this call."""
    initialize, left = loop._Run.__init__, list(range(steps))

    def with_a_mortal_step(self, *args):
        initialize(self, *args)
        step = self._step

        def mortal(*arguments):
            if not left:
                raise Kill
            left.pop()
            return step(*arguments)

        self._step = mortal

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(loop._Run, '__init__', with_a_mortal_step)
        loop.train(experiment, workdir)


@pytest.fixture(scope='module')
def experiment(tiny_experiment):
    return tiny_experiment()


@pytest.fixture(scope='module')
def whole(experiment, tmp_path_factory):
    """Folder of an uninterrupted run, and its `Progress`."""
    workdir = str(tmp_path_factory.mktemp('whole'))
    return workdir, loop.train(experiment, workdir)


def test_a_run(experiment, whole):
    workdir, progress = whole
    assert experiment.steps_per_epoch == 5 and experiment.total_steps == STEPS
    assert progress.step == STEPS and progress.examples_per_second > 0
    found = rows(workdir)
    assert [(r['epoch'], r['step']) for r in found] == [(1, 5), (2, 10)]
    assert all(math.isfinite(v) for r in found for v in r.values()) and len(found[0]) == 8
    best = max(r['validation_accuracy'] for r in found)
    assert progress.best_rating == best
    assert progress.best_step == next(r['step'] for r in found if r['validation_accuracy'] == best)
    assert flatten(load_config(workdir)) == flatten(experiment.config.to_dict())
    assert {'config.json', 'metrics.csv', 'splits.npz', 'checkpoints'} <= set(os.listdir(workdir))
    assert any(name.startswith('events.out.tfevents') for name in os.listdir(workdir))


def test_the_row_is_what_evaluation_says(experiment, whole):
    workdir, _ = whole
    state = saved(experiment, workdir)[0]['state']
    found = experiment.evaluator.evaluate(state.eval_variables, experiment.data['validation'])
    last = rows(workdir)[-1]
    assert (last['validation_accuracy'], last['validation_loss']) == (found['accuracy'], found['loss'])
    assert last['learning_rate'] == float(experiment.schedule(STEPS - 1))


# Checkpoints: every third step within an epoch, and every epoch's end.
def test_interrupted_and_resumed_equals_uninterrupted(experiment, whole, tmp_path, monkeypatch, capsys):
    workdir = str(tmp_path)
    for steps, resumes_at in ((2, None), (4, None), (4, 3)):  # the first dies before any checkpoint
        train_until(experiment, workdir, steps, monkeypatch)
        message = capsys.readouterr().err
        expected = 'resuming' if resumes_at is None else f'resuming {workdir} at step {resumes_at} of {STEPS}'
        assert (expected in message) == (resumes_at is not None)
    progress = loop.train(experiment, workdir)
    assert f'resuming {workdir} at step 6 of {STEPS}' in capsys.readouterr().err
    assert progress.step == STEPS
    arrays, kept = saved(experiment, workdir)
    expected, expected_progress = saved(experiment, whole[0])
    same(arrays, expected)
    assert but_time(kept) == but_time(expected_progress)
    assert rows(workdir) == rows(whole[0])


def test_a_finished_run_stays_as_it_is(experiment, whole, tmp_path):
    workdir = str(tmp_path / 'copy')
    shutil.copytree(whole[0], workdir)
    before = saved(experiment, workdir)
    progress = loop.train(experiment, workdir)
    assert dataclasses.asdict(progress) == dataclasses.asdict(whole[1])
    same(saved(experiment, workdir), before)
    assert rows(workdir) == rows(whole[0])


@pytest.mark.slow
def test_more_epochs_continue(tiny_experiment, tmp_path):
    constant = {'schedule.kind': 'constant', 'checkpoint.every_steps': 0}
    workdir, straight = str(tmp_path / 'continued'), str(tmp_path / 'straight')
    loop.train(tiny_experiment({**constant, 'train.epochs': 1.0}), workdir)
    experiment = tiny_experiment({**constant, 'train.epochs': 2.0})
    assert loop.train(experiment, workdir).step == 10
    loop.train(experiment, straight)
    same(saved(experiment, workdir)[0], saved(experiment, straight)[0])
    assert rows(workdir) == rows(straight) and len(rows(workdir)) == 2
    assert load_config(workdir)['train']['epochs'] == 2.0


def test_the_last_epoch_may_be_a_part_of_one(tiny_experiment, tmp_path):
    experiment = tiny_experiment({'train.epochs': 0.0, 'train.steps': 7, 'checkpoint.every_steps': 5})
    assert loop.train(experiment, str(tmp_path)).step == 7
    assert [(r['epoch'], r['step']) for r in rows(str(tmp_path))] == [(1, 5), (2, 7)]
    assert saved(experiment, str(tmp_path))[1]['step'] == 7


def test_another_config_is_refused_by_name(tiny_experiment, whole, tmp_path):
    workdir = str(tmp_path / 'copy')
    shutil.copytree(whole[0], workdir)
    before = sorted(os.listdir(workdir)), load_config(workdir)
    with pytest.raises(ValueError, match=r"another config: config\.model\.layer was 'convnorm', is now 'batchnorm'"):
        loop.train(tiny_experiment({'model.layer': 'batchnorm'}), workdir)
    assert (sorted(os.listdir(workdir)), load_config(workdir)) == before


def constant_accuracy(values):
    """An `evaluate` that gives these accuracies, one a call."""
    left = list(values)
    return lambda variables, split: {'loss': 1.0, 'accuracy': left.pop(0)}


def test_early_stopping(tiny_experiment, tmp_path, monkeypatch):
    workdir, overrides = str(tmp_path), {'train.epochs': 5.0, 'checkpoint.every_steps': 0}
    experiment = tiny_experiment({**overrides, 'train.early_stopping_epochs': 2})
    monkeypatch.setattr(experiment.evaluator, 'evaluate', constant_accuracy([0.3, 0.5, 0.5, 0.4]))
    progress = loop.train(experiment, workdir)
    assert progress.step == 20  # the second of two equals is no better
    assert (progress.best_step, progress.best_rating) == (10, 0.5)
    assert loop.train(experiment, workdir).step == 20  # and stays stopped
    best, *_ = loop.restore_variables(experiment, workdir, 'best')
    same(best['params'], saved(experiment, workdir, 10)[0]['state'].params)
    patient = tiny_experiment(overrides)
    monkeypatch.setattr(patient.evaluator, 'evaluate', constant_accuracy([0.4]))
    assert loop.train(patient, workdir).step == 25  # more patience goes on


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tiny_experiment, tmp_path, monkeypatch):
    workdir = str(tmp_path)
    good = tiny_experiment({'model.layer': 'none'})
    train_until(good, workdir, 4, monkeypatch)
    # The same run goes on at a rate that breaks it.
    broken = dataclasses.replace(
        tiny_experiment({'model.layer': 'none', 'optimizer.learning_rate': 1e30, 'schedule.kind': 'constant'}),
        config=good.config,
    )
    with pytest.raises(loop.NonFiniteLoss, match=r'steps 3 and \d.*step 3 in .*config\.optimizer\.learning_rate'):
        loop.train(broken, workdir)
    arrays, progress = saved(good, workdir)
    assert progress['step'] == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays))
    assert rows(workdir) == []
    assert loop.train(good, workdir).step == STEPS  # the good one can go on


def test_a_loss_that_is_not_finite_from_the_start(tiny_experiment, tmp_path):
    experiment = tiny_experiment({'optimizer.learning_rate': 1e30, 'checkpoint.every_steps': 0})
    with pytest.raises(loop.NonFiniteLoss, match='steps 0 and 5; there was no checkpoint yet'):
        loop.train(experiment, str(tmp_path))
    assert os.listdir(tmp_path / 'checkpoints') == [] and rows(str(tmp_path)) == []


@pytest.fixture(scope='module')
def varied(tiny_experiment, tmp_path_factory):
    """A run with averaged parameters, label noise, a subset and more; (experiment, folder)."""
    experiment = tiny_experiment(
        {
            'train.ema_decay': 0.9,
            'train.label_smoothing': 0.1,
            'data.label_noise.kind': 'symmetric',
            'data.label_noise.rate': 0.5,
            'checkpoint.keep': 9,
        }
    )
    workdir = str(tmp_path_factory.mktemp('varied'))
    loop.train(experiment, workdir)
    return experiment, workdir


def test_the_average_is_what_is_evaluated(varied):
    experiment, workdir = varied
    state = saved(experiment, workdir)[0]['state']
    variables, *_ = loop.restore_variables(experiment, workdir, 'latest')
    same(variables, {'params': state.ema, **state.ema_state})
    assert not np.allclose(state.ema['linear']['kernel'], state.params['linear']['kernel'], atol=1e-4)
    found = experiment.evaluator.evaluate(variables, experiment.data['validation'])
    assert rows(workdir)[-1]['validation_loss'] == found['loss']


def test_label_noise_and_subset_reach_the_run(varied):
    experiment, workdir = varied
    record = splits.load_record(os.path.join(workdir, 'splits.npz'))
    assert len(record['train_labels']) == len(experiment.data['train']['labels']) == 325  # a quarter, held out apart
    np.testing.assert_array_equal(record['train_labels'], experiment.data['train']['labels'])
    assert 0.35 < record['train_noisy'].mean() < 0.55
    np.testing.assert_array_equal(experiment.data['test']['labels'], experiment.source.test.labels)
    clean = experiment.source.train.labels[record['train_indices']]
    np.testing.assert_array_equal(record['train_clean_labels'], clean)


def test_best_and_latest_are_restored(varied):
    experiment, workdir = varied
    best = max(rows(workdir), key=lambda r: (r['validation_accuracy'], -r['step']))
    for which, step in (('best', best['step']), ('latest', STEPS)):
        variables, progress, _ = loop.restore_variables(experiment, workdir, which)
        assert progress.step == step
        same(variables, saved(experiment, workdir, int(step))[0]['state'].eval_variables)


def test_without_validation_the_latest_is_the_best(tiny_experiment, tmp_path):
    experiment = tiny_experiment({'data.validation_fraction': 0.0, 'train.epochs': 1.0})
    progress = loop.train(experiment, str(tmp_path))
    assert progress.step == loop.restore_variables(experiment, str(tmp_path), 'best')[1].step == 5
    assert 'validation_accuracy' not in rows(str(tmp_path))[0]


@pytest.mark.parametrize('folder', ['absent', 'empty'])
def test_nothing_to_restore(experiment, tmp_path, folder):
    if folder == 'empty':
        (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(ValueError, match='no checkpoint there yet; train first'):
        loop.restore_variables(experiment, str(tmp_path), 'best')


def test_a_folder_that_can_not_be_written(experiment, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot write there'):
        loop.train(experiment, str(tmp_path / 'file'))


def test_pictures_too_small_leave_no_folder(tiny_experiment, tmp_path):
    experiment = tiny_experiment({'model.name': 'vgg11', 'model.depth': (1, 1, 1, 1)})
    with pytest.raises(ValueError, match='images of 8x8'):
        loop.train(experiment, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_damaged_config(tmp_path):
    (tmp_path / 'config.json').write_text('{"seed": ')
    with pytest.raises(ValueError, match=r'config\.json: cannot be read'):
        load_config(str(tmp_path))
    with pytest.raises(ValueError, match='no run there'):
        load_config(str(tmp_path / 'nowhere'))


@pytest.mark.parametrize('number', few([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_stops_between_steps_and_loses_nothing(experiment, whole, tmp_path, monkeypatch, number):
    workdir, initialize = str(tmp_path), loop._Run.__init__

    def signalled(self, *args):
        initialize(self, *args)
        step, calls = self._step, []

        def counted(*arguments):
            calls.append(None)
            if len(calls) == 4:
                os.kill(os.getpid(), number)
            return step(*arguments)

        self._step = counted

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(loop.Stopped, match='saved at step 4') as stopped:
        patch.setattr(loop._Run, '__init__', signalled)
        loop.train(experiment, workdir)
    assert stopped.value.signal == number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert saved(experiment, workdir)[1]['step'] == 4
    loop.train(experiment, workdir)
    same(saved(experiment, workdir)[0], saved(experiment, whole[0])[0])
    assert rows(workdir) == rows(whole[0])


@pytest.mark.slow
def test_a_run_that_ended_in_mid_epoch_goes_on_as_if_it_had_not(tiny_experiment, whole, tmp_path):
    loop.train(tiny_experiment({'train.epochs': 1.4, 'schedule.kind': 'constant'}), str(tmp_path / 'run'))
    assert [row['step'] for row in rows(str(tmp_path / 'run'))] == [5, 7]
    longer = tiny_experiment({'train.epochs': 2.0, 'schedule.kind': 'constant'})
    loop.train(longer, str(tmp_path / 'run'))
    loop.train(longer, str(tmp_path / 'at once'))
    assert rows(str(tmp_path / 'run')) == rows(str(tmp_path / 'at once'))
    same(saved(longer, str(tmp_path / 'run'))[0], saved(longer, str(tmp_path / 'at once'))[0])


def test_a_shorter_run_than_the_one_there_is_refused(tiny_experiment, tmp_path):
    loop.train(tiny_experiment({'train.epochs': 1.0, 'schedule.kind': 'constant'}), str(tmp_path))
    shorter = tiny_experiment({'train.epochs': 0.4, 'schedule.kind': 'constant'})
    with pytest.raises(ValueError, match=r'is at step 5, past the end of this config at 2'):
        loop.train(shorter, str(tmp_path))
    assert load_config(str(tmp_path))['train']['epochs'] == 1.0


def test_a_trial_does_not_become_the_start_of_a_run_with_a_schedule(tiny_experiment, whole):
    with pytest.raises(ValueError, match=r'config.train.epochs was 2.0, is now 3.0'):
        loop.train(tiny_experiment({'train.epochs': 3.0}), whole[0])


def test_other_data_under_the_same_config_are_refused(experiment, whole):
    record = experiment.prepared.record | {'train_indices': experiment.prepared.record['train_indices'][::-1]}
    other = dataclasses.replace(experiment, prepared=dataclasses.replace(experiment.prepared, record=record))
    with pytest.raises(ValueError, match=r'train_indices differ from its splits.npz'):
        loop.train(other, whole[0])


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_only_time(experiment, whole, tmp_path, monkeypatch, capsys):
    workdir = str(tmp_path)
    train_until(experiment, workdir, 7, monkeypatch)
    for path in (tmp_path / 'checkpoints' / '6' / 'arrays' / 'd').iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    loop.train(experiment, workdir)
    err = capsys.readouterr().err
    assert 'checkpoint of step 6 is damaged (' in err and f'kept in {tmp_path}/damaged/6; resuming from step 5' in err
    assert f'resuming {workdir} at step 5' in err
    same(saved(experiment, workdir)[0], saved(experiment, whole[0])[0])
    assert rows(workdir) == rows(whole[0])
