"""TRADES adversarial training of SimpleCNN with ConvNorm on the embedded digits.

    python -m experiments.main --config=configs/digits_trades.py

The radius is 32/255, five steps of 10/255. PGD training instead: --config.train.algorithm=pgd

What to expect: not run to the end yet.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import digits_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = digits_convnorm.get_config()
    config.train.algorithm = 'trades'
    config.train.adversarial.epsilon = 32.0
    config.train.adversarial.step_size = 10.0
    config.train.adversarial.steps = 5
    config.attack.epsilon = 32.0
    config.attack.step_size = 8.0
    config.attack.pgd_steps = 20
    return config
