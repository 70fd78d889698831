"""ResNet-18 with ConvNorm on a tenth of CIFAR-10, the same share of every class.

    python -m experiments.main --config=configs/cifar10_data_scarcity.py

Other shares: --config.data.subset_fraction=0.3. The baseline beside it:
--config.model.layer=batchnorm

What to expect: not run to its end by us yet; needs a GPU, or a small net
(--config.model.name=simple_cnn --config.train.epochs=15).
"""

from configs import cifar10_convnorm


def get_config():
    """Returns the config."""
    config = cifar10_convnorm.get_config()
    config.data.subset_fraction = 0.1
    return config
