"""Spectral layers: ConvNorm and what it is compared with."""

from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.factory import LAYERS, ConvThenNorm, make_layer
from convnorm_jax.layers.switch_norm import SwitchNorm

__all__ = ['LAYERS', 'BatchNorm', 'ConvNorm', 'ConvThenNorm', 'SwitchNorm', 'make_layer']
