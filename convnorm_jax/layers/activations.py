"""Activations of the published nets."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.errors import UserError

ACTIVATIONS = ('relu', 'shifted_relu')


class ReLU(nn.Module):
    """The rectifier max(x, 0), as a module."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns max(x, 0), of the shape and dtype of x."""
        return nn.relu(x)


class ShiftedReLU(nn.Module):
    """The rectifier max(x - b, 0) + b with a threshold b that is learned for each channel and starts at -1.

    The published nets apply no weight decay to b. The optimizer recognizes it by its name, `shift`.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns max(x - b, 0) + b, of the shape and dtype of x, [..., C]."""
        shift = self.param('shift', nn.initializers.constant(-1.0), (x.shape[-1],), jnp.float32)
        shift = shift.astype(x.dtype)
        return nn.relu(x - shift) + shift


def make_activation(name: str) -> type[nn.Module]:
    """Returns the module class of an activation.

    Args:
      name: one of `ACTIVATIONS`.

    Raises:
      ValueError: another name.
    """
    if name not in ACTIVATIONS:
        raise UserError(f'activation={name!r}: expected one of {ACTIVATIONS}')
    return ReLU if name == 'relu' else ShiftedReLU
