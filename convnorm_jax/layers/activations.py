"""Activations of the published nets."""

import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.errors import UserError

ACTIVATIONS = ('relu', 'shifted_relu')


class ReLU(nn.Module):
    """max(x, 0)."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


class ShiftedReLU(nn.Module):
    """max(x - b, 0) + b = max(x, b), with b learned for each channel, from -1.

    The published nets give b no weight decay; the optimizer knows it by its name, `shift`.
    """

    @nn.compact
    def __call__(self, x):
        shift = self.param('shift', nn.initializers.constant(-1.0), (x.shape[-1],), jnp.float32)
        shift = shift.astype(x.dtype)
        return nn.relu(x - shift) + shift


def make_activation(name):
    """The module class of an activation's name.

    Raises:
      ValueError: a name not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise UserError(f'activation={name!r}: expected one of {ACTIVATIONS}')
    return ReLU if name == 'relu' else ShiftedReLU
