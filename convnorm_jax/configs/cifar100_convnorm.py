"""ResNet-18 with ConvNorm on CIFAR-100: the published training, 150 epochs.

    python -m experiments.main --config=configs/cifar100_convnorm.py

What to expect: not run to the end yet; needs a GPU.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_convnorm.get_config()
    config.data.name = 'cifar100'
    config.train.epochs = 150.0
    config.schedule.milestones = (60 / 150, 120 / 150)
    return config
