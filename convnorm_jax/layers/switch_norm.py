"""Switchable normalization: instance, layer and batch statistics, mixed by learned weights."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers.channelwise import over_channels
from convnorm_jax.layers.dtypes import at_least_float32


class SwitchNorm(nn.Module):
    r"""Switchable normalization of images.

    .. math::
        y = \frac{x - \sum_j w_j\, \mathrm{mean}_j}{\sqrt{\sum_j w'_j\, \mathrm{var}_j + \epsilon}}
            \cdot scale + bias

    The three statistics j are those of each channel of each image (instance), of each image (layer) and of each channel
    over the batch. The weights are w = softmax(`mean_weight`) and w' = softmax(`var_weight`), in this order. At
    inference the running mean and variance, in `batch_stats`, replace those of the batch.

    The values are those of the authors' SwitchNorm2d with a moving average: the instance variance is unbiased, the
    other two are computed from it and the spread of the instance means, and the running variance starts at zero. For
    images of one pixel, where that code gives NaN, the instance variance is 0. Statistics are float32 at least. Under
    `jit` over a mesh the batch is the global batch.

    Source: Luo et al., `arXiv 1806.10779 <https://arxiv.org/abs/1806.10779>`__.

    Attributes:
      use_running_average: True normalizes with the running statistics. Give it here or in the call.
      momentum: share of the old running statistics that an update keeps.
      epsilon: added to the variance.
      dtype: of the output; None keeps the dtype of the input.
      param_dtype: of the parameters.
    """

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Returns x normalized, of the same shape.

        Args:
          x: [B, ..., C] with at least one axis in between, float.
          use_running_average: True at inference, False in training; None takes the attribute.

        Raises:
          ValueError: x of fewer than 3 axes.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        if x.ndim < 3:
            raise UserError(f'x.shape={x.shape}: expected [batch, height, width, channels]')
        channels = x.shape[-1]
        wide, state_dtype = at_least_float32(x.dtype), at_least_float32(self.param_dtype)
        mean_state = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), state_dtype)
        var_state = self.variable('batch_stats', 'var', jnp.zeros, (channels,), state_dtype)
        y = x.astype(wide).reshape(x.shape[0], -1, channels)
        mean, var = _instance_moments(y)
        batch = tuple(jnp.asarray(state.value, wide).reshape(1, 1, -1) for state in (mean_state, var_state))
        if not use_running_average:
            batch = _pooled_moments(mean, var, axis=0)
            if not self.is_initializing():
                for state, new in zip((mean_state, var_state), batch):
                    new = new.reshape(channels).astype(state_dtype)
                    state.value = self.momentum * state.value + (1 - self.momentum) * new
        means, variances = zip((mean, var), _pooled_moments(mean, var, axis=-1), batch)
        mean, var = self._mixed('mean_weight', means), self._mixed('var_weight', variances)
        scale = self.param('scale', nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, (channels,), self.param_dtype)
        scale, bias = (over_channels(a.astype(wide), y) for a in (scale, bias))
        y = (y - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(x.shape).astype(self.dtype or x.dtype)

    def _mixed(self, name, statistics):
        """The sum of the three statistics, weighted by the softmax of a learned vector."""
        weight = self.param(name, nn.initializers.ones, (3,), self.param_dtype)
        weight = jax.nn.softmax(weight.astype(statistics[0].dtype))
        return sum(w * s for w, s in zip(weight, statistics))


def _instance_moments(x):
    """The mean and the unbiased variance over the pixels of [B, N, C], both [B, 1, C]."""
    mean = x.mean(1, keepdims=True)
    return mean, jnp.square(x - mean).sum(1, keepdims=True) / max(x.shape[1] - 1, 1)


def _pooled_moments(mean, var, axis):
    """The moments of a union of equal parts, from those of the parts along an axis.

    This is E[var + mean^2] - E[mean]^2, without the cancellation for means far from zero.
    """
    pooled = mean.mean(axis, keepdims=True)
    return pooled, (var + jnp.square(mean - pooled)).mean(axis, keepdims=True)
