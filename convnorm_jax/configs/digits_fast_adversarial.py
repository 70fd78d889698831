"""Fast adversarial training of SimpleCNN with ConvNorm on the embedded digits.

    python -m experiments.main --config=configs/digits_fast_adversarial.py

The radius is 32/255, the step of the training attack 40/255.

What to expect: not run to the end yet.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import digits_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = digits_convnorm.get_config()
    config.train.algorithm = 'fast'
    config.train.adversarial.epsilon = 32.0
    config.train.adversarial.step_size = 40.0
    config.attack.epsilon = 32.0
    config.attack.step_size = 8.0
    config.attack.pgd_steps = 20
    return config
