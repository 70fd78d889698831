"""Switchable normalization: instance, layer and batch statistics, mixed by learned weights."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param

from convnorm_jax.errors import UserError
from convnorm_jax.layers.channelwise import over_channels
from convnorm_jax.layers.dtypes import at_least_float32


class SwitchNorm(nn.Module):
    """Switchable normalization of pictures (Luo et al., arXiv 1806.10779).

    (x - mean) / sqrt(var + epsilon) * scale + bias, where mean and var are those of each
    example's channel (instance), of each example (layer) and of each channel over the batch,
    added up with weights softmax(mean_weight) and softmax(var_weight), in this order. At
    evaluation the running mean and var, in `batch_stats`, stand for the batch's; the other
    two are the picture's own.

    The numbers are those of the authors' SwitchNorm2d with a moving average: the instance
    variance is the unbiased one, the other two follow from it and the spread of the instance
    means, and the running variance starts at zero. Where that code gives NaN, for pictures of
    one pixel, the instance variance is 0 here. Statistics are float32 whatever the input's
    dtype. Under `jit` over a mesh those of the batch are of the global batch.

    Attributes:
      use_running_average: normalize with the running statistics (here or in the call).
      momentum: share of the old running statistics that an update keeps.
      epsilon: added to the variance.
      dtype: of the output; None keeps the input's.
      param_dtype: of the parameters.
    """

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, use_running_average=None):
        """[B, ..., C] -> the same shape; at least one axis between. Raises ValueError without one."""
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        if x.ndim < 3:
            raise UserError(f'x.shape={x.shape}: expected [batch, height, width, channels]')
        channels = x.shape[-1]
        wide, kept_as = at_least_float32(x.dtype), at_least_float32(self.param_dtype)
        mean_state = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), kept_as)
        var_state = self.variable('batch_stats', 'var', jnp.zeros, (channels,), kept_as)
        y = x.astype(wide).reshape(x.shape[0], -1, channels)
        instance = _instance_moments(y)
        batch = tuple(jnp.asarray(state.value, wide).reshape(1, 1, -1) for state in (mean_state, var_state))
        if not use_running_average:
            batch = _pooled_moments(*instance, axis=0)
            if not self.is_initializing():
                for state, new in zip((mean_state, var_state), batch):
                    new = new.reshape(channels).astype(kept_as)
                    state.value = self.momentum * state.value + (1 - self.momentum) * new
        means, variances = zip(instance, _pooled_moments(*instance, axis=-1), batch)
        mean, var = self._mixed('mean_weight', means), self._mixed('var_weight', variances)
        scale = self.param('scale', nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, (channels,), self.param_dtype)
        scale, bias = (over_channels(a.astype(wide), y) for a in (scale, bias))
        y = (y - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(x.shape).astype(self.dtype or x.dtype)

    def _mixed(self, name, statistics):
        """Sum of the three statistics with the softmax of a learned vector."""
        weight = self.param(name, nn.initializers.ones, (3,), self.param_dtype)
        weight = jax.nn.softmax(weight.astype(statistics[0].dtype))
        return sum(w * s for w, s in zip(weight, statistics))


def _instance_moments(x):
    """Mean and unbiased variance over the pixels of [B, N, C], both [B, 1, C]."""
    mean = x.mean(1, keepdims=True)
    return mean, jnp.square(x - mean).sum(1, keepdims=True) / max(x.shape[1] - 1, 1)


def _pooled_moments(mean, var, axis):
    """Moments of a union of equal parts, from those of the parts along an axis.

    E[var + mean^2] - E[mean]^2, written so that means far from zero cancel nothing.
    """
    pooled = mean.mean(axis, keepdims=True)
    return pooled, (var + jnp.square(mean - pooled)).mean(axis, keepdims=True)
