"""What the GANs share: the end of a discriminator, a projection (arXiv 1802.05637), and checks of what is given."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.errors import UserError


class ProjectionHead(nn.Module):
    """One logit for each picture: a linear layer of its features plus <embedding of its label, pooled features>.

    Attributes:
      dense: constructor of linear layers, see `layers.factory.make_dense`. The embedding is one, without
        bias, of the one-hot label: it is normalized as the linear layer is.
      num_classes: 0 for no projection; labels are not looked at then.
    """

    dense: Callable[..., nn.Module]
    num_classes: int = 0

    @nn.compact
    def __call__(self, features, pooled, labels=None, train=False):
        """features [B, F], pooled [B, C], labels int [B] or None -> logits, float32 [B].

        Raises:
          ValueError: no labels, or of another shape than [B], where there are classes.
        """
        logits = self.dense(1, train=train, name='linear')(features)[:, 0].astype(jnp.float32)
        if not self.num_classes:
            return logits
        one_hot = one_hot_labels(labels, self.num_classes, features.shape[0], pooled.dtype)
        embedding = self.dense(pooled.shape[-1], use_bias=False, train=train, name='embedding')(one_hot)
        return logits + (embedding.astype(jnp.float32) * pooled.astype(jnp.float32)).sum(-1)


def one_hot_labels(labels, num_classes, batch, dtype=jnp.float32):
    """[batch, num_classes] of labels, int [batch].

    Raises:
      ValueError: no labels, or of another shape.
    """
    shape = None if labels is None else labels.shape
    if shape != (batch,):
        raise UserError(f'labels.shape={shape}: expected ({batch},), a label below {num_classes} for each picture')
    return jax.nn.one_hot(labels, num_classes, dtype=dtype)


def check_latents(z, latent):
    """Raises ValueError unless z is [batch, latent]."""
    if z.ndim != 2 or z.shape[1] != latent:
        raise UserError(f'z.shape={z.shape}: expected [batch, {latent}]')


def check_pictures(images, picture_shape):
    """Raises ValueError unless images are [batch, H, W, C] of pictures of that shape."""
    if images.ndim != 4 or images.shape[1:] != tuple(picture_shape):
        raise UserError(f'images.shape={images.shape}: expected [batch, {", ".join(map(str, picture_shape))}]')
