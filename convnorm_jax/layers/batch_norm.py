"""Batch normalization with PyTorch's statistics."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param
from jax.typing import DTypeLike

from convnorm_jax.layers.channelwise import add_bias, channelwise_convolution, over_channels
from convnorm_jax.layers.channelwise_norm import normalize_by_batch
from convnorm_jax.layers.dtypes import at_least_float32


class BatchNorm(nn.Module):
    r"""Batch normalization over all axes but the last.

    .. math::
        y = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}} \cdot scale + bias

    It differs from `flax.linen.BatchNorm` in the running variance, which is the unbiased one, as in PyTorch: published
    statistics can be imported and exported. The running statistics are float32 whatever the dtype of the input
    (float64 with `param_dtype=jnp.float64`), and an update never changes their dtype. Under `jit` over a mesh they are
    those of the global batch.

    Source: Ioffe and Szegedy, `arXiv 1502.03167 <https://arxiv.org/abs/1502.03167>`__.

    Attributes:
      use_running_average: True normalizes with the running statistics. Give it here or in the call.
      momentum: share of the old running statistics that an update keeps.
      epsilon: added to the variance.
      use_affine: whether to learn a scale and a bias for every channel.
      dtype: of the output; None keeps the dtype of the input.
      param_dtype: of the parameters.
    """

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_affine: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        channelwise: tuple[jax.Array, jax.Array] | None = None,
        circular: bool = False,
    ) -> jax.Array:
        """Returns x normalized, of the same shape.

        Args:
          x: [..., C], float. Statistics and arithmetic are float32 at least.
          use_running_average: True at inference, False in training; None takes the attribute.
          channelwise: kernel [kh, kw, C] and bias [C] of a channel-wise convolution that is applied to x, [B, H, W, C],
            first, as in `ConvNorm`. Fused with the normalization, its output is not materialized.
          circular: whether that convolution pads periodically.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        channels, state_dtype = x.shape[-1], at_least_float32(self.param_dtype)
        mean_state = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), state_dtype)
        var_state = self.variable('batch_stats', 'var', jnp.ones, (channels,), state_dtype)
        scale = bias = None
        if self.use_affine:
            scale = self.param('scale', nn.initializers.ones, (channels,), self.param_dtype)
            bias = self.param('bias', nn.initializers.zeros, (channels,), self.param_dtype)
        y, changed = batch_norm(
            x,
            {'mean': mean_state.value, 'var': var_state.value},
            scale,
            bias,
            use_running_average=use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            channelwise=channelwise,
            circular=circular,
        )
        if changed and not self.is_initializing():
            mean_state.value, var_state.value = changed['mean'], changed['var']
        return y


def batch_norm(
    x: jax.Array,
    state: Mapping[str, jax.Array],
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    use_running_average: bool,
    momentum: float,
    epsilon: float,
    dtype: DTypeLike | None = None,
    channelwise: tuple[jax.Array, jax.Array] | None = None,
    circular: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Batch normalization as a pure function; see `BatchNorm`.

    Args:
      x: [..., C], float.
      state: running 'mean' and 'var', [C].
      scale, bias: [C]; None stands for 1 and 0.
      use_running_average, momentum, epsilon, dtype, channelwise, circular: see `BatchNorm`.

    Returns:
      y, [..., C], and the new state; the state is empty with `use_running_average`.
    """
    channels, wide = x.shape[-1], at_least_float32(x.dtype)
    scale = jnp.ones(channels, wide) if scale is None else scale.astype(wide)
    bias = jnp.zeros(channels, wide) if bias is None else bias.astype(wide)
    dtype = dtype or x.dtype
    if use_running_average:
        if channelwise is not None:
            kernel, offset = channelwise
            x = add_bias(channelwise_convolution(x, kernel, circular), offset)
        mean, var = (jnp.asarray(state[name], wide) for name in ('mean', 'var'))
        return _normalized(x.astype(wide), mean, var, scale, bias, epsilon).astype(dtype), {}
    if channelwise is not None:
        y, mean, var = normalize_by_batch(x, *channelwise, scale, bias, epsilon, dtype, circular)
    else:
        y, mean, var = _by_batch_statistics(x.astype(wide), scale, bias, epsilon)
    count = x.size // channels
    unbiased = var * (count / max(count - 1, 1))
    updated = lambda old, new: momentum * old + (1 - momentum) * new.astype(old.dtype)
    return y.astype(dtype), {'mean': updated(state['mean'], mean), 'var': updated(state['var'], unbiased)}


def _normalized(x, mean, var, scale, bias, epsilon):
    inverse = jax.lax.rsqrt(var + epsilon)
    mean, inverse, scale, bias = (over_channels(a, x) for a in (mean, inverse, scale, bias))
    return (x - mean) * inverse * scale + bias


def _by_batch_statistics(x, scale, bias, epsilon):
    """x normalized, and its mean and variance over all axes but the last."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - over_channels(mean, x)).mean(axes)
    return _normalized(x, mean, var, scale, bias, epsilon), mean, var
