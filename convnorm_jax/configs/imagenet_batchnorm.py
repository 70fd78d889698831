"""ResNet-18 with convolution and BatchNorm on ImageNet: the baseline of `imagenet_convnorm.py`.

    python -m experiments.main --config=configs/imagenet_batchnorm.py

What to expect: not run by us. Elsewhere (torchvision) this training gives about 69.8 % of val.
"""

from convnorm_jax.configs import imagenet_convnorm


def get_config():
    """Returns the config."""
    config = imagenet_convnorm.get_config()
    config.model.layer = 'batchnorm'
    return config
