"""ResNet-18 with ConvNorm on a tenth of CIFAR-10, the same share of every class.

    python -m experiments.main --config=configs/cifar10_data_scarcity.py

Other shares: --config.data.subset_fraction=0.3. The baseline:
--config.model.layer=batchnorm

What to expect: ResNet-18 has not been run (it needs a GPU). SimpleCNN, 500 steps, learning rate
0.02, cosine, CIFAR-10 (JPEG q75), seed 0: 59.0 % test accuracy (BatchNorm 56.7).
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_convnorm.get_config()
    config.data.subset_fraction = 0.1
    return config
