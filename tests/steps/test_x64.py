"""Every training step with JAX's 64-bit types switched on: it runs, and leaves the state its dtypes."""

import functools

import jax
import numpy as np
import optax
import pytest

from convnorm_jax.data.augment import augment
from convnorm_jax.models import create_gan, create_model
from convnorm_jax.steps import adversarial, classify, gan
from convnorm_jax.steps.state import create_state, make_optimizer
from tests.selection import few

SHAPE = (8, 8, 3)

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module', autouse=True)
def x64():
    jax.clear_caches()  # JAX's cache of indexing by NumPy arrays takes no notice of the switch
    with jax.enable_x64(True):
        yield
    jax.clear_caches()


def batch(count=8):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, *SHAPE), np.uint8)
    return {'images': images, 'labels': random.integers(0, 10, count).astype(np.int32)}


def assert_takes_its_own_state(step, state):
    step, expected = jax.jit(step), jax.tree.map(lambda leaf: leaf.dtype, state)
    for _ in range(2):
        state, metrics = step(state, batch())
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == expected
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))


ATTACK = {'epsilon': 0.03, 'step_size': 0.01}
STEPS = {
    'clean': classify.make_train_step,
    'microbatches': functools.partial(classify.make_train_step, microbatches=2),
    'free': functools.partial(adversarial.make_free_step, replays=2, carry_over=True, **ATTACK),
    'fast': functools.partial(adversarial.make_fast_step, **ATTACK),
    'pgd': functools.partial(adversarial.make_pgd_step, steps=2, **ATTACK),
    'trades': functools.partial(adversarial.make_trades_step, steps=2, beta=6.0, **ATTACK),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize('name', few(STEPS, 'microbatches', 'trades'))
@pytest.mark.parametrize('kind', ['crop', 'crop_flip'])
def test_classifiers(name, kind):
    model = create_model('simple_cnn', num_classes=10, layer='convnorm', width=4, depth=(1,))
    tx = make_optimizer('sgd', optax.cosine_decay_schedule(0.1, 10))
    augment_fn = functools.partial(augment, kind=kind, padding=2)
    step = STEPS[name](model, tx, mean=(0.5,) * 3, std=(0.2,) * 3, augment_fn=augment_fn, ema_decay=0.9)
    assert_takes_its_own_state(step, create_state(model, tx, SHAPE, 0, use_ema=True, carried_batch=8))


@pytest.mark.slow
def test_gans():
    nets = create_gan('sngan', picture_shape=SHAPE, latent=4, num_classes=10, generator_width=4, discriminator_width=4)
    tx = make_optimizer('adam', 1e-3)
    step = gan.make_gan_step(
        *nets, tx, tx, loss='hinge', n_dis=2, latent=4, num_classes=10, gradient_penalty=1.0,
        policy=('color', 'translation', 'cutout'), ema_decay=0.9,
    )  # fmt: skip
    state = gan.create_gan_state(*nets, tx, tx, input_shape=SHAPE, latent=4, seed=0, use_ema=True)
    assert_takes_its_own_state(step, state)
