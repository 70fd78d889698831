"""Initial values of the published nets: PyTorch's defaults, uniform in +-1/sqrt(fan_in)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

# A function (key, shape, dtype) -> array.
Initializer = Callable[..., jax.Array]

# The variance of a uniform distribution on +-1/sqrt(fan_in) is 1/(3 fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

# For a transposed convolution PyTorch counts the fan of the output channels.
torch_transposed_kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_out', 'uniform')


def torch_bias_init(fan_in: int) -> Initializer:
    """Returns the initializer of a bias of any shape, uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
