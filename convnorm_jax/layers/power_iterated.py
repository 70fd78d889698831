"""The norm of a kernel by power iteration, with its singular vectors as a module's state."""

import functools
import numbers

import jax
import jax.numpy as jnp

from convnorm_jax.errors import UserError
from convnorm_jax.layers import orthogonal


def check_iterations(module):
    """Raises ValueError unless a module's numbers of iterations can be."""
    for name, least in (('iterations', 1), ('init_iterations', 0)):
        if not isinstance(getattr(module, name), numbers.Integral) or getattr(module, name) < least:
            raise UserError(f'{name}={getattr(module, name)!r}: expected an int of {least} or more')


def power_iterated_norm(module, operator_of, kernel, v_shape, use_running_average):
    """Norm of the kernel, float32 scalar; moves the module's u and v in training.

    Args:
      module: has iterations, init_iterations, eps; keeps u and v.
      operator_of: (kernel, v) -> the linear map of the kernel on arrays of v's shape.
    """
    u_state, v_state = _singular_vectors(module, operator_of, kernel, v_shape)
    u, v = u_state.value, v_state.value
    if not use_running_average:
        constant = operator_of(jax.lax.stop_gradient(kernel), v)
        u, v = orthogonal.power_iteration(constant, u, v, module.iterations, module.eps)
        if not module.is_initializing():
            u_state.value, v_state.value = u, v
    return orthogonal.norm_estimate(operator_of(kernel, v), u, v)


def _singular_vectors(module, operator_of, kernel, v_shape):
    """The variables u and v; made from the kernel and the 'params' random stream."""

    @functools.cache
    def initial():
        # Without that stream, as when statistics are made for given parameters, a fixed key.
        key = module.make_rng('params') if module.has_rng('params') else jax.random.key(0)
        u_key, v_key = jax.random.split(key)
        v = orthogonal.normalized(jax.random.normal(v_key, v_shape, jnp.float32), module.eps)
        operator = operator_of(jax.lax.stop_gradient(kernel), v)
        u = jax.random.normal(u_key, jax.eval_shape(operator, v).shape, jnp.float32)
        u = orthogonal.normalized(u, module.eps)
        return orthogonal.power_iteration(operator, u, v, module.init_iterations, module.eps)

    u = module.variable('batch_stats', 'u', lambda: initial()[0])
    v = module.variable('batch_stats', 'v', lambda: initial()[1])
    return u, v
