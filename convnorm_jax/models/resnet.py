"""ResNet-18 to -152 (He et al., arXiv 1512.03385) as the ConvNorm paper trains them."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.layers.initializers import torch_bias_init, torch_kernel_init

STEMS = ('cifar', 'imagenet')


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; one activation module serves both, as published."""

    features: int
    strides: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    expansion = 1

    @nn.compact
    def __call__(self, x, train):
        relu = self.activation(name='relu')
        y = self.layer(self.features, (3, 3), strides=(self.strides,) * 2, padding=1, train=train, name='conv1')(x)
        y = self.layer(self.features, (3, 3), padding=1, train=train, name='conv2')(relu(y))
        return relu(y + shortcut(self, x, y, train))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and a shortcut."""

    features: int
    strides: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    expansion = 4

    @nn.compact
    def __call__(self, x, train):
        y = self.layer(self.features, (1, 1), padding=0, train=train, name='conv1')(x)
        y = self.activation(name='relu1')(y)
        y = self.layer(self.features, (3, 3), strides=(self.strides,) * 2, padding=1, train=train, name='conv2')(y)
        y = self.activation(name='relu2')(y)
        y = self.layer(4 * self.features, (1, 1), padding=0, train=train, name='conv3')(y)
        return self.activation(name='relu3')(y + shortcut(self, x, y, train))


def shortcut(block, x, y, train):
    """x itself, or its normalized, strided 1x1 projection where the shapes differ."""
    if x.shape == y.shape:
        return x
    return block.layer(y.shape[-1], (1, 1), strides=(block.strides,) * 2, padding=0, train=train, name='shortcut')(x)


class ResNet(nn.Module):
    """A residual net, ending in a global average pool and a linear layer.

    Attributes:
      num_classes: logits.
      layer: constructor of convolution + normalization, see `layers.factory`.
      activation: constructor of the activation.
      block: `BasicBlock` or `BottleneckBlock`.
      depth: blocks of each stage.
      width: channels of the first stage; each further stage doubles them and halves the picture.
      stem: 'cifar', one 3x3 convolution, or 'imagenet', 7x7 of stride 2 and a max pool.
      dtype: of the linear layer's computation; the logits are float32.
    """

    num_classes: int
    layer: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    block: type[nn.Module] = BasicBlock
    depth: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    stem: str = 'cifar'
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, train=False):
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


def linear(features, fan_in, dtype, name):
    """Linear layer with PyTorch's initial values."""
    return nn.Dense(features, kernel_init=torch_kernel_init, bias_init=torch_bias_init(fan_in), dtype=dtype, name=name)
