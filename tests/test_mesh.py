"""Four fake devices give what one gives: training, evaluation, attacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data.augment import augment
from convnorm_jax.evaluation.classifier import AttackSettings, Evaluator
from convnorm_jax.models import create_model
from convnorm_jax.steps import classify
from convnorm_jax.steps.state import create_state, make_optimizer
from tests.selection import few

SHAPE, BATCH, STEPS = (8, 8, 3), 16, 5
MEAN, STD = (0.4,) * 3, (0.3,) * 3

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module', params=few(['convnorm', 'batchnorm'], 'convnorm'))
def trained(request):
    """{number of devices: (mesh, model, state after 5 steps, metrics of each)}."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (STEPS, BATCH, *SHAPE), np.uint8)
    # Each device sees another brightness: statistics of a part of the batch would not do.
    images = (images * np.linspace(0.2, 1, BATCH)[:, None, None, None]).astype(np.uint8)
    labels = random.integers(0, 10, (STEPS, BATCH)).astype(np.int32)
    model = create_model('simple_cnn', num_classes=10, layer=request.param, width=4, depth=(1,))
    tx = make_optimizer('sgd', 0.05, weight_decay=1e-4)
    augment_fn = functools.partial(augment, kind='crop_flip', padding=2)
    train_step = classify.make_train_step(model, tx, mean=MEAN, std=STD, augment_fn=augment_fn)
    found = {}
    for devices in (1, 4):
        mesh = mesh_lib.create_mesh(jax.devices()[:devices])
        state = mesh_lib.replicate(mesh, create_state(model, tx, SHAPE, 0))
        step = jax.jit(lambda state, batch, mesh=mesh: train_step(state, mesh_lib.shard_batch(mesh, batch)))
        history = []
        for x, y in zip(images, labels):
            state, metrics = step(state, mesh_lib.replicate(mesh, {'images': x, 'labels': y}))
            history.append(jax.device_get(metrics))
        found[devices] = mesh, model, state, history
    return found


def test_four_devices_train_as_one(trained):
    (_, _, one, history), (mesh, _, four, history4) = trained[1], trained[4]
    assert mesh.size == 4 and len(four.params['linear']['kernel'].sharding.device_set) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=2e-5), one, four)
    for a, b in zip(history, history4):
        np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-4)
        np.testing.assert_array_equal(a['accuracy'], b['accuracy'])


@pytest.mark.slow
def test_four_devices_evaluate_and_attack_as_one(trained):
    random = np.random.default_rng(1)
    split = {
        'images': random.integers(0, 256, (27, *SHAPE), np.uint8),
        'labels': random.integers(0, 10, 27).astype(np.int32),
    }
    pgd = AttackSettings('pgd', 0.1, 0.03, 3, 1, 'cross_entropy')
    results = []
    for mesh, model, state, _ in trained.values():
        evaluator = Evaluator(classify.make_logits_fn(model, MEAN, STD), mesh, 8)
        variables = mesh_lib.replicate(mesh, jax.device_get(trained[1][2].eval_variables))
        data = mesh_lib.replicate(mesh, split)
        robust = evaluator.robust_accuracy(variables, data, pgd, seed=0)
        results.append((evaluator.evaluate(variables, data), robust['accuracy'], state))
    (clean, robust, _), (clean4, robust4, _) = results
    assert clean['accuracy'] == clean4['accuracy'] and robust == robust4
    np.testing.assert_allclose(clean['loss'], clean4['loss'], rtol=1e-5)


def test_the_batch_is_cut_over_the_devices():
    mesh = mesh_lib.create_mesh()
    assert mesh.size == 4 and mesh.axis_names == (mesh_lib.DATA_AXIS,)
    cut = jax.jit(lambda x: mesh_lib.shard_batch(mesh, x))(jnp.zeros((8, 3)))
    assert [s.data.shape for s in cut.addressable_shards] == [(2, 3)] * 4
    whole = mesh_lib.replicate(mesh, {'a': np.arange(3)})['a']
    assert [s.data.shape for s in whole.addressable_shards] == [(3,)] * 4


@pytest.mark.parametrize('batch_size', [0, -4, 2, 6])
def test_a_batch_that_does_not_divide(batch_size):
    with pytest.raises(ValueError, match=rf'data\.batch_size={batch_size}: .*multiple .* devices, 4'):
        mesh_lib.check_batch_size(batch_size, mesh_lib.create_mesh())
    mesh_lib.check_batch_size(8, mesh_lib.create_mesh())
