"""The published protocol, word for word: ResNet-18 with ConvNorm on all of CIFAR-10.

    python -m experiments.main --config=configs/cifar10_published.py

The validation set is the last tenth of each class *of the training set, still trained
on*, and the best checkpoint is chosen on it: a biased choice, kept for comparison with
the published figures only. SGD 0.1 with momentum 0.9 and weight decay 1e-4, batch 128,
120 epochs, learning rate x 0.1 after 40 and 80.

What to expect: not run to its end by us yet; needs a GPU.
"""

from convnorm_jax.configs import cifar10_convnorm


def get_config():
    """Returns the config."""
    config = cifar10_convnorm.get_config()
    config.data.validation = 'published'
    return config
