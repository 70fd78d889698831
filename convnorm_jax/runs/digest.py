"""Checksums of arrays, computed on the device and independent of the sharding."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.mesh import fetch


def structure(tree: Any) -> int:
    """A checksum of the names, shapes and dtypes of a tree's leaves.

    Args:
      tree: pytree of arrays or ShapeDtypeStructs.

    Returns:
      int in [0, 2^32).
    """
    leaves = [f'{name} {leaf.shape} {leaf.dtype}' for name, leaf in named_leaves(jax.eval_shape(lambda x: x, tree))]
    return zlib.crc32('\n'.join(sorted(leaves)).encode())


def digest(tree: Any) -> int:
    """A checksum of every bit of a tree's arrays; any single flipped bit changes it.

    It depends on neither the sharding nor the number of devices, because it is a sum modulo 2^32. Collective: of
    several processes, all must call it.

    Args:
      tree: pytree of arrays: numbers, bool, typed PRNG keys.

    Returns:
      int in [0, 2^32).
    """
    return int(np.asarray(fetch(_digest(tree))))


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """[('state/params/conv/kernel', leaf), ...]: names that are the same for dicts, tuples and dataclasses."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]


@jax.jit
def _digest(tree):
    total = jnp.uint32(0)
    for name, leaf in named_leaves(tree):
        words = _words(leaf)
        position = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
        # Odd weights are invertible modulo 2^32, so that any change of one word is seen. They are scrambled, so that
        # two words, or two arrays, that change places are seen too.
        weights = _scramble(position + jnp.uint32(zlib.crc32(name.encode()))) | 1
        total += jnp.sum(words * weights, dtype=jnp.uint32)
    return total


def _words(leaf):
    """The bits of an array as uint32, one or more words for each entry."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    bits = min(
        32, jnp.finfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).bits
    )
    return jax.lax.bitcast_convert_type(leaf, f'uint{bits}').astype(jnp.uint32)


def _scramble(x):
    # The finalizer of MurmurHash3, a bijection of uint32.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
