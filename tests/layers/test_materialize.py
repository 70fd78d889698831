"""What XLA:CPU makes of `materialize`: an array computed once, whatever reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.layers.materialize import materialize, materialized_output


def readers(y):
    """An output, a transpose and a sum of y: XLA:CPU makes a fusion of each."""
    return (jnp.maximum(y, 0) ** 2).sum(), jnp.roll(y, 1, 0).T, y


@pytest.mark.parametrize('form', [materialize, materialized_output])
def test_computed_once_for_all_readers(form):
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    loss = lambda x, other: readers(form(jnp.sin(x) * 2 + 1, other))[:2]
    sines = {}
    for name, function in {'kept': loss, 'not kept': lambda x, other: readers(jnp.sin(x) * 2 + 1)[:2]}.items():
        compiled = jax.jit(jax.value_and_grad(function, has_aux=True)).lower(x, 1.0).compile()
        sines[name] = compiled.as_text().count(' sine(')
    assert sines['kept'] == 1 < sines['not kept']


@pytest.mark.parametrize('form', [materialize, materialized_output])
def test_it_is_x_to_the_last_bit(form):
    x = np.random.default_rng(1).standard_normal((5, 7)).astype(np.float32)
    x[0, :3] = np.inf, 1e-30, np.nan  # XLA:CPU flushes smaller ones to 0 anyway
    np.testing.assert_array_equal(jax.jit(form)(x, 3.0), x)
    gradient = jax.grad(lambda x: (form(x, 3.0) * jnp.arange(7.0)).sum())(np.ones((5, 7), np.float32))
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.arange(7.0), (5, 7)))
    assert np.isnan(jax.jit(materialize)(x, np.nan)).all()
