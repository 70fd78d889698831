"""SNGAN: residual generator and discriminator (arXiv 1802.05957), with classes cGAN-PD (arXiv 1802.05637).

As torch_mimicry has them, which differs from the paper in the upsampling: bilinear, not nearest.
Differences from torch_mimicry: the linear layers' biases start at 0, the scales of the
conditional BatchNorm at 1, and the discriminator's shortcuts see the block's input, as in the paper: there
a ReLU in place has rectified it before (see `rectified_shortcuts`). Pictures of 8 and 16 pixels
are ours, made like those of 32.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.layers.conditional_norm import ConditionalBatchNorm
from convnorm_jax.models.projection import ProjectionHead, check_latents, check_pictures

# Size of the pictures -> (side of the generator's first picture, its width, what divides that
# width in each block), (the discriminator's width, what divides it and whether it halves the
# picture, for each block).
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


def xavier(gain=1.0):
    """Initializer: Xavier's uniform times `gain`, as `torch.nn.init.xavier_uniform_`."""
    return nn.initializers.variance_scaling(gain**2, 'fan_avg', 'uniform')


_RESIDUAL, _SHORTCUT = xavier(math.sqrt(2)), xavier()


def _upsample(x):
    """Twice as large, bilinear between the pixels' centres (PyTorch's align_corners=False)."""
    batch, height, width, channels = x.shape
    return jax.image.resize(x, (batch, 2 * height, 2 * width, channels), 'bilinear')


def _downsample(x):
    return nn.avg_pool(x, (2, 2), (2, 2))


class GeneratorBlock(nn.Module):
    """BatchNorm, ReLU, upsampling, 3x3, BatchNorm, ReLU, 3x3; the shortcut is upsampled and 1x1.

    Attributes:
      features: output channels.
      layer: constructor of the convolutions, see `layers.factory`.
      num_classes: of the conditional BatchNorm, or 0.
    """

    features: int
    layer: Callable[..., nn.Module]
    num_classes: int = 0

    @nn.compact
    def __call__(self, x, labels, train):
        def norm(name):
            return ConditionalBatchNorm(self.num_classes, use_running_average=not train, name=name)

        def conv(size, name, init):
            return self.layer(
                self.features, (size, size), padding=size // 2, use_bias=True, train=train, kernel_init=init, name=name
            )

        y = _upsample(nn.relu(norm('norm1')(x, labels)))
        y = conv(3, 'conv1', _RESIDUAL)(y)
        y = conv(3, 'conv2', _RESIDUAL)(nn.relu(norm('norm2')(y, labels)))
        # A 1x1 convolution of the plain kind and the upsampling change places freely; others see the size.
        return y + conv(1, 'shortcut', _SHORTCUT)(_upsample(x))


class DiscriminatorBlock(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, average pool; the shortcut is 1x1 and pooled, or nothing.

    Attributes:
      features: output channels; the first convolution keeps the input's number.
      layer: constructor of the convolutions.
      downsample: halve the picture.
      first: of the net ("optimized" in the published code): without the first ReLU, the
        first convolution already widens, and the shortcut pools before its convolution.
      rectified_shortcut: the shortcut sees the input behind the first ReLU.
    """

    features: int
    layer: Callable[..., nn.Module]
    downsample: bool
    first: bool = False
    rectified_shortcut: bool = False

    @nn.compact
    def __call__(self, x, train):
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
    """Latents -> pictures: a linear layer, `GeneratorBlock`s, BatchNorm, ReLU, 3x3, tanh.

    The first and the last layer are plain ones, and the last BatchNorm knows no classes.

    Attributes:
      picture_shape: (H, W, C).
      latent: length of a latent.
      layer: constructor of the blocks' convolutions.
      plain_layer: that of the last one.
      dense: constructor of the first layer.
      bottom: side of the first picture.
      width: its channels.
      widths: output channels of each block.
      num_classes: 0 for no classes; labels are not looked at then.
      dtype: of the computation; the pictures are float32.
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
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, z, labels=None, train=False):
        """z [B, latent], labels int [B] or None -> pictures in [-1, 1], float32 [B, H, W, C].

        Raises:
          ValueError: z of another shape; no labels where there are classes.
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
    """Pictures -> logits: `DiscriminatorBlock`s, ReLU, sum over the picture, a linear layer, a projection.

    Attributes:
      picture_shape: (H, W, C).
      layer: constructor of all convolutions.
      dense: constructor of the linear layer and the embedding.
      blocks: (output channels, whether it halves the picture) of each block.
      num_classes: 0 for no classes; labels are not looked at then.
      dtype: of the computation; the logits are float32.
      rectified_shortcuts: torch_mimicry's shortcuts, exactly; `create_gan` leaves it out, `discriminator.clone(
        rectified_shortcuts=True)` sets it.
    """

    picture_shape: Sequence[int]
    layer: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    blocks: Sequence[tuple[int, bool]]
    num_classes: int = 0
    dtype: jnp.dtype | None = None
    rectified_shortcuts: bool = False

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        """Pictures [B, H, W, C], labels int [B] or None -> logits, float32 [B].

        Raises:
          ValueError: pictures of another shape; no labels where there are classes.
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
