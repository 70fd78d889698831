"""Examples in batches of one size, on the devices, and the states of an attack that belong to them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Batches:
    """How examples are batched.

    Attributes:
      size: examples of a batch.
      sharding: of its first axis; None for one device.
    """

    size: int
    sharding: jax.sharding.Sharding | None = None

    @property
    def platform(self) -> str:
        """That the programs will run on: 'cpu', 'gpu', 'tpu'."""
        devices = jnp.zeros(()).devices() if self.sharding is None else self.sharding.device_set
        return next(iter(devices)).platform  # type: ignore[attr-defined]  # jax.Device is opaque to mypy

    def packs(self, examples: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (some examples, the same filled up to a whole batch with the first of them)."""
        for first in range(0, len(examples), self.size):
            chosen = examples[first : first + self.size]
            yield chosen, np.concatenate([chosen, np.repeat(chosen[:1], self.size - len(chosen))])

    def place(self, tree: Any) -> Any:
        """The arrays of a tree on the devices; the first axis is cut over them."""
        sharding = self.sharding
        if sharding is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.tree.map(lambda a: mesh_lib.place(a, sharding) if np.ndim(a) else jnp.asarray(a), tree)

    def rows(self, kept: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
        """The leaves of the state of pack `number`, filled up as the pack is; scalars as they are."""

        def cut(leaf):
            part = leaf[number * self.size : (number + 1) * self.size]
            return np.concatenate([part, np.repeat(part[:1], self.size - len(part), axis=0)])

        return [cut(leaf) if np.ndim(leaf) else leaf for leaf in kept]


def joined(packs: Sequence[Sequence[np.ndarray]], robust: np.ndarray) -> list[np.ndarray]:
    """The states of the examples that are still robust, leaf by leaf.

    Args:
      packs: the leaves of each pack's state, without what it was filled up with.
      robust: bool, one for each example of all packs.
    """
    return [np.concatenate(leaves)[robust] if np.ndim(leaves[0]) else leaves[0] for leaves in zip(*packs)]
