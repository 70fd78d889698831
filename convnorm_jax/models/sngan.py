"""SNGAN, a residual generator and discriminator (arXiv 1802.05957), and with classes cGAN-PD (arXiv 1802.05637).

The nets are those of torch_mimicry, which upsample bilinearly, where the paper takes the nearest pixel. Differences
from torch_mimicry:

- The biases of linear layers start at 0, and the scales of the conditional BatchNorm at 1.
- The shortcuts of the discriminator see the input of the block, as in the paper. In torch_mimicry an in-place ReLU has
  rectified it before (see `rectified_shortcuts`).
- The nets for 8 and 16 pixels, which torch_mimicry does not have, are made like that for 32.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.layers.conditional_norm import ConditionalBatchNorm
from convnorm_jax.layers.initializers import Initializer
from convnorm_jax.models.projection import ProjectionHead, check_latents, check_pictures

# For each image size: of the generator the side and the channels of its first feature map, and the divisor of these
# channels in each block; of the discriminator the channels, and for each block their divisor and whether it halves the
# image.
GENERATORS = {
    8: (4, 256, (1,)),
    16: (4, 256, (1, 1)),
    32: (4, 256, (1, 1, 1)),
    48: (6, 512, (2, 4, 8)),
    64: (4, 1024, (2, 4, 8, 16)),
}
_SMALL_DISCRIMINATOR = (128, ((1, True), (1, True), (1, False), (1, False)))
DISCRIMINATORS = {
    8: (128, ((1, True), (1, False), (1, False))),
    16: _SMALL_DISCRIMINATOR,
    32: _SMALL_DISCRIMINATOR,
    48: (1024, ((16, True), (8, True), (4, True), (2, True), (1, False))),
    64: (1024, ((16, True), (8, True), (4, True), (2, True), (1, True))),
}


def xavier(gain: float = 1.0) -> Initializer:
    """Returns the initializer of Xavier's uniform distribution times `gain`, as `torch.nn.init.xavier_uniform_`."""
    return nn.initializers.variance_scaling(gain**2, 'fan_avg', 'uniform')


_RESIDUAL, _SHORTCUT = xavier(math.sqrt(2)), xavier()


def _upsample(x):
    """Doubles the size, bilinear between the centres of the pixels (PyTorch's align_corners=False)."""
    batch, height, width, channels = x.shape
    return jax.image.resize(x, (batch, 2 * height, 2 * width, channels), 'bilinear')


def _downsample(x):
    return nn.avg_pool(x, (2, 2), (2, 2))


class GeneratorBlock(nn.Module):
    """BatchNorm, ReLU, upsampling, 3x3, BatchNorm, ReLU, 3x3; the shortcut is upsampled and 1x1.

    Attributes:
      features: output channels.
      layer: constructor of the convolutions, see `layers.factory`.
      num_classes: number of classes of the conditional BatchNorm, or 0.
    """

    features: int
    layer: Callable[..., nn.Module]
    num_classes: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """Applies the block, [B, H, W, C] -> [B, 2 H, 2 W, features]."""

        def norm(name):
            return ConditionalBatchNorm(self.num_classes, use_running_average=not train, name=name)

        def conv(size, name, init):
            return self.layer(
                self.features, (size, size), padding=size // 2, use_bias=True, train=train, kernel_init=init, name=name
            )

        y = _upsample(nn.relu(norm('norm1')(x, labels)))
        y = conv(3, 'conv1', _RESIDUAL)(y)
        y = conv(3, 'conv2', _RESIDUAL)(nn.relu(norm('norm2')(y, labels)))
        # The order matters: a plain 1x1 convolution commutes with the upsampling, but other layers depend on the size.
        return y + conv(1, 'shortcut', _SHORTCUT)(_upsample(x))


