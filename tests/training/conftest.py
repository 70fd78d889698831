"""A run that takes a second or two: digits, a net of one convolution, five steps an epoch."""

import jax
import pytest

from convnorm_jax.training import setup


@pytest.fixture(scope='session')
def tiny_config():
    """Function of overrides {'section.key': value} -> config."""
    from convnorm_jax.configs import digits_convnorm

    def make(overrides=()):
        config = digits_convnorm.get_config()
        config.model.width, config.model.depth = 4, (1,)
        config.data.subset_fraction = 0.25
        config.data.batch_size = 64
        config.train.epochs = 2.0
        config.checkpoint.every_steps = 3
        config.update_from_flattened_dict(dict(overrides))
        return config

    return make


@pytest.fixture(scope='session')
def tiny_experiment(tiny_config):
    """Function of overrides -> `Experiment` on one device."""
    return lambda overrides=(): setup.build(tiny_config(overrides), jax.devices()[:1])
