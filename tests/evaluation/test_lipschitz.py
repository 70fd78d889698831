"""Lower bounds on Lipschitz constants against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.evaluation.lipschitz import lipschitz_lower_bound

pytestmark = pytest.mark.usefixtures('quick_compilation')

KEY = jax.random.key(0)


def images(count=4):
    return jnp.asarray(np.random.default_rng(0).uniform(0.3, 0.7, (count, 4, 4, 2)), jnp.float32)


def test_of_a_linear_net_it_is_the_largest_singular_value():
    matrix = np.random.default_rng(1).normal(size=(32, 5))
    found = lipschitz_lower_bound(lambda x: x.reshape(len(x), -1) @ jnp.asarray(matrix, jnp.float32), images(), rng=KEY)
    norm = np.linalg.norm(matrix, 2)
    assert found.shape == (4,) and np.all(np.asarray(found) <= norm * (1 + 1e-4))
    np.testing.assert_allclose(found, norm, rtol=0.01)


def test_every_point_is_an_image():
    """The net is steep outside [0, 1] alone."""
    steep = lambda x: jnp.where((x < 0) | (x > 1), 1e6, 0.5 * x).reshape(len(x), -1)
    edge = images().at[:2].set(jnp.round(images()[:2]))
    found = lipschitz_lower_bound(steep, edge, rng=KEY)
    np.testing.assert_allclose(found, 0.5, rtol=1e-3)


def test_the_ascent_finds_what_the_jacobian_at_the_image_does_not():
    """0.1 (x - 0.5) but above 0.8, where the slope is 10: from 0.7 the gradient at the image knows nothing of it."""

    def kinked(x):
        total = x.reshape(len(x), -1).mean(1, keepdims=True)
        return jnp.where(total < 0.8, 0.1 * total, 10 * (total - 0.8) + 0.08)

    x = jnp.full((1, 4, 4, 2), 0.75)
    found = float(lipschitz_lower_bound(kinked, x, rng=KEY, steps=60)[0])
    flat, steep = 0.1 / np.sqrt(32), 10 / np.sqrt(32)
    assert 5 * flat < found <= steep * (1 + 1e-4)


def test_of_a_constant_net_it_is_zero():
    found = lipschitz_lower_bound(lambda x: jnp.zeros((len(x), 3)) + 0 * x.sum((1, 2, 3))[:, None], images(), rng=KEY)
    np.testing.assert_array_less(np.asarray(found), 1e-6)


def test_an_example_keeps_its_own_when_jitted():
    net = lambda x: jnp.tanh(x.reshape(len(x), -1) @ jnp.ones((32, 3)))
    found = lipschitz_lower_bound(net, images(), rng=KEY)
    np.testing.assert_allclose(jax.jit(lambda x: lipschitz_lower_bound(net, x, rng=KEY))(images()), found, rtol=1e-4)
