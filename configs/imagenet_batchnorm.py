"""The config of this name in convnorm_jax/configs."""

from convnorm_jax.configs.imagenet_batchnorm import get_config

__all__ = ['get_config']
