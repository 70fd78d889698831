"""DCGAN: a generator of transposed convolutions and a discriminator of strided ones (Radford et al., arXiv 1511.06434).

Differences from the paper:

- For images of 8, 16 and 32 pixels the first stages of the net for 64 are left out, together with their widths.
- The first layer is a transposed convolution of the latent, which equals the paper's linear layer and reshape.
- With classes, the embedding of the label is concatenated with the latent, and the discriminator projects
  (arXiv 1802.05637).
- With layers that act on the kernel, such as spectral norm, so does the discriminator's first layer; otherwise nothing
  would bound the net.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.models.projection import ProjectionHead, check_latents, check_pictures, one_hot_labels

# The paper's initial values of all weights.
_INIT = nn.initializers.normal(0.02)

# For each image size, how many times the 4x4 start is doubled.
STAGES = {8: 1, 16: 2, 32: 3, 64: 4}
GENERATOR_WIDTH, DISCRIMINATOR_WIDTH = 128, 64


class DCGANGenerator(nn.Module):
    """The generator: 4x4 transposed convolutions, the first to 4x4 pixels, the others doubling the size; then tanh.

    Attributes:
      picture_shape: (H, W, C) of the images.
      latent: length of a latent.
      layer: constructor of a transposed convolution with normalization, see `layers.factory`.
      plain_layer: constructor of the last transposed convolution.
      dense: constructor of the label's embedding.
      widths: output channels of every layer but the last.
      num_classes: number of classes; with 0 labels are ignored.
      dtype: of the computation. The images are float32.
    """

    picture_shape: Sequence[int]
    latent: int
    layer: Callable[..., nn.Module]
    plain_layer: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
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
        z = z.astype(self.dtype or z.dtype)
        if self.num_classes:
            one_hot = one_hot_labels(labels, self.num_classes, z.shape[0], z.dtype)
            # The entries of the embedding are as large as those of the latent.
            embed = self.dense(
                self.latent, use_bias=False, train=train, kernel_init=nn.initializers.normal(1), name='embedding'
            )
            z = jnp.concatenate([z, embed(one_hot)], axis=-1)
        x = z[:, None, None]
        settings = dict(use_bias=True, train=train, kernel_init=_INIT)
        for i, width in enumerate(self.widths):
            geometry = dict(strides=(2, 2), padding=1) if i else dict(strides=(1, 1), padding=0)
            x = nn.relu(self.layer(width, (4, 4), **geometry, **settings, name=f'conv{i + 1}')(x))
        x = self.plain_layer(self.picture_shape[-1], (4, 4), strides=(2, 2), padding=1, **settings, name='to_picture')(
            x
        )
        return jnp.tanh(x.astype(jnp.float32))


class DCGANDiscriminator(nn.Module):
    """The discriminator: 4x4 convolutions that halve the image, each with leaky ReLU; a linear layer at 4x4 pixels.

    Attributes:
      picture_shape: (H, W, C) of the images.
      layer: constructor of a convolution with normalization.
      first_layer: constructor of the first convolution, see `layers.factory.make_edge_layer`.
      dense: constructor of the linear layer and the label's embedding.
      widths: output channels of every convolution.
      num_classes: number of classes; with 0 labels are ignored.
      dtype: of the computation. The logits are float32.
    """

    picture_shape: Sequence[int]
    layer: Callable[..., nn.Module]
    first_layer: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    widths: Sequence[int]
    num_classes: int = 0
    dtype: DTypeLike | None = None

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
        for i, width in enumerate(self.widths):
            layer = self.layer if i else self.first_layer
            conv = layer(
                width,
                (4, 4),
                strides=(2, 2),
                padding=1,
                use_bias=True,
                train=train,
                kernel_init=_INIT,
                name=f'conv{i + 1}',
            )
            x = nn.leaky_relu(conv(x), 0.2)
        x = x.astype(jnp.float32)
        head = ProjectionHead(self.dense, self.num_classes, name='head')
        return head(x.reshape(x.shape[0], -1), x.sum((1, 2)), labels, train)
