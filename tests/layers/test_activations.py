"""The published nets' activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.layers import activations

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(seed, *shape):
    return 2 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_relu():
    relu = activations.make_activation('relu')()
    x = random(0, 2, 3, 3, 4)
    assert not relu.init(jax.random.key(0), x)
    np.testing.assert_array_equal(relu.apply({}, x), np.maximum(x, 0))


def test_shifted_relu():
    relu = activations.make_activation('shifted_relu')()
    x = random(1, 2, 3, 3, 4)
    variables = relu.init(jax.random.key(0), x)
    assert set(variables) == {'params'} and set(variables['params']) == {'shift'}
    np.testing.assert_array_equal(variables['params']['shift'], np.full(4, -1, np.float32))
    shift = np.array([-1, 0, 0.5, -2], np.float32)
    y = relu.apply({'params': {'shift': shift}}, x)
    np.testing.assert_allclose(y, np.maximum(x - shift, 0) + shift, atol=1e-6)  # one float32 rounding of values to 8
    np.testing.assert_allclose(y, np.maximum(x, shift), atol=1e-6)


def test_shifted_relu_gradient():
    # Of max(x, b): to x where x > b, to b elsewhere.
    relu = activations.ShiftedReLU()
    x, cotangent = random(2, 2, 3, 3, 4), random(3, 2, 3, 3, 4)
    shift = np.array([-1, 0, 0.5, -2], np.float32)
    _, back = jax.vjp(lambda s, x: relu.apply({'params': {'shift': s}}, x), shift, x)
    grad_shift, grad_x = back(cotangent)
    above = x > shift
    np.testing.assert_array_equal(grad_x, np.where(above, cotangent, 0))
    np.testing.assert_allclose(grad_shift, np.where(above, 0, cotangent).sum((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize('name', activations.ACTIVATIONS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_keeps_the_dtype(name, dtype):
    layer = activations.make_activation(name)()
    y, variables = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), jnp.zeros((2, 4), dtype)))
    assert y.dtype == dtype
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"activation='gelu'.*relu.*shifted_relu"):
        activations.make_activation('gelu')
