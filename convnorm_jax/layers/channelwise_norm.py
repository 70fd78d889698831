"""The channel-wise convolution and the batch normalization after it, as one operation.

::

    u = channelwise(z, kernel) + bias
    y = (u - mean(u)) / sqrt(var(u) + epsilon) * scale + shift

As one operation, u is never materialized: each pass recomputes it from z, and the residuals of the backward pass are z,
the mean and the variance. The gradients are those of Ioffe and Szegedy (arXiv 1502.03167), section 3. Both of their
sums are complete before anything is written.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from convnorm_jax.layers import channelwise, derivatives
from convnorm_jax.layers.channelwise import over_channels
from convnorm_jax.layers.dtypes import at_least_float32
from convnorm_jax.layers.materialize import materialize
from convnorm_jax.layers.platforms import by_platform


def normalize_by_batch(
    z: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    epsilon: float,
    dtype: DTypeLike,
    circular: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns y, mean(u) and var(u) of the module's equations.

    Args:
      z: [B, H, W, C], float, or with another number of spatial axes.
      kernel: of the channel-wise convolution, [kh, kw, C].
      bias: of the channel-wise convolution, [C].
      scale, shift: of the batch normalization, [C].
      epsilon: added to the variance.
      dtype: of y.
      circular: whether the channel-wise convolution pads periodically.

    Returns:
      y, [B, H, W, C], and the mean and biased variance of u over all axes but the last, [C], float32 at least.
    """
    bias, scale, shift = (a.astype(_wide(z)) for a in (bias, scale, shift))
    rule = _rule(epsilon, jnp.dtype(dtype).name, circular)
    y, mean, var = derivatives.call(rule, z, kernel, bias, scale, shift)
    return y, mean, var


@functools.lru_cache(maxsize=64)
def _rule(epsilon, dtype, circular):
    def ordinary(z, kernel, bias, scale, shift):
        u = channelwise.weighted_sum(z, kernel, circular) + over_channels(bias, z)
        mean = u.mean(_axes(z))
        var = jnp.square(u - over_channels(mean, z)).mean(_axes(z))
        return _normalized(u, mean, var, scale, shift, epsilon).astype(dtype), mean, var

    def accelerated(z, kernel, bias, scale, shift):
        """Reads z in three passes: for the mean, the variance and y."""
        offset = over_channels(bias, z)
        mean = (channelwise.weighted_sum(z, kernel, circular) + offset).mean(_axes(z))
        var = jnp.square(_deviation_after(mean, z, kernel, circular, offset, mean)).mean(_axes(z))
        deviation = _deviation_after(var, z, kernel, circular, offset, mean)
        return _normalized(deviation, jnp.zeros_like(mean), var, scale, shift, epsilon).astype(dtype), mean, var

    @jax.jit  # traced once for all layers of a shape
    def function(*arguments):
        return by_platform(*arguments, cpu=ordinary, accelerator=accelerated)

    @functools.partial(jax.jit, static_argnums=(3,))
    def gradient(arguments, moments, cotangents, wanted):
        given = (*arguments, *moments, *cotangents)
        cpu, accelerator = (functools.partial(form, wanted, epsilon, circular) for form in (_gradients_cpu, _gradients))
        return by_platform(*given, cpu=cpu, accelerator=accelerator)

    return derivatives.Rule(function, gradient, ordinary, kept=(1, 2))


def _wide(x):
    return at_least_float32(x.dtype)


def _axes(x):
    return tuple(range(x.ndim - 1))


def _normalized(u, mean, var, scale, shift, epsilon):
    mean, inverse, scale, shift = (over_channels(a, u) for a in (mean, jax.lax.rsqrt(var + epsilon), scale, shift))
    return (u - mean) * inverse * scale + shift


def _deviation_after(other, z, kernel, circular, offset, mean):
    """Recomputes u - mean from z, and only after `other`: otherwise XLA keeps u of an earlier pass, in float32."""
    z, _ = jax.lax.optimization_barrier((z, other))
    return channelwise.weighted_sum(z, kernel, circular) + (offset - over_channels(mean, z))