class DiscriminatorBlock(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, average pool; the shortcut is 1x1 and pooled, or the identity.

    Attributes:
      features: output channels; the first convolution keeps the number of input channels.
      layer: constructor of the convolutions.
      downsample: whether the block halves the image.
      first: whether it is the first block of the net ("optimized" in the published code). Then there is no first ReLU,
        the first convolution already has `features` channels, and the shortcut pools before its convolution.
      rectified_shortcut: whether the shortcut sees the input after the first ReLU.
    """

    features: int
    layer: Callable[..., nn.Module]
    downsample: bool
    first: bool = False
    rectified_shortcut: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block, [B, H, W, C] -> [B, H', W', features]."""

        def conv(features, size, name, init):
            return self.layer(
                features, (size, size), padding=size // 2, use_bias=True, train=train, kernel_init=init, name=name
            )

        pool = _downsample if self.downsample else lambda x: x
        y = x if self.first else nn.relu(x)
        x = y if self.rectified_shortcut else x
        y = conv(self.features if self.first else x.shape[-1], 3, 'conv1', _RESIDUAL)(y)
        y = pool(conv(self.features, 3, 'conv2', _RESIDUAL)(nn.relu(y)))
        if not self.downsample and x.shape[-1] == self.features:
            return y + x
        shortcut = conv(self.features, 1, 'shortcut', _SHORTCUT)
        return y + (shortcut(pool(x)) if self.first else pool(shortcut(x)))


class SNGANGenerator(nn.Module):
    """The generator: a linear layer, blocks (`GeneratorBlock`), BatchNorm, ReLU, 3x3, tanh.

    The first and the last layer are plain, and the last BatchNorm does not depend on the class.

    Attributes:
      picture_shape: (H, W, C) of the images.
      latent: length of a latent.
      layer: constructor of the blocks' convolutions.
      plain_layer: constructor of the last convolution.
      dense: constructor of the first layer.
      bottom: side of the first feature map.
      width: channels of the first feature map.
      widths: output channels of each block.
      num_classes: number of classes; with 0 labels are ignored.
      dtype: of the computation. The images are float32.
    """

    picture_shape: Sequence[int]
    latent: int
    layer: Callable[..., nn.Module]
    plain_layer: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    bottom: int
    width: int
    widths: Sequence[int]
    num_classes: int = 0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, z: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Returns images in [-1, 1], float32 [B, H, W, C].

        Args:
          z: latents, [B, latent].
          labels: int [B], or None without classes.
          train: whether layers update their statistics.

        Raises:
          ValueError: z of another shape; with classes, no labels or labels of another shape.
        """
        check_latents(z, self.latent)
        x = self.dense(self.bottom**2 * self.width, train=train, name='linear')(z.astype(self.dtype or z.dtype))
        x = x.reshape(-1, self.bottom, self.bottom, self.width)
        for i, width in enumerate(self.widths):
            x = GeneratorBlock(width, self.layer, self.num_classes, name=f'block{i + 1}')(x, labels, train)
        x = nn.relu(ConditionalBatchNorm(use_running_average=not train, name='norm')(x))
        x = self.plain_layer(
            self.picture_shape[-1],
            (3, 3),
            padding=1,
            use_bias=True,
            train=train,
            kernel_init=xavier(),
            name='to_picture',
        )(x)
        return jnp.tanh(x.astype(jnp.float32))


class SNGANDiscriminator(nn.Module):
    """The discriminator: blocks (`DiscriminatorBlock`), ReLU, a sum over the image, a linear layer and a projection.

    Attributes:
      picture_shape: (H, W, C) of the images.
      layer: constructor of all convolutions.
      dense: constructor of the linear layer and the label's embedding.
      blocks: output channels of each block, and whether it halves the image.
      num_classes: number of classes; with 0 labels are ignored.
      dtype: of the computation. The logits are float32.
      rectified_shortcuts: True takes exactly torch_mimicry's shortcuts. `create_gan` does not set it;
        `discriminator.clone(rectified_shortcuts=True)` does.
    """

    picture_shape: Sequence[int]
    layer: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    blocks: Sequence[tuple[int, bool]]
    num_classes: int = 0
    dtype: DTypeLike | None = None
    rectified_shortcuts: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Returns logits, float32 [B].

        Args:
          x: images, [B, H, W, C].
          labels: int [B], or None without classes.
          train: whether layers update their statistics.

        Raises:
          ValueError: images of another shape; with classes, no labels or labels of another shape.
        """
        check_pictures(x, self.picture_shape)
        x = x.astype(self.dtype or x.dtype)
        for i, (width, downsample) in enumerate(self.blocks):
            x = DiscriminatorBlock(
                width,
                self.layer,
                downsample,
                first=i == 0,
                rectified_shortcut=self.rectified_shortcuts,
                name=f'block{i + 1}',
            )(x, train)
        pooled = nn.relu(x).astype(jnp.float32).sum((1, 2))
        return ProjectionHead(self.dense, self.num_classes, name='head')(pooled, pooled, labels, train)
