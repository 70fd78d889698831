"""The names of ConvNorm's methods, whichever this version has."""

try:
    from convnorm_jax.layers import METHODS
except ImportError:
    from convnorm_jax.layers.method import METHODS

__all__ = ['METHODS']
