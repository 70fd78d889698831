"""ConvNorm for Flax NNX: the layers, and `convnormalize`, which puts them into a model."""

from convnorm_jax.nnx.conversion import convnormalize
from convnorm_jax.nnx.layers import ConvNorm, ConvNormTranspose

__all__ = ['ConvNorm', 'ConvNormTranspose', 'convnormalize']
