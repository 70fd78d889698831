"""Batch normalization with PyTorch's statistics."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param

from convnorm_jax.layers.channelwise import channelwise_convolution, over_channels
from convnorm_jax.layers.channelwise_norm import normalize_by_batch
from convnorm_jax.layers.dtypes import at_least_float32


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last (Ioffe and Szegedy, arXiv 1502.03167).

    As `flax.linen.BatchNorm`, but the running variance is the unbiased one, as in
    PyTorch: the published statistics carry over both ways. The running statistics are float32 whatever
    the input's dtype (float64 with `param_dtype=jnp.float64`), and an update never changes their dtype. Under
    `jit` over a mesh they are those of the global batch.

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
    def __call__(self, x, use_running_average=None, channelwise=None, circular=False):
        """Normalizes x, [..., C].

        Args:
          x: float. Statistics and arithmetic are float32 at least.
          use_running_average: see above.
          channelwise: (kernel [kh, kw, C], bias [C]) of a channel-wise convolution of x, [B, H, W, C], that comes
            first, as in `ConvNorm`: its result need not exist in memory then.
          circular: of that convolution.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        channels, wide = x.shape[-1], at_least_float32(x.dtype)
        kept_as = at_least_float32(self.param_dtype)
        mean_state = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), kept_as)
        var_state = self.variable('batch_stats', 'var', jnp.ones, (channels,), kept_as)
        scale, bias = jnp.ones(channels, wide), jnp.zeros(channels, wide)
        if self.use_affine:
            scale = self.param('scale', nn.initializers.ones, (channels,), self.param_dtype).astype(wide)
            bias = self.param('bias', nn.initializers.zeros, (channels,), self.param_dtype).astype(wide)
        dtype = self.dtype or x.dtype
        if use_running_average:
            if channelwise is not None:
                kernel, offset = channelwise
                x = channelwise_convolution(x, kernel, circular) + over_channels(offset.astype(x.dtype), x)
            mean, var = (jnp.asarray(state.value, wide) for state in (mean_state, var_state))
            return _normalized(x.astype(wide), mean, var, scale, bias, self.epsilon).astype(dtype)
        if channelwise is not None:
            y, mean, var = normalize_by_batch(x, *channelwise, scale, bias, self.epsilon, dtype, circular)
        else:
            y, mean, var = _by_batch_statistics(x.astype(wide), scale, bias, self.epsilon)
        if not self.is_initializing():
            self._update(mean_state, var_state, mean, var, x.size // channels)
        return y.astype(dtype)

    def _update(self, mean_state, var_state, mean, var, count):
        unbiased = var * (count / max(count - 1, 1))
        keep = self.momentum
        for state, new in ((mean_state, mean), (var_state, unbiased)):
            state.value = keep * state.value + (1 - keep) * new.astype(state.value.dtype)


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
