"""In which dtype numbers are summed and kept."""

import jax
import jax.numpy as jnp


def at_least_float32(dtype) -> jnp.dtype:
    """float32, or the dtype itself if that is wider: of sums, statistics and transforms.

    (`jnp.promote_types` raises for two dtypes under `jax_numpy_dtype_promotion='strict'`.)
    """
    return wider(dtype, jnp.float32)


def wider(a, b) -> jnp.dtype:
    """The wider of two float dtypes, the first of two as wide."""
    a, b = jnp.dtype(a), jnp.dtype(b)
    return b if b.itemsize > a.itemsize else a


def widened(x: jax.Array, dtype) -> jax.Array:
    """x in `dtype` if that is a wider float."""
    return x.astype(wider(x.dtype, dtype)) if jnp.issubdtype(dtype, jnp.floating) else x
