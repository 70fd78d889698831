"""Pictures of a generator: each from its own random numbers, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.data.pipeline import padded_batches
from convnorm_jax.mesh import fetch, shard_batch

# Keeps latents and labels apart.
_LATENT, _LABEL = 0, 1


class Sampler:
    """Draws pictures of one generator.

    Attributes:
      sample_fn: (variables, z [B, latent], labels [B] or None) -> pictures in [0, 1].
      mesh: devices; batches are cut over them.
      batch_size: pictures at a time, a multiple of the number of devices.
      latent: size of z.
      num_classes: of the labels; 0 for none.
    """

    def __init__(self, sample_fn, mesh, batch_size, latent, num_classes=0):
        self.sample_fn, self.mesh, self.batch_size = sample_fn, mesh, batch_size
        self.latent, self.num_classes = latent, num_classes
        self._pictures = jax.jit(self._sample)
        self._draws = jax.jit(self._draw)

    def draw(self, variables, count, seed):
        """(pictures uint8 [count, H, W, C], labels int32 [count] or None), NumPy, of random latents and labels.

        The first of them are the same for every `count`.
        """
        z, labels = (np.asarray(part) for part in self._draws(jax.random.key(seed), np.arange(count)))
        labels = labels if self.num_classes else None
        return self.pictures(variables, z, labels), labels

    def pictures(self, variables, z, labels=None):
        """Pictures, NumPy uint8 [N, H, W, C], of latents [N, latent] and labels [N]."""
        parts = []
        for indices, mask in zip(*padded_batches(len(z), self.batch_size)):
            chosen = None if labels is None else labels[indices]
            parts.append(fetch(self._pictures(variables, z[indices], chosen))[mask > 0])
        return np.concatenate(parts)

    def grid(self, seed, columns, rows):
        """(z [rows * columns, latent], labels or None) of a fixed grid: a class a column, where there are classes."""
        z = np.asarray(self._draws(jax.random.key(seed), np.arange(rows * columns))[0])
        return z, np.tile(np.arange(columns, dtype=np.int32) % self.num_classes, rows) if self.num_classes else None

    def _draw(self, key, numbers):
        def one(number):
            own = jax.random.fold_in(key, number)
            z = jax.random.normal(jax.random.fold_in(own, _LATENT), (self.latent,))
            return z, jax.random.randint(jax.random.fold_in(own, _LABEL), (), 0, max(self.num_classes, 1))

        return jax.vmap(one)(numbers)

    def _sample(self, variables, z, labels):
        z, labels = shard_batch(self.mesh, (z, labels))
        pictures = self.sample_fn(variables, z, labels)
        return jnp.round(jnp.clip(pictures, 0, 1) * 255).astype(jnp.uint8)
