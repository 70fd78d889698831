"""Free adversarial training of SimpleCNN with ConvNorm on the embedded digits: a minute on a laptop.

    python -m experiments.main --config=configs/digits_free_adversarial.py

The radius, 32/255 in training and in the attacks, is larger than for CIFAR-10, because digits are easy.

What to expect: about half of the test digits survive AutoAttack at 32/255 (see the README).
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import digits_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = digits_convnorm.get_config()
    config.train.algorithm = 'free'
    config.train.epochs = 20.0
    config.train.adversarial.epsilon = 32.0
    config.train.adversarial.step_size = 32.0
    config.attack.epsilon = 32.0
    config.attack.step_size = 8.0
    config.attack.pgd_steps = 20
    return config
