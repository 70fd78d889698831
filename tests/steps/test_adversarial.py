"""Adversarial steps against algorithms written out in NumPy, float64, on a linear classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from scipy.special import log_softmax, softmax

from convnorm_jax.models import create_model
from convnorm_jax.steps import adversarial, classify
from convnorm_jax.steps.state import create_state, make_optimizer

SHAPE, CLASSES, BATCH = (4, 3, 2), 5, 6
MEAN, STD = (0.4, 0.5), (0.2, 0.3)
EPSILON, LEARNING_RATE, MOMENTUM, DECAY = 0.05, 0.3, 0.9, 0.01

pytestmark = pytest.mark.usefixtures('quick_compilation')


class Linear(nn.Module):
    """Logits of normalized images, in float64; counts its training passes in `batch_stats`."""

    @nn.compact
    def __call__(self, images, train):
        passes = self.variable('batch_stats', 'passes', lambda: jnp.zeros(()))
        if train and not self.is_initializing():
            passes.value += 1
        return nn.Dense(CLASSES, param_dtype=jnp.float64)(images.reshape(len(images), -1).astype(jnp.float64))


@pytest.fixture(scope='module')
def problem():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, BATCH, *SHAPE)).astype(np.uint8)
    images[:, :, 0] = 255 * (images[:, :, 0] > 127)  # pixels on the walls of [0, 1]
    return images, random.integers(0, CLASSES, (2, BATCH))


class Reference:
    """The classifier with PyTorch's SGD, in NumPy."""

    def __init__(self, params):
        self.weights = np.array(params['Dense_0']['kernel'], np.float64)
        self.bias = np.array(params['Dense_0']['bias'], np.float64)
        self.momentum = [np.zeros_like(self.weights), np.zeros_like(self.bias)]

    def flat(self, pixels):
        return ((pixels - np.array(MEAN)) / np.array(STD)).reshape(len(pixels), -1)

    def logits(self, pixels):
        return self.flat(pixels) @ self.weights + self.bias

    def pixel_gradient(self, by_logits):
        return (by_logits @ self.weights.T).reshape(-1, *SHAPE) / np.array(STD)

    def loss(self, pixels, labels):
        return -log_softmax(self.logits(pixels), axis=1)[np.arange(len(labels)), labels].mean()

    def by_logits(self, pixels, labels):
        return softmax(self.logits(pixels), axis=1) - np.eye(CLASSES)[labels]

    def update(self, *parts):
        """One step of SGD from (pixels, gradient of the mean loss by the logits) pairs."""
        grads = [sum(self.flat(p).T @ g for p, g in parts), sum(g.sum(0) for _, g in parts)]
        for i, (value, grad) in enumerate(zip((self.weights, self.bias), grads)):
            self.momentum[i] = MOMENTUM * self.momentum[i] + grad + DECAY * value
            value -= LEARNING_RATE * self.momentum[i]


def run(problem, make_step, carried=0, **options):
    """(state after two batches, their metrics, the reference at the start)."""
    with jax.enable_x64(True):
        model, tx = Linear(), make_optimizer('sgd', LEARNING_RATE, momentum=MOMENTUM, weight_decay=DECAY)
        state = create_state(model, tx, SHAPE, 0, carried_batch=carried, use_ema='ema_decay' in options)
        reference, metrics = Reference(state.params), []
        step = make_step(
            model, tx, mean=MEAN, std=STD, augment_fn=lambda key, images: images, epsilon=EPSILON, **options
        )
        step = jax.jit(step)
        for images, labels in zip(*problem):
            state, found = step(state, {'images': images, 'labels': labels})
            metrics.append({name: float(s) / float(n) for name, (s, n) in found.items()})
    return state, metrics, reference


def assert_same(state, reference):
    np.testing.assert_allclose(state.params['Dense_0']['kernel'], reference.weights, rtol=0, atol=2e-6)
    np.testing.assert_allclose(state.params['Dense_0']['bias'], reference.bias, rtol=0, atol=2e-6)


