"""Accuracy, clean and attacked: every example once, whatever the batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from convnorm_jax import attacks
from convnorm_jax import mesh as mesh_lib
from convnorm_jax.evaluation.classifier import AttackSettings, Evaluator
from convnorm_jax.models import create_model
from convnorm_jax.steps.classify import make_logits_fn

MEAN, STD = (0.4,), (0.3,)
N = 27
EPSILON, STEP_SIZE = 0.02, 0.007
PGD = AttackSettings('pgd', EPSILON, STEP_SIZE, 3, 1, 'cross_entropy')
FGSM = AttackSettings('fgsm', EPSILON, 0.0, 0, 0, 'margin')

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def net():
    """(logits_fn, variables, split)."""
    random = np.random.default_rng(0)
    model = create_model('simple_cnn', num_classes=10, layer='convnorm', width=4, depth=(1,))
    images = random.integers(0, 256, (N, 8, 8, 1), np.uint8)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(jnp.zeros((1, 8, 8, 1)))
    logits_fn = make_logits_fn(model, MEAN, STD)
    labels = np.asarray(logits_fn(variables, images / np.float32(255)).argmax(-1)).astype(np.int32)
    labels[::4] = (labels[::4] + 1) % 10  # some are wrong
    return logits_fn, variables, {'images': jnp.asarray(images), 'labels': jnp.asarray(labels)}


def evaluator(net, batch_size):
    return Evaluator(net[0], mesh_lib.create_mesh(jax.devices()[:1]), batch_size)


@pytest.mark.parametrize('batch_size', [4, 27, 40])
def test_every_example_counts_once(net, batch_size):
    logits_fn, variables, split = net
    logits = np.float64(logits_fn(variables, split['images'] / np.float32(255)))
    labels = np.asarray(split['labels'])
    losses = scipy.special.logsumexp(logits, axis=-1) - logits[np.arange(N), labels]
    found = evaluator(net, batch_size).evaluate(variables, split)
    np.testing.assert_allclose(found['loss'], losses.mean(), rtol=1e-5)
    assert found['accuracy'] == 20 / 27 and set(found) == {'loss', 'accuracy'}


def test_an_empty_split_has_no_figures(net):
    empty = {'images': net[2]['images'][:0], 'labels': net[2]['labels'][:0]}
    assert evaluator(net, 8).evaluate(net[1], empty) == {}


def test_predict(net):
    logits_fn, variables, split = net
    pixels = np.asarray(split['images'], np.float32) / 255
    found = evaluator(net, 8).predict(variables, pixels)
    assert isinstance(found, np.ndarray) and found.shape == (N,)
    np.testing.assert_array_equal(found, logits_fn(variables, pixels).argmax(-1))
    assert len(np.unique(found)) > 1


def direct(net, attack, count=N):
    """Share still right after one call of the attack on the whole split."""
    logits_fn, variables, split = net
    pixels, labels = split['images'][:count] / np.float32(255), split['labels'][:count]

    def bound(x):
        return logits_fn(variables, x)

    attacked = jax.jit(attack, static_argnums=0)(bound, pixels, labels)
    assert not np.array_equal(attacked, pixels)
    return float((bound(attacked).argmax(-1) == labels).mean())


def pgd_from_the_pictures(logits_fn, images, labels):
    return attacks.pgd(logits_fn, images, labels, epsilon=EPSILON, step_size=STEP_SIZE, steps=3)


@pytest.mark.slow
def test_pgd_equals_one_batch(net):
    key = jax.random.key(5)
    expected = direct(net, lambda f, x, y: attacks.pgd(f, x, y, epsilon=EPSILON, step_size=STEP_SIZE, steps=3, rng=key))
    for batch_size in (8, N):  # an example draws its own start: the batch changes nothing
        found = evaluator(net, batch_size).robust_accuracy(net[1], net[2], PGD, seed=5)
        assert found['accuracy'] == pytest.approx(expected, abs=1e-7) and 0 < expected < 20 / 27
        assert found['examples'] == N and found['seconds'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('examples', [0, 13])
def test_fgsm_on_the_first_so_many(net, examples):
    done = []
    found = evaluator(net, 8).robust_accuracy(
        net[1], net[2], FGSM, seed=0, examples=examples, progress=lambda *a: done.append(a)
    )
    count = 13 if examples == 13 else N
    expected = direct(net, lambda f, x, y: attacks.fgsm(f, x, y, epsilon=EPSILON, loss='margin'), count)
    assert found['examples'] == count and found['accuracy'] == pytest.approx(expected, abs=1e-7)
    assert done[-1] == (count, count) and [d for d, _ in done[:-1]] == list(range(8, count, 8))


def test_attack_images_stay_in_the_ball(net):
    pixels = np.asarray(net[2]['images'][:4], np.float32) / 255
    labels = np.asarray(net[2]['labels'][:4])
    found = evaluator(net, 8).attack_images(net[1], pixels, labels, PGD, seed=0)
    assert isinstance(found, np.ndarray) and found.min() >= 0 and found.max() <= 1
    distance = np.abs(found - pixels).max()
    assert 0.9 * EPSILON < distance < EPSILON + 1e-6


@pytest.fixture
def broken(net):
    """The net with NaN for all logits of every third picture, and the label 0 for all: argmax of NaN is 0."""
    logits_fn, variables, split = net
    mean = np.asarray(split['images'], np.float32).mean((1, 2, 3)) / 255
    limit = float(np.sort(mean)[N // 3])

    def some_nan(variables, pixels):
        logits = logits_fn(variables, pixels).at[:, 0].add(1000)
        return jnp.where(pixels.mean((1, 2, 3))[:, None] < limit, jnp.nan, logits)

    return some_nan, variables, {**split, 'labels': jnp.zeros_like(split['labels'])}


def test_logits_that_are_not_finite_are_wrong(broken):
    found = evaluator(broken, 8)
    assert found.evaluate(broken[1], broken[2])['accuracy'] == pytest.approx(18 / 27)
    weak = AttackSettings('pgd', 1e-7, 1e-7, 1, 1, 'cross_entropy')
    assert found.robust_accuracy(broken[1], broken[2], weak, seed=0)['accuracy'] == pytest.approx(18 / 27)
    predicted = found.predict(broken[1], np.asarray(broken[2]['images'], np.float32) / 255)
    assert (predicted == -1).sum() == 9 and (predicted == 0).sum() == 18


def test_the_accuracy_of_nothing(net):
    empty = {'images': net[2]['images'][:0], 'labels': net[2]['labels'][:0]}
    found = evaluator(net, 8).robust_accuracy(net[1], empty, PGD, seed=0)
    assert np.isnan(found['accuracy']) and found['examples'] == 0
    assert evaluator(net, 8).predict(net[1], np.zeros((0, 8, 8, 1), np.float32)).shape == (0,)


def test_an_example_keeps_its_start_with_another_generator(net):
    with jax.default_prng_impl('rbg'):
        found = [evaluator(net, size).robust_accuracy(net[1], net[2], PGD, seed=5)['accuracy'] for size in (4, N)]
    assert found[0] == pytest.approx(found[1], abs=1e-7) and 0 < found[0] < 20 / 27


def test_strict_promotion(net):
    with jax.numpy_dtype_promotion('strict'):
        found = evaluator(net, 8).robust_accuracy(net[1], net[2], PGD, seed=5)
        assert evaluator(net, 8).evaluate(net[1], net[2])['accuracy'] == 20 / 27
    assert 0 < found['accuracy'] < 20 / 27
