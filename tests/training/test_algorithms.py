"""Every training algorithm in the one loop: it runs, saves, resumes, and counts epochs as published."""

import jax
import numpy as np
import pytest

from convnorm_jax.training import loop
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

SMALL = {'train.adversarial.steps': 2, 'train.adversarial.replays': 2, 'train.epochs': 1.0}


@pytest.mark.parametrize('algorithm', few(['free', 'fast', 'pgd', 'trades'], 'trades'))
def test_an_algorithm_trains(tiny_experiment, tmp_path, algorithm):
    experiment = tiny_experiment({'train.algorithm': algorithm, **SMALL})
    progress = loop.train(experiment, tmp_path / 'run')
    assert progress.step == experiment.total_steps == experiment.steps_per_epoch
    variables, *_ = loop.restore_variables(experiment, tmp_path / 'run', 'latest')
    start = experiment.initial_state()
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), variables['params'], start.params)
    assert min(jax.tree.leaves(moved)) > 0


def test_free_counts_the_learning_rate_in_batches_not_in_replays(tiny_experiment):
    overrides = {
        'train.algorithm': 'free', 'train.adversarial.replays': 4, 'train.epochs': 2.0, 'optimizer.momentum': 0.0,
        'optimizer.weight_decay': 0.0, 'schedule.kind': 'step', 'schedule.milestones': (0.5,),
    }  # fmt: skip
    experiment = tiny_experiment(overrides)
    params = {'w': np.zeros(1, np.float32)}
    state, rates = experiment.tx.init(params), []
    for _ in range(4 * experiment.total_steps):
        updates, state = experiment.tx.update({'w': np.ones(1, np.float32)}, state, params)
        rates.append(-float(updates['w'][0]))
    half = 4 * experiment.steps_per_epoch
    assert len(rates) == 2 * half
    np.testing.assert_allclose(rates[:half], 0.05, rtol=1e-6)
    np.testing.assert_allclose(rates[half:], 0.005, rtol=1e-6)


@pytest.mark.slow
def test_the_carried_perturbation_is_part_of_the_state(tiny_experiment, tmp_path):
    overrides = {'train.algorithm': 'free', 'train.adversarial.carry_over': True, **SMALL, 'train.epochs': 2.0}
    overrides['schedule.kind'] = 'constant'
    stopped, expected = tiny_experiment({**overrides, 'train.epochs': 1.0}), tiny_experiment(overrides)
    loop.train(expected, tmp_path / 'expected')
    loop.train(stopped, tmp_path / 'resumed')
    loop.train(expected, tmp_path / 'resumed')
    found = [loop.restore_variables(expected, tmp_path / name, 'latest')[0] for name in ('expected', 'resumed')]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert expected.initial_state().perturbation.shape == (64, 8, 8, 1)


@pytest.mark.slow
def test_ocnn_is_added_to_the_loss(tiny_experiment):
    batch = {'images': np.zeros((64, 8, 8, 1), np.uint8) + np.arange(8, dtype=np.uint8)[:, None] * 30,
             'labels': np.arange(64) % 10}  # fmt: skip
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        experiment = tiny_experiment({'train.ocnn.weight': weight, 'data.augmentation': 'none'})
        state = experiment.initial_state()
        _, metrics = jax.jit(experiment.train_step)(state, batch)
        losses[weight] = float(metrics['loss'][0] / metrics['loss'][1])
    assert losses[1.0] > losses[0.0] + 0.1
    assert losses[2.0] - losses[1.0] == pytest.approx(losses[1.0] - losses[0.0], rel=1e-4)
    with pytest.raises(ValueError, match='stem'):
        tiny_experiment({'train.ocnn.weight': 1.0, 'train.ocnn.pattern': 'stem.*'})
