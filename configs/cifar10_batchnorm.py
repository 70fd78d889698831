"""ResNet-18 with convolution and BatchNorm on CIFAR-10: the baseline of `cifar10_convnorm.py`.

    python -m experiments.main --config=configs/cifar10_batchnorm.py

RESULT
"""

from configs import cifar10_convnorm


def get_config():
    """Returns the config."""
    config = cifar10_convnorm.get_config()
    config.model.layer = 'batchnorm'
    return config
