"""The parts that the GANs share: the projection at the end of a discriminator, and checks of their inputs."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError


class ProjectionHead(nn.Module):
    r"""One logit for each image: a linear layer of its features, plus a projection on the embedding of its label.

    .. math::
        w^T f + b + \langle E_{label}, p \rangle

    where f are the features and p the pooled features.

    Source: Miyato and Koyama, `arXiv 1802.05637 <https://arxiv.org/abs/1802.05637>`__.

    Attributes:
      dense: constructor of linear layers, see `layers.make_dense`. The embedding E is a linear layer without bias of
        the one-hot label, so it is normalized as the linear layer is.
      num_classes: number of classes; with 0 there is no projection, and labels are ignored.
    """

    dense: Callable[..., nn.Module]
    num_classes: int = 0

    @nn.compact
    def __call__(
        self, features: jax.Array, pooled: jax.Array, labels: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Returns logits, float32 [B].

        Args:
          features: [B, F].
          pooled: [B, C].
          labels: int [B], or None without classes.
          train: whether layers update their statistics.

        Raises:
          ValueError: with classes, no labels or labels of another shape.
        """
        logits = self.dense(1, train=train, name='linear')(features)[:, 0].astype(jnp.float32)
        if not self.num_classes:
            return logits
        one_hot = one_hot_labels(labels, self.num_classes, features.shape[0], pooled.dtype)
        embedding = self.dense(pooled.shape[-1], use_bias=False, train=train, name='embedding')(one_hot)
        return logits + (embedding.astype(jnp.float32) * pooled.astype(jnp.float32)).sum(-1)


def one_hot_labels(labels: jax.Array | None, num_classes: int, batch: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns labels, int [batch], as one-hot vectors, [batch, num_classes].

    Raises:
      ValueError: no labels, or labels of another shape.
    """
    shape = None if labels is None else labels.shape
    if labels is None or shape != (batch,):
        raise UserError(f'labels.shape={shape}: expected ({batch},), a label below {num_classes} for each image')
    return jax.nn.one_hot(labels, num_classes, dtype=dtype)


def check_latents(z: jax.Array, latent: int) -> None:
    """Raises ValueError unless z is [batch, latent]."""
    if z.ndim != 2 or z.shape[1] != latent:
        raise UserError(f'z.shape={z.shape}: expected [batch, {latent}]')


def check_pictures(images: jax.Array, picture_shape: Sequence[int]) -> None:
    """Raises ValueError unless images are [batch, H, W, C], with `picture_shape` as (H, W, C)."""
    if images.ndim != 4 or images.shape[1:] != tuple(picture_shape):
        raise UserError(f'images.shape={images.shape}: expected [batch, {", ".join(map(str, picture_shape))}]')
