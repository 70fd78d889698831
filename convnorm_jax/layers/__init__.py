"""The layers: ConvNorm, and the normalizations and reparametrizations that it is compared with."""

from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.conditional_norm import ConditionalBatchNorm
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.dense import SpectralNormDense
from convnorm_jax.layers.factory import (
    DENSE_LAYERS,
    LAYERS,
    ConvThenNorm,
    make_dense,
    make_layer,
    make_transposed_layer,
)
from convnorm_jax.layers.folding import fold_for_inference
from convnorm_jax.layers.switch_norm import SwitchNorm
from convnorm_jax.layers.transposed import ConvNormTranspose, ConvTranspose

__all__ = [
    'DENSE_LAYERS',
    'LAYERS',
    'BatchNorm',
    'ConditionalBatchNorm',
    'ConvNorm',
    'ConvNormTranspose',
    'ConvThenNorm',
    'ConvTranspose',
    'SpectralNormDense',
    'SwitchNorm',
    'fold_for_inference',
    'make_dense',
    'make_layer',
    'make_transposed_layer',
]
