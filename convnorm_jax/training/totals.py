"""Metrics as running (sum, count) pairs."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp


def zero_totals(names: Iterable[str]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Running (sum, count) pairs of these metrics, all zero."""
    return {name: (jnp.zeros(()), jnp.zeros(())) for name in names}


def means(totals: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, float]:
    """Host floats sum / count of (sum, count) pairs; NaN where the count is 0."""
    pairs = jax.device_get(totals)
    return {name: float(s) / float(n) if n else float('nan') for name, (s, n) in pairs.items()}
