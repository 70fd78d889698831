"""SNGAN on CIFAR-10 with ConvNorm in the discriminator.

    python -m experiments.main --config=configs/cifar10_gan_convnorm.py

The ResNets of the SNGAN paper (arXiv 1802.05957), batch 64, hinge loss, five discriminator
updates for each of the generator, Adam 2e-4 with betas 0 and 0.9, decaying linearly over
100,000 generator steps; FID on 50,000 images by --config.eval.features=inception,classifier. The
paper's grid of Adam settings (learning rate, betas, n_dis) is --grid=gan.setting=A,B,C,D,E,F of
convnorm_jax.cli.sweep.

What to expect: not run to the end yet; needs a GPU. (--config.model.width=16
--config.gan.generator_width=16 --config.train.steps=2000 for a CPU.)
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import default


def get_config() -> ConfigDict:
    """The config."""
    config = default.get_config()
    config.train.algorithm = 'gan'
    config.train.steps = 100_000
    config.train.ema_decay = 0.999
    config.data.name = 'cifar10'
    config.data.batch_size = 64
    config.data.augmentation = 'none'
    config.data.validation_fraction = 0.0
    config.model.name = 'sngan'
    config.model.layer = 'convnorm'
    config.gan.passes = 5
    config.optimizer.name = 'adam'
    config.optimizer.learning_rate = 2e-4
    config.optimizer.momentum = 0.0
    config.optimizer.beta2 = 0.9
    config.optimizer.weight_decay = 0.0
    config.schedule.kind = 'linear'
    config.eval.checkpoint = 'latest'
    config.eval.samples = 50_000
    return config
