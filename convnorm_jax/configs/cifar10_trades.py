"""TRADES adversarial training of ResNet-18 with ConvNorm on CIFAR-10.

    python -m experiments.main --config=configs/cifar10_trades.py

beta 6, ten steps of 2/255 (Zhang et al. 2019); 76 epochs, learning rate x 0.1 at three quarters of
them, weight decay 2e-4. PGD training instead: --config.train.algorithm=pgd

What to expect: not run to the end yet; needs a GPU, or a small net
(--config.model.name=simple_cnn --config.train.epochs=5).
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_convnorm.get_config()
    config.train.algorithm = 'trades'
    config.train.epochs = 76.0
    config.optimizer.weight_decay = 2e-4
    config.schedule.milestones = (0.75,)
    config.attack.pgd_steps = 20
    config.eval.checkpoint = 'latest'  # as published
    return config
