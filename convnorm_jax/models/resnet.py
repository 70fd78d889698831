"""ResNet-18 to -152 (He et al., arXiv 1512.03385) as the ConvNorm paper trains them."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.layers.initializers import torch_bias_init, torch_kernel_init

STEMS = ('cifar', 'imagenet')


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with one activation module for both, as published.

    Attributes:
      features: output channels.
      strides: of the first convolution and the shortcut.
      layer: constructor of a convolution with normalization, see `layers.factory`.
      activation: constructor of the activation.
    """

    features: int
    strides: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block, [B, H, W, C] -> [B, H', W', features]."""
        relu = self.activation(name='relu')
        y = self.layer(self.features, (3, 3), strides=(self.strides,) * 2, padding=1, train=train, name='conv1')(x)
        y = self.layer(self.features, (3, 3), padding=1, train=train, name='conv2')(relu(y))
        return relu(y + shortcut(self, x, y, train))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and a shortcut.

    Attributes:
      features: channels of the first two convolutions.
      strides: of the 3x3 convolution and the shortcut.
      layer: constructor of a convolution with normalization, see `layers.factory`.
      activation: constructor of the activation.
    """

    features: int
    strides: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block, [B, H, W, C] -> [B, H', W', 4 * features]."""
        y = self.layer(self.features, (1, 1), padding=0, train=train, name='conv1')(x)
        y = self.activation(name='relu1')(y)
        y = self.layer(self.features, (3, 3), strides=(self.strides,) * 2, padding=1, train=train, name='conv2')(y)
        y = self.activation(name='relu2')(y)
        y = self.layer(4 * self.features, (1, 1), padding=0, train=train, name='conv3')(y)
        return self.activation(name='relu3')(y + shortcut(self, x, y, train))


def shortcut(block: BasicBlock | BottleneckBlock, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
    """Returns x, or its strided 1x1 projection with normalization if x and y have different shapes."""
    if x.shape == y.shape:
        return x
    return block.layer(y.shape[-1], (1, 1), strides=(block.strides,) * 2, padding=0, train=train, name='shortcut')(x)


class ResNet(nn.Module):
    """A residual net that ends with a global average pool and a linear layer.

    Attributes:
      num_classes: number of logits.
      layer: constructor of a convolution with normalization, see `layers.factory`.
      activation: constructor of the activation.
      block: `BasicBlock` or `BottleneckBlock`.
      depth: number of blocks of each stage.
      width: channels of the first stage; each further stage doubles them and halves the image.
      stem: 'cifar' is a 3x3 convolution, 'imagenet' a 7x7 convolution with stride 2 and a max pool.
      dtype: of the linear layer's computation. The logits are float32.
    """

    num_classes: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    block: type[nn.Module] = BasicBlock
    depth: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    stem: Literal['cifar', 'imagenet'] = 'cifar'
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 [B, num_classes], for images [B, H, W, C]."""
        x = self._stem(x, train)
        for i, blocks in enumerate(self.depth):
            for j in range(blocks):
                strides = 2 if i > 0 and j == 0 else 1
                x = self.block(self.width * 2**i, strides, self.layer, self.activation, name=f'layer{i + 1}_{j}')(
                    x, train
                )
        x = x.mean(axis=(1, 2))
        return linear(self.num_classes, x.shape[-1], self.dtype, 'linear')(x).astype(jnp.float32)

    def _stem(self, x, train):
        if self.stem == 'cifar':
            x = self.layer(self.width, (3, 3), padding=1, train=train, name='conv1')(x)
            return self.activation(name='relu')(x)
        x = self.layer(self.width, (7, 7), strides=(2, 2), padding=3, train=train, name='conv1')(x)
        x = self.activation(name='relu')(x)
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


def linear(features: int, fan_in: int, dtype: DTypeLike | None, name: str) -> nn.Dense:
    """Returns a linear layer with PyTorch's initial values."""
    return nn.Dense(features, kernel_init=torch_kernel_init, bias_init=torch_bias_init(fan_in), dtype=dtype, name=name)
