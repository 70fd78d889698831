"""SNGAN on CIFAR-10 (arXiv 1802.05957): spectral normalization in the discriminator.

    python -m experiments.main --config=configs/cifar10_gan_sn.py

All else as in cifar10_gan_convnorm.py. Published, PyTorch's mimicry: FID 16.77, Inception Score 7.97.
Not run to the end yet.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_gan_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_gan_convnorm.get_config()
    config.model.layer = 'spectralnorm'
    return config
