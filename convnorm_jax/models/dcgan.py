"""DCGAN: a generator of transposed convolutions, a discriminator of strided ones (arXiv 1511.06434).

Where they differ from the paper: pictures of 8, 16 and 32 pixels leave the first stages of 64
out, width for width; the first layer is a transposed convolution of the latent, which is what the
paper's linear layer and reshape are; with classes, the label's embedding stands beside the
latent, and the discriminator projects (arXiv 1802.05637). With layers that act on the kernel, such
as spectral norm, the discriminator's first layer is one too: without it nothing would bound the net.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.models.projection import ProjectionHead, check_latents, check_pictures, one_hot_labels

# The paper's start of all weights.
_INIT = nn.initializers.normal(0.02)

# Size of the pictures -> how many times 4x4 is doubled.
STAGES = {8: 1, 16: 2, 32: 3, 64: 4}
GENERATOR_WIDTH, DISCRIMINATOR_WIDTH = 128, 64


class DCGANGenerator(nn.Module):
    """Latents -> pictures: transposed convolutions 4x4, the first to 4x4 pixels, the others doubling; tanh.

    Attributes:
      picture_shape: (H, W, C).
      latent: length of a latent.
      layer: constructor of transposed convolution + normalization, see `layers.factory`.
      plain_layer: that of the last one.
      dense: constructor of the embedding, used with classes.
      widths: output channels of every layer but the last.
      num_classes: 0 for no classes; labels are not looked at then.
      dtype: of the computation; the pictures are float32.
    """

    picture_shape: Sequence[int]
    latent: int
    layer: Callable[..., nn.Module]
    plain_layer: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
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
        z = z.astype(self.dtype or z.dtype)
        if self.num_classes:
            one_hot = one_hot_labels(labels, self.num_classes, z.shape[0], z.dtype)
            # As large as the latent's own entries.
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
    """Pictures -> logits: convolutions 4x4 that halve the picture, each with leaky ReLU; a linear layer at 4x4.

    Attributes:
      picture_shape: (H, W, C).
      layer: constructor of convolution + normalization.
      first_layer: that of the first one, see `layers.factory.make_edge_layer`.
      dense: constructor of the linear layer and the embedding.
      widths: output channels of every convolution.
      num_classes: 0 for no classes; labels are not looked at then.
      dtype: of the computation; the logits are float32.
    """

    picture_shape: Sequence[int]
    layer: Callable[..., nn.Module]
    first_layer: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    widths: Sequence[int]
    num_classes: int = 0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        """Pictures [B, H, W, C], labels int [B] or None -> logits, float32 [B].

        Raises:
          ValueError: pictures of another shape; no labels where there are classes.
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
