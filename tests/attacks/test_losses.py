"""Losses, balls, keys: against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.attacks import inputs, losses, projections
from tests.selection import few


@pytest.fixture(scope='module')
def problem():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(40, 6)).astype(np.float32), random.integers(0, 6, 40)
    return logits, labels, (labels + random.integers(1, 6, 40)) % 6


def written_out(logits, label, target):
    """DLR and its targeted form as equations 6 and 7 of arXiv 2003.01690 have them, float64, one example."""
    z = logits.astype(np.float64)
    first, _, third, fourth = np.sort(z)[::-1][:4]
    other = max(z[i] for i in range(len(z)) if i != label)
    return -(z[label] - other) / (first - third), -(z[label] - z[target]) / (first - 0.5 * (third + fourth))


def test_dlr_is_the_published_equation(problem):
    logits, labels, targets = problem
    expected = np.array([written_out(*example) for example in zip(logits, labels, targets)])
    np.testing.assert_allclose(losses.attack_loss(logits, labels, 'dlr'), expected[:, 0], rtol=1e-5, atol=1e-6)
    found = losses.targeted_loss(logits, labels, targets, 'dlr')
    np.testing.assert_allclose(found, expected[:, 1], rtol=1e-5, atol=1e-6)


def test_dlr_does_not_see_the_scale_of_the_logits(problem):
    logits, labels, _ = problem
    plain, scaled = (losses.attack_loss(scale * logits, labels, 'dlr') for scale in (1, 1000))
    np.testing.assert_allclose(scaled, plain, rtol=1e-4)


def test_targeted_losses(problem):
    logits, labels, targets = problem
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    np.testing.assert_allclose(
        losses.targeted_loss(logits, labels, targets, 'cross_entropy'), np.log(probabilities[rows, targets]), rtol=1e-5
    )
    margin = losses.targeted_loss(logits, labels, targets, 'margin')
    assert ((np.asarray(margin) > 0) == (logits.argmax(1) == targets)).all()


def test_wrong_classes_are_in_the_order_of_their_logits(problem):
    logits, labels, _ = problem
    found = np.stack([losses.nth_wrong_class(logits, labels, n) for n in range(5)], axis=1)
    for row, label, order in zip(logits, labels, found):
        assert list(order) == [c for c in np.argsort(-row) if c != label]


def test_classes_too_few_for_dlr():
    with pytest.raises(ValueError, match='K at least 3'):
        losses.attack_loss(jnp.zeros((2, 2)), jnp.zeros(2, int), 'dlr')
    with pytest.raises(ValueError, match='K at least 4'):
        losses.targeted_loss(jnp.zeros((2, 3)), jnp.zeros(2, int), jnp.ones(2, int), 'dlr')


@pytest.mark.parametrize('norm', inputs.NORMS)
def test_projection(norm):
    random = np.random.default_rng(1)
    images = random.uniform(size=(20, 3, 3, 2)).astype(np.float32)
    far = images + random.normal(size=images.shape).astype(np.float32)
    radius = 0.05 if norm == 'linf' else 0.4
    found = np.asarray(projections.project(far, images, radius, norm))
    order = np.inf if norm == 'linf' else 2
    length = np.linalg.norm((found - images).reshape(20, -1).astype(np.float64), order, axis=1)
    np.testing.assert_allclose(projections.norm_of(found - images, norm), length, rtol=1e-5)
    assert length.max() <= radius * (1 + 1e-5) and found.min() >= 0 and found.max() <= 1
    near = np.clip(images + 1e-3 * (far - images), 0, 1)
    np.testing.assert_allclose(projections.project(near, images, radius, norm), near, atol=1e-7)
    # The same image, not NaN, from a difference of zero.
    np.testing.assert_array_equal(projections.project(images, images, radius, norm), images)


@pytest.mark.parametrize('norm', few(inputs.NORMS, 'linf'))
def test_random_start_is_uniform_in_the_ball_and_an_example_keeps_its_own(norm):
    images = jnp.zeros((500, 4, 4, 1))
    keys = inputs.example_keys(jax.random.key(0), 500)
    start = jax.jit(lambda keys, images: projections.uniform_start(keys, images, 0.2, norm))
    noise = np.asarray(start(keys, images))
    length = np.asarray(projections.norm_of(noise, norm)) / 0.2
    assert length.max() <= 1
    # The length of a point uniform in a ball of 16 dimensions, in either norm: its 16th power is uniform.
    np.testing.assert_allclose(np.mean(length**16), 0.5, atol=0.04)
    np.testing.assert_allclose(start(keys[7:9], images[:2]), noise[7:9], rtol=1e-5)
    np.testing.assert_array_equal(start(jax.random.key(0), images), noise)


def test_steepest_directions():
    gradient = jnp.asarray(np.random.default_rng(2).normal(size=(5, 2, 2, 3)))
    assert set(np.unique(projections.steepest(gradient, 'linf'))) == {-1, 1}
    unit = projections.steepest(gradient, 'l2')
    np.testing.assert_allclose(projections.l2_norm(unit), 1, rtol=1e-6)
    np.testing.assert_allclose(unit * projections.expand(projections.l2_norm(gradient)), gradient, rtol=1e-5)
    assert not np.asarray(projections.steepest(jnp.zeros((5, 2, 2, 3)), 'l2')).any()


def test_gradient_is_of_the_sum():
    images = jnp.asarray(np.random.default_rng(3).uniform(size=(4, 2, 2, 1)))
    loss, logits, gradient = losses.value_and_gradient(
        lambda x: x.reshape(4, -1) ** 2, images, lambda logits: logits.sum(1)
    )
    np.testing.assert_allclose(gradient, 2 * images, rtol=1e-6)
    np.testing.assert_allclose(loss, logits.sum(1), rtol=1e-6)
