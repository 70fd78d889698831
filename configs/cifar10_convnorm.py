"""ResNet-18 with ConvNorm on CIFAR-10, a tenth of the training set held out for validation.

    python -m experiments.main --config=configs/cifar10_convnorm.py

The published training (SGD 0.1, 120 epochs, batch 128, crop and flip), but the
validation set is not trained on; `cifar10_published.py` is the published way. A small
net for a CPU: --config.model.name=simple_cnn --config.train.epochs=15

RESULT
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.model.name = 'resnet18'
    config.model.layer = 'convnorm'
    config.data.name = 'cifar10'
    return config
