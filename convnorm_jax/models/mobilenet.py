"""MobileNet, a depthwise-separable net (Howard et al., arXiv 1704.04861), with strides for 32x32 images."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.models.resnet import linear

DEPTH = (1, 2, 2, 6, 2)


class MobileNet(nn.Module):
    """A 3x3 layer, then pairs of a 3x3 depthwise and a 1x1 layer, each followed by the activation.

    It is the published net with a stem of stride 1 instead of 2. The thirteen pairs form stages of 1, 2, 2, 6 and 2
    pairs. The first stage has twice the channels of the stem, and each further stage twice those of the stage before.
    All stages but the first start with a stride of 2, in the depthwise layer. The net ends with a global average pool
    and a linear layer.

    Attributes:
      num_classes: number of logits.
      layer: constructor of a convolution with normalization, see `layers.factory`.
      activation: constructor of the activation.
      width: channels of the stem, 32 as published.
      depth: number of pairs of each stage.
      dtype: of the linear layer's computation. The logits are float32.
    """

    num_classes: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    width: int = 32
    depth: Sequence[int] = DEPTH
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 [B, num_classes], for images [B, H, W, C]."""
        x = self._apply(x, self.width, (3, 3), 'conv1', padding=1, train=train)
        for i, pairs in enumerate(self.depth):
            for j in range(pairs):
                strides, place = 2 if i > 0 and j == 0 else 1, f'{i + 1}_{j + 1}'
                x = self._apply(
                    x,
                    x.shape[-1],
                    (3, 3),
                    f'depthwise{place}',
                    strides=(strides, strides),
                    padding=1,
                    feature_group_count=x.shape[-1],
                    train=train,
                )
                x = self._apply(x, self.width * 2 ** (i + 1), (1, 1), f'pointwise{place}', padding=0, train=train)
        x = x.mean(axis=(1, 2))
        return linear(self.num_classes, x.shape[-1], self.dtype, 'linear')(x).astype(jnp.float32)

    def _apply(self, x, features, kernel_size, name, **settings):
        x = self.layer(features, kernel_size, name=name, **settings)(x)
        return self.activation(name=f'{name}_relu')(x)
