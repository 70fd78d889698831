"""Metrics as running (sum, count) pairs."""

import jax
import jax.numpy as jnp


def zero_totals(names):
    """Running (sum, count) pairs of the metrics of these names, all zero."""
    return {name: (jnp.zeros(()), jnp.zeros(())) for name in names}


def means(totals):
    """Host floats sum / count of (sum, count) pairs; NaN where the count is 0."""
    totals = jax.device_get(totals)
    return {name: float(s) / float(n) if n else float('nan') for name, (s, n) in totals.items()}
