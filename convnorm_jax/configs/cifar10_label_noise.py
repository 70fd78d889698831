"""ResNet-18 with ConvNorm on CIFAR-10 with 40 % symmetric label noise.

    python -m experiments.main --config=configs/cifar10_label_noise.py

Other noise: --config.data.label_noise.rate=0.6, --config.data.label_noise.kind=asymmetric.
The baseline: --config.model.layer=batchnorm. A symmetric rate r draws from all
classes, so that 0.9 r of the labels are wrong. The validation labels are noisy too, because
they come from the same annotators; the test labels are not.

What to expect: ResNet-18 has not been run (it needs a GPU). SimpleCNN, 500 steps, learning rate
0.02, cosine, CIFAR-10 (JPEG q75), seed 0: 48.7 % test accuracy (BatchNorm 43.4).
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_convnorm.get_config()
    config.data.label_noise.kind = 'symmetric'
    config.data.label_noise.rate = 0.4
    return config
