"""ResNet-18 with ConvNorm on CIFAR-100: the published training, 150 epochs.

    python -m experiments.main --config=configs/cifar100_convnorm.py

What to expect: not run to its end by us yet; needs a GPU.
"""

from convnorm_jax.configs import cifar10_convnorm


def get_config():
    """Returns the config."""
    config = cifar10_convnorm.get_config()
    config.data.name = 'cifar100'
    config.train.epochs = 150.0
    config.schedule.milestones = (60 / 150, 120 / 150)
    return config
