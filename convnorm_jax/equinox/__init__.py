"""ConvNorm for Equinox (an extra: `pip install 'convnorm_jax[equinox]'`): the layers, and `convnormalize`."""

# The layers first: they say what to install where Equinox is missing.
from convnorm_jax.equinox.layers import ConvNorm, ConvNormTranspose  # isort: skip
from convnorm_jax.equinox.conversion import convnormalize

__all__ = ['ConvNorm', 'ConvNormTranspose', 'convnormalize']
