"""Runs with averaged parameters: resumed, and continued from checkpoints of before their statistics were kept."""

import shutil

import jax
import numpy as np
import pytest

from convnorm_jax.runs.checkpoint import Checkpointer
from convnorm_jax.training import loop
from convnorm_jax.training.totals import zero_totals

pytestmark = pytest.mark.usefixtures('quick_compilation')

STEPS = 10  # two epochs of five


@pytest.fixture(scope='module')
def whole(tiny_experiment, tmp_path_factory):
    """(experiment, folder) of an uninterrupted run."""
    experiment = tiny_experiment({'train.ema_decay': 0.9, 'checkpoint.keep': 9})
    workdir = str(tmp_path_factory.mktemp('whole'))
    loop.train(experiment, workdir)
    return experiment, workdir


def saved(experiment, workdir, step):
    """(arrays, progress) of the checkpoint of a step."""
    checkpointer = Checkpointer(workdir, read_only=True)
    like = {'state': experiment.initial_state(), 'totals': jax.device_put(zero_totals(experiment.metric_names))}
    found = checkpointer.restore(step, like)
    checkpointer.close()
    return found


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(whole, tmp_path):
    experiment, workdir = whole
    shutil.copytree(workdir, tmp_path / 'run')
    for step in range(7, STEPS + 1):
        shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(step), ignore_errors=True)
    loop.train(experiment, str(tmp_path / 'run'))
    same(*(loop.restore_state(experiment, folder, 'latest')[0] for folder in (workdir, str(tmp_path / 'run'))))


@pytest.fixture
def formerly(whole, tmp_path):
    """The folder of such a run at step 6, as it was before the average had statistics of its own."""
    experiment, workdir = whole
    shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoints'))
    arrays, progress = saved(experiment, workdir, 6)
    checkpointer = Checkpointer(str(tmp_path / 'run'))
    checkpointer.save(6, {**arrays, 'state': arrays['state'].replace(ema_state=None)}, progress, 0.5)
    checkpointer.close()
    return experiment, str(tmp_path / 'run'), arrays['state']


@pytest.mark.slow
def test_a_checkpoint_without_statistics_of_the_average_is_evaluated(formerly):
    experiment, workdir, state = formerly
    variables, progress, _ = loop.restore_variables(experiment, workdir, 'best')
    assert progress.step == 6
    same(variables['params'], state.ema)
    # BatchNorm's are those of the average over the training set, the spectrum is that of its kernel.
    found, unfit = (tree['batch_stats']['conv1_1'] for tree in (variables, state.model_state))
    images = experiment.data['train']['images'][:256] / np.float32(255)
    images = (images - experiment.source.mean[0]) / experiment.source.std[0]
    given = {'params': state.ema, **state.model_state}
    truth = experiment.model.apply(given, images, train=True, mutable=['batch_stats'])[1]['batch_stats']['conv1_1']
    mean = lambda layer: np.asarray(layer['batch_norm']['mean'])
    batch_mean = 10 * (mean(truth) - 0.9 * mean(unfit))
    assert np.abs(mean(found) - batch_mean).max() < 0.3 * np.abs(mean(unfit) - batch_mean).max()
    np.testing.assert_allclose(found['preconditioner'], truth['preconditioner'], rtol=1e-3)
    same(loop.restore_variables(experiment, workdir, 'best')[0], variables)


@pytest.mark.slow
def test_a_checkpoint_without_statistics_of_the_average_is_resumed(formerly):
    experiment, workdir, _ = formerly
    assert loop.train(experiment, workdir).step == STEPS
    state = loop.restore_state(experiment, workdir, 'latest')[0]
    assert jax.tree.structure(state) == jax.tree.structure(experiment.initial_state())
