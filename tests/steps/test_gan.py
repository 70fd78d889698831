"""The step of a GAN, against updates worked out by hand in float64, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.models import create_gan
from convnorm_jax.steps import gan, gan_losses

pytestmark = pytest.mark.usefixtures('quick_compilation')

LATENT, SHAPE = 3, (4, 4, 1)
RATE = 0.1


class LinearGenerator(nn.Module):
    """Pictures z W."""

    @nn.compact
    def __call__(self, z, labels=None, train=False):
        w = self.param('w', nn.initializers.normal(0.3), (LATENT, 16))
        return (z @ w).reshape(-1, *SHAPE)


class LinearDiscriminator(nn.Module):
    """Logits <w, x>."""

    @nn.compact
    def __call__(self, images, labels=None, train=False):
        return images.reshape(len(images), -1) @ self.param('w', nn.initializers.normal(0.3), (16,))


def images_and_labels(count, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'images': rng.integers(0, 256, (count, *shape)).astype(np.uint8),
        'labels': rng.integers(0, 10, count).astype(np.int32),
    }


def linear(**options):
    nets = LinearGenerator(), LinearDiscriminator()
    tx = optax.sgd(RATE), optax.sgd(RATE)
    state = gan.create_gan_state(*nets, *tx, input_shape=SHAPE, latent=LATENT, seed=0, use_ema=True)
    return state, gan.make_gan_step(*nets, *tx, latent=LATENT, **options)


def latents(key, batch):
    return np.asarray(jax.random.normal(jax.random.split(key)[0], (batch, LATENT)), np.float64)


@pytest.mark.parametrize('n_dis', [1, 3])
def test_wasserstein_updates_by_hand(n_dis):
    state, step = linear(loss='wasserstein', n_dis=n_dis, ema_decay=0.9)
    batch = images_and_labels(4 * n_dis)
    after, metrics = jax.jit(step)(state, batch)
    w_g, w_d = (np.asarray(net.params['w'], np.float64) for net in (state.generator, state.discriminator))
    real = 2 * batch['images'].reshape(len(batch['images']), -1).astype(np.float64) / 255 - 1
    key = jax.random.fold_in(state.rng, 0)
    losses = []
    for i in range(n_dis):
        fake = latents(jax.random.split(jax.random.fold_in(key, i), 4)[0], 4) @ w_g
        mine = real[i::n_dis]  # the loss is mean D(fake) - mean D(real), linear in w
        losses.append((fake @ w_d).mean() - (mine @ w_d).mean())
        w_d = w_d - RATE * (fake.mean(0) - mine.mean(0))
    np.testing.assert_allclose(after.discriminator.params['w'], w_d, rtol=0, atol=1e-6)
    z = latents(jax.random.split(jax.random.fold_in(key, n_dis))[0], 4)
    moved = w_g + RATE * np.outer(z.mean(0), w_d)
    np.testing.assert_allclose(after.generator.params['w'], moved, rtol=0, atol=1e-6)
    # The average keeps the first share (1 + n) / (10 + n) at update n, here of number 0.
    np.testing.assert_allclose(after.ema['params']['w'], 0.1 * w_g + 0.9 * moved, rtol=0, atol=1e-6)
    total, count = metrics['discriminator_loss']
    assert (float(count), int(after.step)) == (n_dis, 1)
    assert float(total) == pytest.approx(sum(losses), abs=1e-5)
    assert float(metrics['generator_loss'][0]) == pytest.approx(-(z @ w_g @ w_d).mean(), abs=1e-5)
    assert set(metrics) == set(gan.METRICS)


def test_the_gradient_penalty_is_added_with_its_weight():
    batch = images_and_labels(4)
    plain, penalized = (
        jax.jit(linear(loss='hinge', n_dis=1, gradient_penalty=w)[1])(linear(loss='hinge', n_dis=1)[0], batch)[1]
        for w in (0.0, 2.0)
    )
    w = np.asarray(linear(loss='hinge', n_dis=1)[0].discriminator.params['w'], np.float64)
    # A linear critic has the gradient w everywhere.
    expected = 2.0 * (np.sqrt((w**2).sum()) - 1) ** 2
    assert float(penalized['discriminator_loss'][0] - plain['discriminator_loss'][0]) == pytest.approx(
        expected, rel=1e-4
    )


def test_a_penalty_of_the_parameters_is_added():
    state, step = linear(loss='hinge', n_dis=1, penalty_fn=lambda params: 3 * jnp.square(params['w']).sum())
    _, metrics = jax.jit(step)(state, images_and_labels(4))
    _, plain = jax.jit(linear(loss='hinge', n_dis=1)[1])(state, images_and_labels(4))
    added = 3 * np.square(np.asarray(state.discriminator.params['w'], np.float64)).sum()
    assert float(metrics['discriminator_loss'][0] - plain['discriminator_loss'][0]) == pytest.approx(added, rel=1e-4)


@functools.cache
def real_nets(layer, num_classes=0):
    return create_gan(
        'sngan',
        picture_shape=(8, 8, 1),
        latent=4,
        num_classes=num_classes,
        discriminator_layer=layer,
        generator_width=4,
        discriminator_width=4,
    )


def real_step(layer, num_classes=0, n_dis=2, shard_fn=lambda tree: tree, **options):
    nets = real_nets(layer, num_classes)
    tx = optax.adam(1e-3, b1=0.0, b2=0.9), optax.adam(1e-3, b1=0.0, b2=0.9)
    state = gan.create_gan_state(*nets, *tx, input_shape=(8, 8, 1), latent=4, seed=1, use_ema=True)
    step = gan.make_gan_step(
        *nets, *tx, loss='hinge', n_dis=n_dis, latent=4, num_classes=num_classes, shard_fn=shard_fn, **options
    )
    return state, step


def largest_difference(one, other):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


@pytest.mark.slow
@pytest.mark.parametrize('layer', ['convnorm', pytest.param('spectralnorm', marks=pytest.mark.beyond)])
def test_both_nets_learn_and_count_their_own_updates(layer):
    state, step = real_step(layer)
    after, _ = jax.jit(step)(state, images_and_labels(8, (8, 8, 1)))
    for net in 'generator', 'discriminator':
        before = getattr(state, net).params
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, getattr(after, net).params)
        # Within its margin the hinge loss does not see a bias of all logits.
        moved.get('head', {}).get('linear', {}).pop('bias', None)
        assert all(jax.tree.leaves(moved)), (net, moved)
    if layer == 'convnorm':
        counts = [
            v for p, v in jax.tree_util.tree_leaves_with_path(after.discriminator.model_state) if p[-1].key == 'count'
        ]
        # Two updates, each a pass over real and one over generated pictures; none in the generator's.
        assert counts and all(float(c) == 4 for c in counts)


@functools.cache
def averaged():
    """(state, jitted step) with an averaged generator."""
    state, step = real_step('spectralnorm', n_dis=1, ema_decay=0.9)
    return state, jax.jit(step)


@pytest.mark.slow
def test_the_discriminators_updates_leave_the_generators_statistics():
    state, step = averaged()
    batch = images_and_labels(4, (8, 8, 1))
    after, _ = step(state, batch)
    key = jax.random.split(jax.random.fold_in(jax.random.fold_in(state.rng, 0), 1))[0]
    z = jax.random.normal(jax.random.split(key)[0], (4, 4))
    generator = real_nets('spectralnorm')[0]
    train = jax.jit(lambda variables: generator.apply(variables, z, None, train=True, mutable=['batch_stats']))
    _, expected = train(state.generator.variables)
    # One pass, that of its own update.
    assert largest_difference(expected, after.generator.model_state) < 1e-5


@pytest.mark.slow
def test_statistics_of_the_averaged_generator_are_estimated_with_it():
    state, step = averaged()
    for number in range(3):
        before = state.ema
        state, _ = step(state, images_and_labels(4, (8, 8, 1), seed=number))
    key = jax.random.split(jax.random.fold_in(jax.random.fold_in(state.rng, 2), 1))[0]
    z = jax.random.normal(jax.random.split(key)[0], (4, 4))
    given = {**before, 'params': state.ema['params']}
    generator = real_nets('spectralnorm')[0]
    _, expected = jax.jit(lambda v: generator.apply(v, z, None, train=True, mutable=['batch_stats']))(given)
    assert largest_difference(expected['batch_stats'], state.ema['batch_stats']) < 1e-5
    assert jax.tree.structure(state.ema) == jax.tree.structure(state.generator.variables)


def test_a_loop_equals_what_is_written_out(monkeypatch):
    batch = images_and_labels(12)
    state, step = linear(loss='hinge', n_dis=3)
    written = jax.jit(step)(state, batch)
    monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies: False)
    looped = jax.jit(linear(loss='hinge', n_dis=3)[1])(state, batch)
    assert largest_difference(written, looped) < 1e-6


@pytest.mark.slow
def test_labels_reach_the_nets():
    batch = images_and_labels(4, (8, 8, 1))
    state, step = real_step('spectralnorm', num_classes=10, n_dis=1)
    step = jax.jit(step)
    _, metrics = step(state, batch)
    _, others = step(state, {**batch, 'labels': (batch['labels'] + 1) % 10})
    assert float(metrics['real_logit'][0]) != float(others['real_logit'][0])


def test_augmentation_reaches_the_discriminator():
    batch, logits = images_and_labels(4), []
    for policy in ((), ('translation', 'cutout')):
        state, step = linear(loss='hinge', n_dis=1, policy=policy)
        _, metrics = jax.jit(step)(state, batch)
        logits.append([float(metrics[name][0]) for name in ('real_logit', 'fake_logit')])
    assert all(plain != augmented for plain, augmented in zip(*logits))


@pytest.mark.slow
def test_four_devices_train_as_one():
    batch = images_and_labels(16, (8, 8, 1))
    results = []
    for devices in 1, 4:
        mesh = mesh_lib.create_mesh(jax.devices()[:devices])
        state, step = real_step('spectralnorm', 10, n_dis=2, shard_fn=functools.partial(mesh_lib.shard_batch, mesh))
        step = jax.jit(lambda state, batch, mesh=mesh, step=step: step(state, mesh_lib.shard_batch(mesh, batch)))
        results.append(jax.device_get(step(mesh_lib.replicate(mesh, state), mesh_lib.replicate(mesh, batch))[1]))
    for name, (total, _) in results[0].items():
        assert float(results[1][name][0]) == pytest.approx(float(total), rel=1e-4, abs=1e-5), name


def test_losses_are_those_asked_for():
    batch = images_and_labels(4)
    for loss in gan_losses.LOSSES:
        state, step = linear(loss=loss, n_dis=1)
        _, metrics = jax.jit(step)(state, batch)
        key = jax.random.fold_in(jax.random.fold_in(state.rng, 0), 0)
        fake = latents(jax.random.split(key, 4)[0], 4) @ np.asarray(state.generator.params['w'])
        real = batch['images'].reshape(4, -1) / 127.5 - 1
        w = np.asarray(state.discriminator.params['w'])
        expected = gan_losses.discriminator_loss(loss, jnp.asarray(real @ w), jnp.asarray(fake @ w))
        assert float(metrics['discriminator_loss'][0]) == pytest.approx(float(expected), rel=1e-4)
