"""Batch normalization with a scale and a bias for each class."""

import numbers

import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.errors import UserError
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.dtypes import at_least_float32


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose scale and bias belong to the class of the picture (arXiv 1610.07629, 1707.00683).

    The statistics are shared by all classes; `scale` (from 1) and `bias` (from 0) are
    [num_classes, C]. With num_classes=0 it is ordinary BatchNorm, and labels are not looked at.

    Attributes:
      num_classes: number of classes, or 0.
      use_running_average: normalize with the running statistics.
      momentum, epsilon: BatchNorm's.
      dtype: of the output; None keeps the input's.
      param_dtype: of the parameters.
    """

    num_classes: int = 0
    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, labels=None, use_running_average=None):
        """Normalizes x, [B, ..., C], with the scale and bias of labels, int [B].

        Raises:
          ValueError: no labels, or of another shape than [B], where num_classes is not 0;
            num_classes below 0.
        """
        if not isinstance(self.num_classes, numbers.Integral) or self.num_classes < 0:
            raise UserError(f'num_classes={self.num_classes!r}: expected 0 or a number of classes')
        norm = BatchNorm(
            use_running_average=self.use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            use_affine=self.num_classes == 0,
            dtype=self.dtype if self.num_classes == 0 else at_least_float32(x.dtype),
            param_dtype=self.param_dtype,
            name='batch_norm',
        )
        y = norm(x, use_running_average=use_running_average)
        if self.num_classes == 0:
            return y
        if labels is None or labels.shape != x.shape[:1]:
            shape = None if labels is None else labels.shape
            raise UserError(f'labels.shape={shape}: expected one label for each of {x.shape[0]} pictures')
        shape = (self.num_classes, x.shape[-1])
        scale = self.param('scale', nn.initializers.ones, shape, self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)
        ones = (1,) * (x.ndim - 2)
        scale, bias = (jnp.asarray(p)[labels].reshape(-1, *ones, x.shape[-1]).astype(y.dtype) for p in (scale, bias))
        return (y * scale + bias).astype(self.dtype or x.dtype)
