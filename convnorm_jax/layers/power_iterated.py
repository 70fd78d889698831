"""The norm of a kernel by power iteration, with the singular vectors in a module's state."""

import functools
import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.errors import UserError
from convnorm_jax.layers import spectral_norm


def check_iterations(module: nn.Module) -> None:
    """Raises ValueError unless a module's `iterations` is 1 or more and its `init_iterations` 0 or more."""
    for name, least in (('iterations', 1), ('init_iterations', 0)):
        if not isinstance(getattr(module, name), numbers.Integral) or getattr(module, name) < least:
            raise UserError(f'{name}={getattr(module, name)!r}: expected an int of {least} or more')


def power_iterated_norm(
    module: nn.Module,
    operator_of: Callable[[jax.Array, jax.Array], Callable[[jax.Array], jax.Array]],
    kernel: jax.Array,
    v_shape: Sequence[int],
    use_running_average: bool,
) -> jax.Array:
    """Returns the operator norm of a kernel, float32 scalar, and in training updates the module's u and v.

    Args:
      module: with attributes iterations, init_iterations and eps. Its collection `batch_stats` holds u and v.
      operator_of: `(kernel, v)` -> the kernel as a linear map of arrays of v's shape.
      kernel: any float dtype.
      v_shape: of the right singular vector v.
      use_running_average: True takes u and v as they are.
    """
    u_state, v_state = _singular_vectors(module, operator_of, kernel, v_shape)
    u, v = u_state.value, v_state.value
    if not use_running_average:
        constant = operator_of(jax.lax.stop_gradient(kernel), v)
        u, v = spectral_norm.power_iteration(constant, u, v, module.iterations, module.eps)
        if not module.is_initializing():
            u_state.value, v_state.value = u, v
    return spectral_norm.norm_estimate(operator_of(kernel, v), u, v)


def _singular_vectors(module, operator_of, kernel, v_shape):
    """The variables u and v, initialized from the kernel and the random stream 'params'."""

    @functools.cache
    def initial():
        # A fixed key where the stream is missing, as when statistics are made for given parameters.
        key = module.make_rng('params') if module.has_rng('params') else jax.random.key(0)
        u_key, v_key = jax.random.split(key)
        v = spectral_norm.normalized(jax.random.normal(v_key, v_shape, jnp.float32), module.eps)
        operator = operator_of(jax.lax.stop_gradient(kernel), v)
        u = jax.random.normal(u_key, jax.eval_shape(operator, v).shape, jnp.float32)
        u = spectral_norm.normalized(u, module.eps)
        return spectral_norm.power_iteration(operator, u, v, module.init_iterations, module.eps)

    u = module.variable('batch_stats', 'u', lambda: initial()[0])
    v = module.variable('batch_stats', 'v', lambda: initial()[1])
    return u, v
