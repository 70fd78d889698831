"""Batch normalization with PyTorch's statistics."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param
from jax.custom_derivatives import SymbolicZero

from convnorm_jax.layers.once import computed_once


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last (Ioffe and Szegedy, arXiv 1502.03167).

    As `flax.linen.BatchNorm`, but the running variance is the unbiased one, as in
    PyTorch: the published statistics carry over both ways. Statistics are float32
    whatever the input's dtype. Under `jit` over a mesh they are those of the global batch.

    Attributes:
      use_running_average: normalize with the running statistics (here or in the call).
      momentum: share of the old running statistics that an update keeps.
      epsilon: added to the variance.
      use_affine: learn a scale and a bias for every channel.
      dtype: of the output; None keeps the input's.
    """

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_affine: bool = True
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, use_running_average=None, before=None):
        """Normalizes x, or what `before` makes of it.

        Args:
          x: [..., C].
          use_running_average: see above.
          before: (function, arguments): function(x, *arguments) is normalized, [..., C]. In training only x is kept for
            the backward pass, and the function is applied anew there; it must be pure and close over no arrays. One
            of a module, not a lambda of each call, is traced once for all layers of a shape.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        channels = x.shape[-1]
        mean_state = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
        var_state = self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)
        scale, bias = jnp.float32(1), jnp.float32(0)
        if self.use_affine:
            scale = self.param('scale', nn.initializers.ones, (channels,), self.param_dtype)
            bias = self.param('bias', nn.initializers.zeros, (channels,), self.param_dtype)
        function, arguments = before or (_identity, ())
        if use_running_average:
            x = function(x, *arguments)
            y = _normalized(x, mean_state.value, var_state.value, scale, bias, self.epsilon)
        else:
            normalize = _by_batch_statistics if before is None else _recomputed
            y, mean, var = normalize(function, self.epsilon, x, scale, bias, *arguments)
            if not self.is_initializing():
                self._update(mean_state, var_state, mean, var, x.size // channels)
        return y.astype(self.dtype or x.dtype)

    def _update(self, mean_state, var_state, mean, var, count):
        unbiased = var * (count / max(count - 1, 1))
        keep = self.momentum
        mean_state.value = keep * mean_state.value + (1 - keep) * mean
        var_state.value = keep * var_state.value + (1 - keep) * unbiased


def _normalized(x, mean, var, scale, bias, epsilon):
    return (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + epsilon) * scale + bias


def _identity(x):
    return x


# `jit`, here and below: JAX traces and lowers it once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_batch_statistics(function, epsilon, x, scale, bias, *arguments):
    """function(x, *arguments) normalized, float32, and its mean and variance over all axes but the last."""
    x = function(x, *arguments).astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - mean).mean(axes)
    return _normalized(x, mean, var, scale, bias, epsilon), mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(function, epsilon, x, scale, bias, *arguments):
    """`_by_batch_statistics`, of which no array of the size of its output is kept for the backward pass but x.

    As `jax.checkpoint` has it, whose barriers XLA:CPU does not heed, but for the statistics, which are kept. Reverse
    mode only.
    """
    return _by_batch_statistics(function, epsilon, x, scale, bias, *arguments)


def _recomputed_forward(function, epsilon, *given):
    wanted = any(argument.perturbed for argument in given[3:])
    x, scale, bias, *arguments = (argument.value for argument in given)
    y, mean, var = _by_batch_statistics(function, epsilon, x, scale, bias, *arguments)
    # What is wanted is told by the structure of what is kept, for it must be known when the program is made.
    return (y, mean, var), (x, scale, mean, var, arguments, () if wanted else None)


def _recomputed_backward(function, epsilon, saved, cotangents):
    *arrays, wanted = saved
    cotangents = [jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c for c in cotangents]
    return _gradients(*arrays, cotangents, function, epsilon, wanted is not None)


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _gradients(x, scale, mean, var, arguments, cotangents, function, epsilon, wanted):
    """By x, scale, bias and, if they are wanted, the arguments of the function, else None for them."""
    x, (cotangent, by_mean, by_var) = jax.lax.optimization_barrier((x, cotangents))
    x = computed_once(x, cotangent[(slice(None), *[slice(1)] * (x.ndim - 1))])
    y, back = jax.vjp(function, x, *arguments)
    axes = tuple(range(y.ndim - 1))
    count = y.size // y.shape[-1]
    deviation, inverse = y.astype(jnp.float32) - mean, jax.lax.rsqrt(var + epsilon)
    # Equations of Ioffe and Szegedy, section 3, with both of their sums taken before anything is written.
    by_bias, by_scale = cotangent.sum(axes), inverse * (cotangent * deviation).sum(axes)
    slope = (2 * by_var - scale * inverse**2 * by_scale) / count
    by_y = scale * inverse * cotangent + (slope * deviation + (by_mean - scale * inverse * by_bias) / count)
    by_x, *by_arguments = back(by_y.astype(y.dtype))
    if wanted:
        # Only after them: XLA:CPU may put them off to the end of the backward pass, and keep what they are made of.
        by_x = computed_once(by_x, sum(a.ravel()[0] for a in by_arguments))
    by_arguments = by_arguments if wanted else [None] * len(arguments)
    return by_x, _like(by_scale, scale), _like(by_bias, scale), *by_arguments


def _like(gradient, scale):
    """A gradient for each channel, float32, as one by a scale of any dtype that may be a single number."""
    return (gradient if scale.ndim else gradient.sum()).astype(scale.dtype)


_recomputed.defvjp(_recomputed_forward, _recomputed_backward, symbolic_zeros=True)
