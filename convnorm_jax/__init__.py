"""convnorm_jax: Convolutional Normalization (NeurIPS 2021, arXiv 2103.00673) in JAX and Flax."""

from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.folding import fold_for_inference
from convnorm_jax.layers.transposed import ConvNormTranspose
from convnorm_jax.version import __version__

__all__ = ['ConvNorm', 'ConvNormTranspose', '__version__', 'fold_for_inference']
