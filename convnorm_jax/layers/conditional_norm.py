"""Batch normalization with a scale and a bias for each class."""

import numbers

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.dtypes import at_least_float32


class ConditionalBatchNorm(nn.Module):
    """Batch normalization with a scale and a bias for each class of images.

    The statistics are shared by all classes. `scale` (initially 1) and `bias` (initially 0) are [num_classes, C]. With
    num_classes=0 it is ordinary batch normalization, and labels are ignored.

    Sources: Dumoulin et al., `arXiv 1610.07629 <https://arxiv.org/abs/1610.07629>`__; de Vries et al.,
    `arXiv 1707.00683 <https://arxiv.org/abs/1707.00683>`__.

    Attributes:
      num_classes: number of classes, or 0.
      use_running_average: True normalizes with the running statistics.
      momentum, epsilon: see `BatchNorm`.
      dtype: of the output; None keeps the dtype of the input.
      param_dtype: of the parameters.
    """

    num_classes: int = 0
    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, labels: jax.Array | None = None, use_running_average: bool | None = None
    ) -> jax.Array:
        """Returns x, [B, ..., C], normalized with the scale and bias of each image's label, int [B].

        Raises:
          ValueError: num_classes is above 0, and the labels are missing or not of shape [B]; num_classes is below 0.
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
            raise UserError(f'labels.shape={shape}: expected one label for each of {x.shape[0]} images')
        shape = (self.num_classes, x.shape[-1])
        scale = self.param('scale', nn.initializers.ones, shape, self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)
        ones = (1,) * (x.ndim - 2)
        scale, bias = (jnp.asarray(p)[labels].reshape(-1, *ones, x.shape[-1]).astype(y.dtype) for p in (scale, bias))
        return (y * scale + bias).astype(self.dtype or x.dtype)
