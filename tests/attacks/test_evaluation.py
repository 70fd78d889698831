"""The evaluation of any net: on classifiers whose robustness is known, and what people get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from convnorm_jax import attacks
from convnorm_jax.attacks.auto_attack import checks
from convnorm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_compilation', 'short_programs')

N, SHAPE, CLASSES = 24, (4, 4, 1), 3
SMALL = {'steps': 10, 'queries': 100, 'batch_size': 10, 'log': lambda line: None}


@pytest.fixture(scope='module')
def problem():
    """(images of 8 bits, labels, a linear net, the linf distance to the nearest other class [N])"""
    random = np.random.default_rng(0)
    images = (random.integers(100, 156, (N, *SHAPE)) / 255).astype(np.float32)
    weights = random.normal(size=(np.prod(SHAPE), CLASSES))
    logits = (images.reshape(N, -1).astype(np.float64) - 0.5) @ weights
    labels = logits.argmax(1)
    gap = logits[np.arange(N), labels][:, None] - logits
    gap[np.arange(N), labels] = np.inf
    slopes = np.abs(weights.T[labels][:, None] - weights.T[None]).sum(2)
    net = lambda x: (x.reshape(len(x), -1) - 0.5) @ jnp.asarray(weights, jnp.float32)
    return images, labels, net, (gap / np.maximum(slopes, 1e-9)).min(1)


@pytest.fixture(scope='module')
def found(problem):
    images, labels, net, radius = problem
    return attacks.evaluate(net, images, labels, epsilon=float(np.median(radius)), **SMALL)


def test_just_what_can_be_broken_is_broken(problem, found):
    images, labels, net, radius = problem
    epsilon = np.median(radius)
    certain = np.abs(radius / epsilon - 1) > 0.01
    np.testing.assert_array_equal(found.robust[certain], radius[certain] > epsilon)
    assert found.robust_accuracy == found.robust.mean() and found.examples == N
    np.testing.assert_array_equal(np.asarray(net(found.images)).argmax(1) == labels, found.robust)
    assert np.abs(found.images - images).max() <= epsilon * 1.0001
    np.testing.assert_array_equal(found.images[found.robust], images[found.robust])
    interval = stats.binomtest(int(found.robust.sum()), N).proportion_ci(0.95, 'wilson')
    assert found.interval == (interval.low, interval.high)


def test_the_table(found):
    assert [name for name, *_ in found.rows] == ['clean', 'FGSM', 'PGD-20 x 5', 'AutoAttack']
    accuracies = [accuracy for _, accuracy, _ in found.rows]
    assert accuracies[0] == 1 and accuracies[1] >= accuracies[2] and found.robust_accuracy == min(accuracies)
    text = str(found)
    assert f'robust accuracy {100 * found.robust_accuracy:.2f} % (95 % interval' in text and '24 images, linf' in text


def test_in_l2_there_is_no_fgsm(problem):
    images, labels, net, _ = problem
    found = attacks.evaluate(net, images, labels, epsilon=0.05, norm='l2', attacks=('apgd-ce',), **SMALL)
    assert [name for name, *_ in found.rows] == ['clean', 'PGD-20 x 5', 'AutoAttack']


@pytest.mark.parametrize(
    ('net', 'labels', 'words'),
    [
        (lambda net: net, np.zeros(N, int), 'all images are of class 0'),
        (lambda net: lambda x: net((x - 0.5) / 0.2 + 40), None, 'near chance'),
        (lambda net: lambda x: jax.nn.softmax(net(x)), None, 'probabilities'),
        (lambda net: lambda x: net(x) - 20 * net(x).mean(0), None, 'depends on the rest of its batch'),
    ],
    ids=['one class', 'no normalization', 'probabilities', 'batch statistics'],
)
def test_what_people_get_wrong_is_said(problem, net, labels, words):
    images, right, linear, _ = problem
    labels = (right + (words == 'near chance')) % CLASSES if labels is None else labels
    found = attacks.evaluate(net(linear), images, labels, epsilon=0.001, attacks=('apgd-ce',), **SMALL)
    assert any(words in warning for warning in found.warnings), found.warnings


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda x, y: (x * 255, y), 'pixels between'),
        (lambda x, y: ((x * 255).astype(np.uint8), y), 'divide those of 0 to 255 by 255'),
        (lambda x, y: (x, y + 1), 'labels'),
        (lambda x, y: (x, np.eye(CLASSES)[y]), 'labels.shape'),
        (lambda x, y: (x, y.astype(float)), 'labels.dtype'),
        (lambda x, y: (x[0], y), 'images.shape'),
    ],
    ids=['0 to 255', 'uint8', 'from 1', 'one-hot', 'float labels', 'one image'],
)
def test_wrong_examples_are_refused(problem, change, words):
    images, labels, net, _ = problem
    with pytest.raises(UserError, match=words):
        attacks.evaluate(net, *change(images, labels), epsilon=0.1, **SMALL)


def test_found_images_are_looked_at_again(problem):
    """A net whose logits depend on the order of a batch, and one that sees less than 8 bits."""
    images, labels, net, _ = problem
    found = attacks.run_ensemble(
        lambda x: net(x).at[0].multiply(-1), images, labels, epsilon=1e-4, rng=jax.random.key(0),
        attacks=('apgd-ce',), **SMALL,
    )  # fmt: skip
    assert found.accuracy_again != found.robust_accuracy
    assert any('evaluated again in other batches' in warning for warning in found.warnings)
    # Half a grey level breaks what rounding mends.
    fine = lambda x: jnp.stack([0 * x.mean((1, 2, 3)), (x - jnp.round(255 * x) / 255).mean((1, 2, 3)) - 1e-3], 1)
    found = attacks.run_ensemble(
        fine, images, np.zeros(N, int), epsilon=1.9e-3,
        rng=jax.random.key(0), attacks=('apgd-ce',), **SMALL,
    )  # fmt: skip
    assert found.robust_accuracy < 0.5 and found.accuracy_again == found.robust_accuracy
    assert found.accuracy_rounded == 1 and any('rounded to 8 bits' in warning for warning in found.warnings)


def test_images_that_are_not_of_8_bits_are_not_rounded(problem):
    images, labels, net, _ = problem
    found = attacks.run_ensemble(
        net, images * 0.999, labels, epsilon=1e-4, rng=jax.random.key(0), attacks=('apgd-ce',), **SMALL
    )
    assert found.accuracy_rounded is None


def test_the_words_of_a_difference():
    (words,) = checks.check_found(0.5, 0.6, None, 20)
    assert '2 of 20 images' in words
    assert checks.check_found(0.5, 0.5, 0.5, 20) == []
