"""Nets without shortcuts: VGG (Simonyan and Zisserman, arXiv 1409.1556) and the published SimpleCNNs."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.models.resnet import linear


def _flatten_channels_first(x):
    # The order of the published nets, so that the weights of their linear layer can be imported.
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


class PlainNet(nn.Module):
    """Stages of 3x3 convolutions, each ending with a 2x2 max pool, and a linear layer.

    Plain convolutions have a bias, as in the published code.

    Attributes:
      num_classes: number of logits.
      layer: constructor of a convolution with normalization, see `layers.factory`.
      activation: constructor of the activation.
      widths: channels of each stage.
      depth: number of convolutions of each stage.
      family: 'vgg' or 'simple_cnn', which determines the published names of its parameters.
      dtype: of the linear layer's computation. The logits are float32.
    """

    num_classes: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    widths: Sequence[int]
    depth: Sequence[int]
    family: str = 'vgg'
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 [B, num_classes], for images [B, H, W, C].

        Raises:
          ValueError: images that are too small for the pools.
        """
        smallest = 2 ** len(self.depth)
        if min(x.shape[1:3]) < smallest:
            raise UserError(
                f'images of {x.shape[1]}x{x.shape[2]}: {len(self.depth)} halvings need at least '
                f'{smallest}x{smallest}; take simple_cnn or a resnet, or give a shorter model.depth'
            )
        for i, (width, convolutions) in enumerate(zip(self.widths, self.depth)):
            for j in range(convolutions):
                x = self.layer(width, (3, 3), padding=1, use_bias=True, train=train, name=f'conv{i + 1}_{j + 1}')(x)
                x = self.activation(name=f'relu{i + 1}_{j + 1}')(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = _flatten_channels_first(x)
        return linear(self.num_classes, x.shape[-1], self.dtype, 'linear')(x).astype(jnp.float32)


class SimpleCNN2(nn.Module):
    """The second published small net: 5x5, 3x3, 3x3 and 3x3 convolutions without padding, for 32x32 images.

    Attributes:
      num_classes: number of logits.
      layer: constructor of a convolution with normalization, see `layers.factory`.
      activation: constructor of the activation.
      widths: channels of each convolution.
      dtype: of the linear layer's computation. The logits are float32.
    """

    num_classes: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    widths: Sequence[int] = (6, 16, 20, 32)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 [B, num_classes], for images [B, 32, 32, C].

        Raises:
          ValueError: images of another size.
        """
        if x.shape[1:3] != (32, 32):
            raise UserError(f'images of {x.shape[1]}x{x.shape[2]}: simple_cnn2 takes 32x32 only')
        sizes, pooled = (5, 3, 3, 3), (True, True, False, True)
        for i, (width, k, pool) in enumerate(zip(self.widths, sizes, pooled)):
            x = self.layer(width, (k, k), padding=0, train=train, name=f'conv{i + 1}')(x)
            x = self.activation(name=f'relu{i + 1}')(x)
            x = nn.max_pool(x, (2, 2), (2, 2)) if pool else x
        x = _flatten_channels_first(x)
        return linear(self.num_classes, x.shape[-1], self.dtype, 'linear')(x).astype(jnp.float32)
