"""ResNet-18 with convolution and BatchNorm on ImageNet: the baseline of `imagenet_convnorm.py`.

    python -m experiments.main --config=configs/imagenet_batchnorm.py

What to expect: not run. torchvision reports about 69.8 % on val for this training.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import imagenet_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = imagenet_convnorm.get_config()
    config.model.layer = 'batchnorm'
    return config
