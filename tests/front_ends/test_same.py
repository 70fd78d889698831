"""Functions, Linen, NNX and Equinox: the same bits from the same parameters, in training and at inference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.front_ends.libraries import LAYERS, build, images
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')


def ten_steps(layer, name):
    """(losses, parameters, state, output at inference) after ten steps of SGD."""
    tx = optax.sgd(0.05)

    @jax.jit
    def step(params, state, opt_state, x):
        def loss_of(params):
            y, changed = layer.apply(params, state, x, True)
            return jnp.sin(y).sum(), changed

        (loss, changed), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state)
        return optax.apply_updates(params, updates), changed, opt_state, loss

    params, state, losses = layer.params, layer.state, []
    opt_state = tx.init(params)
    for seed in range(10):
        params, state, opt_state, loss = step(params, state, opt_state, images(name, seed))
        losses.append(loss)
    y, after = jax.jit(lambda *given: layer.apply(*given, False))(params, state, images(name, 11))
    jax.tree.map(np.testing.assert_array_equal, after, state)  # inference changes nothing
    return losses, params, state, y


@pytest.mark.parametrize('name', few(LAYERS, 'plain', 'sequence', 'transposed'))
def test_ten_steps_and_inference(name):
    expected = ten_steps(build('linen', name), name)
    assert expected[2]['count'] == 10
    for library in ('functional', 'nnx', 'equinox'):
        jax.tree.map(np.testing.assert_array_equal, ten_steps(build(library, name), name), expected)
