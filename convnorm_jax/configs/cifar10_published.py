"""The published protocol, unchanged: ResNet-18 with ConvNorm on all of CIFAR-10.

    python -m experiments.main --config=configs/cifar10_published.py

The validation set is the last tenth of each class *of the training set, still trained
on*, and the best checkpoint is chosen on it. That choice is biased; use it only to compare with
the published figures. SGD 0.1 with momentum 0.9 and weight decay 1e-4, batch 128,
120 epochs, learning rate x 0.1 after 40 and 80.

What to expect: not run to the end yet; needs a GPU.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_convnorm.get_config()
    config.data.validation = 'published'
    return config
