"""The config of this name in convnorm_jax/configs."""

from convnorm_jax.configs.cifar10_trades import get_config

__all__ = ['get_config']
