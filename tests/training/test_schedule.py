"""Durations in steps, and learning rates at the steps that matter."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_published, cifar100_convnorm
from convnorm_jax.training.schedule import make_schedule, to_steps


@pytest.mark.parametrize(
    ('get_config', 'epochs', 'drops'),
    [(cifar10_published.get_config, 120, (40, 80)), (cifar100_convnorm.get_config, 150, (60, 120))],
)
@pytest.mark.parametrize('per_epoch', [352, 390, 351])
def test_published_drops(get_config, epochs, drops, per_epoch):
    config = get_config()
    total = to_steps(config.train, steps_per_epoch=per_epoch, batch_size=128)
    assert total == epochs * per_epoch
    section = config.schedule
    schedule = make_schedule(section.kind, 0.1, total, milestones=section.milestones, factor=section.factor)
    rates = np.array([float(schedule(step)) for drop in drops for step in (drop * per_epoch - 1, drop * per_epoch)])
    np.testing.assert_allclose(rates, [0.1, 0.01, 0.01, 0.001], rtol=1e-5)
    np.testing.assert_allclose([float(schedule(0)), float(schedule(total - 1))], [0.1, 0.001], rtol=1e-5)


def test_cosine():
    schedule = make_schedule('cosine', 0.2, 100)
    found = [float(schedule(step)) for step in (0, 25, 50, 100)]
    np.testing.assert_allclose(found, [0.2, 0.1 * (1 + np.cos(np.pi / 4)), 0.1, 0], atol=1e-7)


def test_constant():
    schedule = make_schedule('constant', 0.2, 100)
    assert {float(schedule(step)) for step in (0, 50, 1000)} == {0.2}


@pytest.mark.parametrize('kind', ['step', 'cosine', 'constant'])
def test_warmup_rises_linearly_and_is_part_of_the_run(kind):
    schedule = make_schedule(kind, 0.4, 100, milestones=(0.5,), warmup_steps=20)
    np.testing.assert_allclose([float(schedule(step)) for step in (0, 5, 10, 20)], [0, 0.1, 0.2, 0.4], atol=1e-6)
    ends = {'step': 0.04, 'cosine': 0.0, 'constant': 0.4}
    np.testing.assert_allclose(float(schedule(100)), ends[kind], atol=1e-6)
    if kind == 'step':  # a milestone is a share of the run, not of what follows the warmup
        np.testing.assert_allclose([float(schedule(49)), float(schedule(50))], [0.4, 0.04], rtol=1e-5)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"schedule\.kind='polynomial': expected one of .*cosine"):
        make_schedule('polynomial', 0.1, 100)


@pytest.mark.parametrize(
    ('section', 'expected'),
    [
        ({'epochs': 3.0}, 30),
        ({'epochs': 2.5}, 25),
        ({'epochs': 0.01}, 1),
        ({'examples': 640}, 20),
        ({'examples': 1}, 1),
        ({'steps': 7}, 7),
        ({'steps': 7, 'examples': 640, 'epochs': 3}, 7),
        ({'steps': 0, 'examples': 640, 'epochs': 3}, 20),
        ({'steps': None, 'examples': None, 'epochs': 3}, 30),
        ({'steps': 0, 'examples': 0, 'epochs': 0}, 0),
        ({}, 0),
    ],
)
@pytest.mark.parametrize('kind', [dict, ConfigDict])
def test_durations(section, expected, kind):
    assert to_steps(kind(section), steps_per_epoch=10, batch_size=32) == expected
    prefixed = kind({f'warmup_{key}': value for key, value in section.items()})
    assert to_steps(prefixed, steps_per_epoch=10, batch_size=32, prefix='warmup_') == expected
