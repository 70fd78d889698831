"""The loop trains a GAN: resumed bit for bit, stopped by a loss that is not finite, rated by its scores."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from convnorm_jax.runs.metrics import read_rows
from convnorm_jax.training import loop, setup
from convnorm_jax.training.build import build_ocnn_penalty

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def tiny_gan():
    """Function of overrides -> `Generation` on one device: nets of a few channels, four steps an epoch."""
    from convnorm_jax.configs import digits_gan

    def make(overrides=()):
        config = digits_gan.get_config()
        config.model.width, config.gan.generator_width, config.gan.latent = 4, 4, 4
        config.model.layer = 'spectralnorm'
        config.gan.n_dis, config.gan.passes, config.data.batch_size = 1, 2, 64
        config.data.subset_fraction = 0.1
        config.train.steps, config.checkpoint.every_steps = 8, 3
        config.update_from_flattened_dict(dict(overrides))
        return setup.build(config, jax.devices()[:1])

    return make


class Stop(Exception):
    """Ends a run in the middle."""


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(tiny_gan, tmp_path, monkeypatch):
    experiment = tiny_gan()
    whole, broken = str(tmp_path / 'whole'), str(tmp_path / 'broken')
    assert loop.train(experiment, whole).step == 8
    original, calls = loop._Run._checkpoint, []

    def stop_after_saving(run, start):
        start = original(run, start)
        calls.append(run.progress.step)
        if len(calls) == 2:
            raise Stop
        return start

    monkeypatch.setattr(loop._Run, '_checkpoint', stop_after_saving)
    with pytest.raises(Stop):
        loop.train(experiment, broken)
    monkeypatch.setattr(loop._Run, '_checkpoint', original)
    assert calls == [3, 6]
    assert loop.train(experiment, broken).step == 8
    ends = [loop.restore_state(experiment, folder, 'latest')[0] for folder in (whole, broken)]
    same(*ends)
    rows = [
        [{k: v for k, v in row.items() if k != 'examples_per_second'} for row in read_rows(f'{folder}/metrics.csv')]
        for folder in (whole, broken)
    ]
    assert rows[0] == rows[1] and [row['step'] for row in rows[0]] == [4, 8]
    for name in sorted(os.listdir(f'{whole}/samples')):
        pictures = [np.load(f'{folder}/samples/{name}')['images'] for folder in (whole, broken)]
        assert pictures[0].shape == (50, 8, 8, 1) and pictures[0].dtype == np.uint8
        np.testing.assert_array_equal(*pictures)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tiny_gan, tmp_path):
    experiment = tiny_gan({'train.steps': 4})
    loop.train(experiment, str(tmp_path))
    longer = tiny_gan({'train.steps': 8, 'schedule.kind': 'constant'})
    folder = str(tmp_path / 'other')

    def broken_step(state, batch):
        state, metrics = longer.train_step(state, batch)
        wrong = jax.numpy.where(state.step > 5, jax.numpy.nan, 1.0)
        return state, {name: (total * wrong, count) for name, (total, count) in metrics.items()}

    with pytest.raises(loop.NonFiniteLoss, match=r'between steps 4 and 6.*the last good checkpoint is of step 4'):
        loop.train(dataclasses.replace(longer, train_step=broken_step), folder)
    assert int(loop.restore_state(longer, folder, 'latest')[0].step) == 4


@pytest.mark.slow
def test_scores_rate_the_checkpoints(tiny_gan, tmp_path):
    distances, given = [3.0, 5.0], []

    def score(pictures):
        given.append(pictures)
        return {'fid_classifier': distances[len(given) - 1]}

    experiment = tiny_gan({'gan.score_examples': 7}).scored(score)
    progress = loop.train(experiment, str(tmp_path))
    assert (progress.best_step, progress.best_rating) == (4, -3.0)
    assert [p.shape for p in given] == [(7, 8, 8, 1)] * 2
    assert [row['fid_classifier'] for row in read_rows(str(tmp_path / 'metrics.csv'))] == distances
    assert int(loop.restore_state(experiment, str(tmp_path), 'best')[0].step) == 4


def test_an_epoch_is_so_many_passes(tiny_gan):
    experiment = tiny_gan({'gan.passes': 3})
    examples = len(experiment.prepared.train.labels)
    order = np.asarray(experiment.epoch_order(1))
    a_pass = examples // 64 * 64
    assert order.shape == (3 * (examples // 64), 64) and experiment.steps_per_epoch == len(order)
    for i in range(3):
        part = order.reshape(-1)[i * a_pass : (i + 1) * a_pass]
        assert len(set(part)) == a_pass
    one = np.asarray(tiny_gan({'gan.passes': 1}).epoch_order(4))
    np.testing.assert_array_equal(one, order[len(one) : 2 * len(one)])


@pytest.mark.slow
def test_the_samplers_pictures_do_not_depend_on_the_batch(tiny_gan):
    experiment = tiny_gan()
    variables = experiment.initial_state().eval_variables
    many, labels = experiment.sampler.draw(variables, 10, seed=3)
    few, first = tiny_gan({'eval.batch_size': 3}).sampler.draw(variables, 4, seed=3)
    assert np.abs(many[:4].astype(int) - few).max() <= 1 and many.dtype == np.uint8
    np.testing.assert_array_equal(labels[:4], first)
    assert set(labels) <= set(range(10))
    _, classes = experiment.sampler.grid(0, 10, 2)
    assert list(classes) == [*range(10)] * 2


def test_the_settings_of_adam(tiny_gan):
    experiment = tiny_gan({'gan.setting': 'D', 'data.batch_size': 16})
    assert experiment.batch_examples == 5 * 16
    assert float(experiment.schedule(0)) == pytest.approx(1e-3)
    assert experiment.config.gan.n_dis == 1  # as it was given


@pytest.mark.slow
def test_the_regularizer_reaches_every_convolution_of_the_discriminator(tiny_gan):
    experiment = tiny_gan({'model.layer': 'none', 'train.ocnn.weight': 0.1})
    discriminator, shape = experiment.discriminator, experiment.input_shape
    penalty = build_ocnn_penalty(experiment.config, discriminator, shape, np.zeros(1, np.int32), pattern='.*')
    params = experiment.initial_state().discriminator.params
    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(penalty))(params)):
        is_convolution = gradient.ndim == 4
        assert bool(np.abs(gradient).max() > 0) == is_convolution, path
