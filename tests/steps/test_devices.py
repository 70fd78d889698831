"""What the devices of a mesh tell each other in a step: sums of gradients and statistics, never pictures."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data.augment import augment
from convnorm_jax.models import create_model
from convnorm_jax.models.gan import create_gan
from convnorm_jax.steps import adversarial, classify, gan
from convnorm_jax.steps.state import create_state, make_optimizer

SHAPE, BATCH = (8, 8, 1), 16
pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def mesh():
    if jax.device_count() < 2:
        pytest.skip('one device')
    return mesh_lib.create_mesh(jax.devices()[:2])


def instructions(step, state, mesh):
    """[(kind, bytes of the results)] of the collectives in the compiled step, in order."""
    random = np.random.default_rng(0)
    batch = {'images': random.integers(0, 256, (BATCH, *SHAPE), np.uint8), 'labels': np.zeros(BATCH, np.int32)}
    state = mesh_lib.replicate(mesh, state)

    def of_the_loop(state, batch):
        with mesh_lib.in_use(mesh):
            return step(state, batch)

    text = jax.jit(of_the_loop).lower(state, mesh_lib.cut_batch(mesh, batch)).compile().as_text()
    found = re.findall(r'= (.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(', text)
    size = lambda shapes: sum(
        4 * math.prod(int(n) for n in dims.split(',') if n) for dims in re.findall(r'[fsu]32\[([\d,]*)\]', shapes)
    )
    return [(kind, size(shapes)) for shapes, kind in found]


def check(found, params):
    """Nothing but all-reduces, of the gradients once, and of little beside them."""
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert {kind for kind, _ in found} == {'all-reduce'}
    assert gradients <= sum(size for _, size in found) < 1.35 * gradients


@pytest.mark.slow
@pytest.mark.parametrize('layer', ['convnorm', 'batchnorm', 'spectralnorm'])
def test_a_clean_step(layer, mesh):
    model, tx = (
        create_model('simple_cnn', num_classes=10, layer=layer, width=16, depth=(1,)),
        make_optimizer('sgd', 0.1),
    )
    options = {'mean': (0.5,), 'std': (0.5,), 'augment_fn': functools.partial(augment, kind='none', padding=1)}
    state = create_state(model, tx, SHAPE, 0)
    check(instructions(classify.make_train_step(model, tx, **options), state, mesh), state.params)


def test_parts_of_a_batch(mesh):
    model, tx = (
        create_model('simple_cnn', num_classes=10, layer='convnorm', width=16, depth=(1,)),
        make_optimizer('sgd', 0.1),
    )
    options = {'mean': (0.5,), 'std': (0.5,), 'augment_fn': lambda key, images: images, 'microbatches': 2}
    found = instructions(classify.make_train_step(model, tx, **options), create_state(model, tx, SHAPE, 0), mesh)
    assert {kind for kind, _ in found} == {'all-reduce'}


def test_a_free_step(mesh):
    model, tx = (
        create_model('simple_cnn', num_classes=10, layer='convnorm', width=16, depth=(1,)),
        make_optimizer('sgd', 0.1),
    )
    options = {'mean': (0.5,), 'std': (0.5,), 'augment_fn': lambda key, images: images}
    step = adversarial.make_free_step(model, tx, epsilon=0.03, step_size=0.03, replays=1, **options)
    state = create_state(model, tx, SHAPE, 0)
    check(instructions(step, state, mesh), state.params)


@pytest.mark.slow
def test_a_step_of_a_gan(mesh):
    nets = create_gan(
        'sngan', picture_shape=SHAPE, discriminator_layer='convnorm', discriminator_width=8, generator_width=8, latent=8
    )
    tx = [make_optimizer('adam', 1e-3)] * 2
    step = gan.make_gan_step(
        *nets, *tx, loss='hinge', n_dis=1, latent=8, shard_fn=functools.partial(mesh_lib.shard_batch, mesh)
    )
    state = gan.create_gan_state(*nets, *tx, input_shape=SHAPE, latent=8, seed=0, use_ema=False)
    assert {kind for kind, _ in instructions(step, state, mesh)} == {'all-reduce'}