@pytest.mark.parametrize('carry_over', [False, True])
def test_free_is_the_published_algorithm(problem, carry_over):
    state, metrics, reference = run(
        problem, adversarial.make_free_step, BATCH * carry_over, step_size=0.03, replays=3, carry_over=carry_over
    )
    perturbation = np.zeros((BATCH, *SHAPE))
    for (images, labels), found in zip(zip(*problem), metrics):
        pixels, losses = images / 255.0, []
        perturbation = perturbation if carry_over else np.zeros_like(perturbation)
        for _ in range(3):
            attacked = np.clip(pixels + perturbation, 0, 1)
            inside = (pixels + perturbation >= 0) & (pixels + perturbation <= 1)
            by_logits = reference.by_logits(attacked, labels)
            by_pixel = reference.pixel_gradient(by_logits) * inside
            losses.append(reference.loss(attacked, labels))
            reference.update((attacked, by_logits / BATCH))
            perturbation = np.clip(perturbation + 0.03 * np.sign(by_pixel), -EPSILON, EPSILON)
        np.testing.assert_allclose(found['loss'], np.mean(losses), rtol=1e-5)
    assert_same(state, reference)
    assert state.step == 2 and state.model_state['batch_stats']['passes'] == 6
    if carry_over:
        np.testing.assert_allclose(state.perturbation, perturbation, atol=1e-6)
    else:
        assert state.perturbation is None


def test_the_average_counts_every_replay(problem):
    options = {'step_size': 0.03, 'replays': 3, 'ema_decay': 0.3}
    state, _, reference = run(problem, adversarial.make_free_step, **options)
    expected = reference.weights.copy()
    for batch, (images, labels) in enumerate(zip(*problem)):
        pixels, perturbation = images / 255.0, np.zeros((BATCH, *SHAPE))
        for i in range(3):
            attacked, moved = np.clip(pixels + perturbation, 0, 1), pixels + perturbation
            by_logits = reference.by_logits(attacked, labels)
            by_pixel = reference.pixel_gradient(by_logits) * ((moved >= 0) & (moved <= 1))
            reference.update((attacked, by_logits / BATCH))
            perturbation = np.clip(perturbation + 0.03 * np.sign(by_pixel), -EPSILON, EPSILON)
            keep = min(0.3, (1 + 3 * batch + i) / (10 + 3 * batch + i))
            expected = keep * expected + (1 - keep) * reference.weights
    np.testing.assert_allclose(state.ema['Dense_0']['kernel'], expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('make_step', 'options', 'passes'),
    [
        (adversarial.make_free_step, {'replays': 3}, 6),
        (adversarial.make_pgd_step, {'steps': 2}, 2),
        (adversarial.make_trades_step, {'steps': 2, 'beta': 6.0}, 4),
    ],
)
def test_the_averages_statistics_are_of_the_same_passes(problem, make_step, options, passes):
    state, *_ = run(problem, make_step, step_size=0.03, ema_decay=0.9, **options)
    for statistics in (state.model_state, state.ema_state):
        assert statistics['batch_stats']['passes'] == passes


def ascend(reference, pixels, start, labels, step_size, steps, gradient=None):
    attacked = np.clip(start, 0, 1)
    for _ in range(steps):
        by_logits = reference.by_logits(attacked, labels) if gradient is None else gradient(attacked)
        attacked = attacked + step_size * np.sign(reference.pixel_gradient(by_logits))
        attacked = np.clip(np.clip(attacked, pixels - EPSILON, pixels + EPSILON), 0, 1)
    return attacked


@pytest.mark.parametrize(('batch_statistics', 'passes'), [('train', 2), ('eval', 2)])
def test_pgd_trains_on_what_the_attack_finds(problem, monkeypatch, batch_statistics, passes):
    start = 'convnorm_jax.attacks.projections.uniform_start'
    monkeypatch.setattr(start, lambda rng, images, *_: jnp.full_like(images, 0.02))
    state, metrics, reference = run(
        problem, adversarial.make_pgd_step, step_size=0.02, steps=4, batch_statistics=batch_statistics
    )
    for (images, labels), found in zip(zip(*problem), metrics):
        pixels = images / 255.0
        attacked = ascend(reference, pixels, pixels + 0.02, labels, 0.02, 4)
        np.testing.assert_allclose(found['loss'], reference.loss(attacked, labels), rtol=1e-5)
        correct = reference.logits(attacked).argmax(1) == labels
        assert found['accuracy'] == pytest.approx(correct.mean())
        reference.update((attacked, reference.by_logits(attacked, labels) / BATCH))
    assert_same(state, reference)
    assert state.model_state['batch_stats']['passes'] == passes  # the attack's own passes leave no trace


