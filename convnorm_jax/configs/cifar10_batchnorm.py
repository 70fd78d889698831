"""ResNet-18 with convolution and BatchNorm on CIFAR-10: the baseline of `cifar10_convnorm.py`.

    python -m experiments.main --config=configs/cifar10_batchnorm.py

What to expect: SimpleCNN for 15 epochs with --config.schedule.kind=cosine ends at 72.2 % test
accuracy on CIFAR-10 (JPEG q75), seed 0. ResNet-18 was run for 100 steps only (see the README).
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_convnorm.get_config()
    config.model.layer = 'batchnorm'
    return config
