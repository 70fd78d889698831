"""Dtypes of sums and of statistics."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Returns float32, or `dtype` if that is wider: the dtype of sums, statistics and transforms."""
    return wider(dtype, jnp.float32)


def wider(a: DTypeLike, b: DTypeLike) -> jnp.dtype:
    """Returns the wider of two float dtypes, `a` if they are equally wide.

    Unlike `jnp.promote_types` it does not raise under `jax_numpy_dtype_promotion='strict'`.
    """
    a, b = jnp.dtype(a), jnp.dtype(b)
    return b if b.itemsize > a.itemsize else a


def widened(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns x, cast to `dtype` if that is a wider float dtype."""
    return x.astype(wider(x.dtype, dtype)) if jnp.issubdtype(dtype, jnp.floating) else x
