"""A net of 1-D layers, which takes an image as the sequence of its rows."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.models.resnet import linear

WIDTH = 32
DEPTH = (2, 2, 2)


class SequenceCNN(nn.Module):
    """Stages of layers with 3 taps over the rows of an image, a mean over the rows, and a linear layer.

    An image [H, W, C] is a sequence of H rows with W * C features each. Each stage has twice the channels of the stage
    before, and all but the first start with a stride of 2. Plain convolutions have a bias, as in `PlainNet`.

    Attributes:
      num_classes: number of logits.
      layer: constructor of a convolution with normalization, see `layers.factory`.
      activation: constructor of the activation.
      width: channels of the first stage.
      depth: number of layers of each stage.
      dtype: of the linear layer's computation. The logits are float32.
    """

    num_classes: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    width: int = WIDTH
    depth: Sequence[int] = DEPTH
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 [B, num_classes], for images [B, H, W, C]."""
        x = x.reshape(*x.shape[:2], -1)
        for i, layers in enumerate(self.depth):
            for j in range(layers):
                name, strides = f'{i + 1}_{j + 1}', 2 if i > 0 and j == 0 else 1
                x = self.layer(
                    self.width * 2**i,
                    (3,),
                    strides=(strides,),
                    padding=1,
                    use_bias=True,
                    train=train,
                    name=f'conv{name}',
                )(x)
                x = self.activation(name=f'relu{name}')(x)
        x = x.mean(axis=1)
        return linear(self.num_classes, x.shape[-1], self.dtype, 'linear')(x).astype(jnp.float32)