def test_fast_is_one_step_of_the_published_length(problem, monkeypatch):
    start = 'convnorm_jax.attacks.projections.uniform_start'
    monkeypatch.setattr(start, lambda rng, images, *_: jnp.full_like(images, 0.01))
    state, _, reference = run(problem, adversarial.make_fast_step)
    for images, labels in zip(*problem):
        pixels = images / 255.0
        attacked = ascend(reference, pixels, pixels + 0.01, labels, 1.25 * EPSILON, 1)
        reference.update((attacked, reference.by_logits(attacked, labels) / BATCH))
    assert_same(state, reference)


def test_trades_is_the_published_algorithm(problem, monkeypatch):
    noise = np.random.default_rng(5).normal(size=(BATCH, *SHAPE))
    monkeypatch.setattr(adversarial.jax.random, 'normal', lambda key, shape: jnp.asarray(noise))
    beta = 4.0
    state, metrics, reference = run(problem, adversarial.make_trades_step, step_size=0.02, steps=3, beta=beta)
    for (images, labels), found in zip(zip(*problem), metrics):
        pixels = images / 255.0
        clean = softmax(reference.logits(pixels), axis=1)
        # The gradient of KL(p || q) by the logits of q is q - p.
        attacked = ascend(
            reference, pixels, pixels + 1e-3 * noise, labels, 0.02, 3,
            lambda x, clean=clean: softmax(reference.logits(x), axis=1) - clean,
        )  # fmt: skip
        log_p, log_q = (log_softmax(reference.logits(x), axis=1) for x in (pixels, attacked))
        p, q = np.exp(log_p), np.exp(log_q)
        divergence = (p * (log_p - log_q)).sum(1)
        np.testing.assert_allclose(found['loss'], reference.loss(pixels, labels) + beta * divergence.mean(), rtol=1e-5)
        assert found['accuracy'] == pytest.approx((p.argmax(1) == labels).mean())
        by_clean = reference.by_logits(pixels, labels) + beta * p * (log_p - log_q - divergence[:, None])
        reference.update((pixels, by_clean / BATCH), (attacked, beta * (q - p) / BATCH))
    assert_same(state, reference)
    assert state.model_state['batch_stats']['passes'] == 4  # clean and attacked, two batches


def test_divergence_is_scipys():
    random = np.random.default_rng(6)
    a, b = random.normal(size=(2, 7, 4)).astype(np.float32)
    p, q = softmax(a.astype(np.float64), axis=1), softmax(b.astype(np.float64), axis=1)
    np.testing.assert_allclose(adversarial.divergence(a, b), (p * np.log(p / q)).sum(1), rtol=1e-5)


def test_what_the_attack_sees():
    """In training mode its own batch, in evaluation mode the running statistics."""
    model = create_model('simple_cnn2', num_classes=CLASSES, layer='batchnorm', width=4)
    tx = optax.sgd(0.1)
    state = jax.jit(lambda: create_state(model, tx, (32, 32, 3), 0))()
    pixels = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    seen = {
        mode: jax.jit(adversarial._make_attacked_logits(model, (0.5,) * 3, (0.2,) * 3, mode))(state, pixels)
        for mode in adversarial.BATCH_STATISTICS
    }
    variables = {'params': state.params, **state.model_state}
    images = (pixels - 0.5) / 0.2
    expected = jax.jit(lambda variables, images: model.apply(variables, images, train=False))(variables, images)
    np.testing.assert_allclose(seen['eval'], expected, atol=1e-4)
    expected, _ = jax.jit(lambda *given: classify.train_logits(model, *given))(state.params, state.model_state, images)
    np.testing.assert_allclose(seen['train'], expected, atol=1e-4)
    assert np.abs(seen['train'] - seen['eval']).max() > 0.1
    with pytest.raises(ValueError, match='batch_statistics='):
        adversarial._make_attacked_logits(model, 0.5, 0.2, 'both')