def _cotangent_of_u(deviation, cotangent, scale, inverse, by_scale, by_shift, by_mean, by_var):
    """The cotangent of u, from u - mean (`deviation`) and the cotangent of y. The two sums are by_scale, by_shift."""
    count = deviation.size // deviation.shape[-1]
    slope = (2 * by_var - scale * inverse**2 * by_scale) / count
    offset = (by_mean - scale * inverse * by_shift) / count
    factor, slope, offset = (over_channels(a, deviation) for a in (scale * inverse, slope, offset))
    return factor * cotangent + (slope * deviation + offset)


def _sums(deviation, cotangent, inverse):
    """The gradients with respect to scale and shift, float32 at least."""
    return inverse * (cotangent * deviation).sum(_axes(deviation)), cotangent.sum(_axes(deviation))


def _gradients(wanted, epsilon, circular, z, kernel, bias, scale, shift, mean, var, cotangent, by_mean, by_var):
    """For accelerators: four passes, each of which reads arrays in the dtype of z."""
    wide, inverse = _wide(z), jax.lax.rsqrt(var + epsilon)
    offset = over_channels(bias, z)
    cotangent = cotangent.astype(wide)
    first = cotangent[(slice(1),) * z.ndim]  # a slice, because a batch may be empty
    deviation = _deviation_after(first, z, kernel, circular, offset, mean)
    by_scale, by_shift = _sums(deviation, cotangent, inverse)
    deviation = _deviation_after(by_shift, z, kernel, circular, offset, mean)
    of_u = _cotangent_of_u(deviation, cotangent, scale, inverse, by_scale, by_shift, by_mean, by_var)
    # Materialized: otherwise each of its k*k shifted readers would recompute it.
    of_u = jax.lax.optimization_barrier(of_u.astype(z.dtype))
    found = {}
    if 0 in wanted:
        found[0] = channelwise.transpose(of_u, kernel, circular).astype(z.dtype)
    if 1 in wanted:
        found[1] = channelwise.tap_products(z, of_u, kernel.shape[:-1], circular).astype(kernel.dtype)
    found |= {2: by_mean, 3: by_scale, 4: by_shift}
    return tuple(found[i] for i in wanted)


def _gradients_cpu(wanted, epsilon, circular, z, kernel, bias, scale, shift, mean, var, cotangent, by_mean, by_var):
    """The same for XLA:CPU, in an order that keeps the memory low."""
    wide, inverse = _wide(z), jax.lax.rsqrt(var + epsilon)
    cotangent = cotangent.astype(wide)
    z, cotangent = jax.lax.optimization_barrier((z, cotangent))
    z = materialize(z, cotangent[(slice(None), *[slice(1)] * (z.ndim - 1))])
    u = channelwise.weighted_sum(z, kernel, circular) + over_channels(bias, z)
    deviation = u - over_channels(mean, u)
    by_scale, by_shift = _sums(deviation, cotangent, inverse)
    of_u = _cotangent_of_u(deviation, cotangent, scale, inverse, by_scale, by_shift, by_mean, by_var)
    of_u = jax.lax.optimization_barrier(of_u.astype(z.dtype))
    found = {2: by_mean, 3: by_scale, 4: by_shift}
    if 1 in wanted:
        found[1] = channelwise.tap_products(z, of_u, kernel.shape[:-1], circular).astype(kernel.dtype)
    if 0 in wanted:
        by_z = jax.lax.optimization_barrier(channelwise.transpose(of_u, kernel, circular).astype(z.dtype))
        if 1 in wanted:
            # After the kernel's gradient: XLA:CPU could defer that one to the end of the backward pass, and would keep
            # its operands alive until then.
            by_z = materialize(by_z, found[1].ravel()[0])
        found[0] = by_z
    return tuple(found[i] for i in wanted)
