"""Batch normalization with PyTorch's statistics."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param


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
    def __call__(self, x, use_running_average=None):
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        channels = x.shape[-1]
        mean_state = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
        var_state = self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)
        if use_running_average:
            mean, var = mean_state.value, var_state.value
        else:
            mean, var = self._batch_statistics(x, mean_state, var_state)
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + self.epsilon)
        if self.use_affine:
            scale = self.param('scale', nn.initializers.ones, (channels,), self.param_dtype)
            bias = self.param('bias', nn.initializers.zeros, (channels,), self.param_dtype)
            y = y * scale + bias
        return y.astype(self.dtype or x.dtype)

    def _batch_statistics(self, x, mean_state, var_state):
        x = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        var = jnp.square(x - mean).mean(axes)
        if not self.is_initializing():
            count = x.size // x.shape[-1]
            unbiased = var * (count / max(count - 1, 1))
            keep = self.momentum
            mean_state.value = keep * mean_state.value + (1 - keep) * mean
            var_state.value = keep * var_state.value + (1 - keep) * unbiased
        return mean, var
