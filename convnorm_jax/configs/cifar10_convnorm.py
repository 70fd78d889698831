"""ResNet-18 with ConvNorm on CIFAR-10, a tenth of the training set held out for validation.

    python -m experiments.main --config=configs/cifar10_convnorm.py

The published training (SGD 0.1, 120 epochs, batch 128, crop and flip), but the
validation set is not trained on; `cifar10_published.py` is the published protocol. A small
net for a CPU: --config.model.name=simple_cnn --config.train.epochs=15

What to expect: the small net, with --config.schedule.kind=cosine, ends at 68.0 % test
accuracy on CIFAR-10 (JPEG q75), seed 0. ResNet-18 was run for 100 steps only (see the README).
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import default


def get_config() -> ConfigDict:
    """The config."""
    config = default.get_config()
    config.model.name = 'resnet18'
    config.model.layer = 'convnorm'
    config.data.name = 'cifar10'
    return config
