"""Draws images from a generator, each with random numbers of its own, so that the batch size does not matter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.data.pipeline import padded_batches
from convnorm_jax.mesh import fetch, shard_batch

# Makes latents and labels independent.
_LATENT, _LABEL = 0, 1


class Sampler:
    """Draws images from one generator.

    Attributes:
      sample_fn: (variables, z [B, latent], labels [B] or None) -> images in [0, 1].
      mesh: devices; batches are divided over them.
      batch_size: images at a time, a multiple of the number of devices.
      latent: size of z.
      num_classes: of the labels; 0 for none.
    """

    def __init__(
        self,
        sample_fn: Callable[[Any, jax.Array, jax.Array | None], jax.Array],
        mesh: jax.sharding.Mesh,
        batch_size: int,
        latent: int,
        num_classes: int = 0,
    ) -> None:
        self.sample_fn, self.mesh, self.batch_size = sample_fn, mesh, batch_size
        self.latent, self.num_classes = latent, num_classes
        self._jitted_sample, self._jitted_draw = jax.jit(self._sample), jax.jit(self._draw)

    def draw(self, variables: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Draws random latents and labels, and the images of them.

        Returns:
          (images uint8 [count, H, W, C], labels int32 [count] or None), NumPy. The first images are the same for every
          `count`.
        """
        z, drawn = (np.asarray(part) for part in self._jitted_draw(jax.random.key(seed), np.arange(count)))
        labels = drawn if self.num_classes else None
        return self.images(variables, z, labels), labels

    def images(self, variables: Any, z: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """The images, uint8 [N, H, W, C], of latents [N, latent] and labels [N]."""
        parts = []
        for indices, mask in zip(*padded_batches(len(z), self.batch_size)):
            chosen = None if labels is None else labels[indices]
            parts.append(fetch(self._jitted_sample(variables, z[indices], chosen))[mask > 0])
        return np.concatenate(parts)

    def grid(self, seed: int, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(z [rows * columns, latent], labels or None) of a fixed grid; with labels, a column is of one class."""
        z = np.asarray(self._jitted_draw(jax.random.key(seed), np.arange(rows * columns))[0])
        return z, np.tile(np.arange(columns, dtype=np.int32) % self.num_classes, rows) if self.num_classes else None

    def _draw(self, key: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(number: jax.Array) -> tuple[jax.Array, jax.Array]:
            own = jax.random.fold_in(key, number)
            z = jax.random.normal(jax.random.fold_in(own, _LATENT), (self.latent,))
            return z, jax.random.randint(jax.random.fold_in(own, _LABEL), (), 0, max(self.num_classes, 1))

        return jax.vmap(one)(numbers)

    def _sample(self, variables: Any, z: jax.Array, labels: jax.Array | None) -> jax.Array:
        z, labels = shard_batch(self.mesh, (z, labels))
        images = self.sample_fn(variables, z, labels)
        return jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)
