"""Feeds: the same batches for the same step wherever one begins, and a word when the input is too slow."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data import sources, streaming
from convnorm_jax.training import batches as feed
from convnorm_jax.training import setup


def take(some, start, count):
    """The batches of so many steps, as a jitted step would see them."""
    batches = some.batches(start)
    found = [jax.device_get(jax.jit(some.take)(*next(batches))) for _ in range(count)]
    batches.close()
    return found


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_batches_from_memory(tiny_experiment):
    experiment = tiny_experiment()
    some = experiment.feed()
    assert isinstance(some, feed.MemoryFeed)
    found = take(some, 0, 12)
    order = np.concatenate([np.asarray(experiment.epoch_order(epoch)) for epoch in range(3)])
    train = experiment.prepared.train
    for rows, batch in zip(order, found):
        same(batch, {'images': train.images[rows], 'labels': train.labels[rows]})
    for start in (3, 5, 7):
        same(take(some, start, 4), found[start : start + 4])


@pytest.fixture
def streamed(make_picture_folder, tmp_path):
    source = sources.load_source('folder', make_picture_folder(tmp_path / 'x'), image_size=16, workers=0)
    return streaming.TrainingBatches(source.train.images, source.train.labels, 8, 'resized_crop_flip', 0)


@pytest.mark.parametrize('devices', [1, 4])
def test_streamed_batches(streamed, devices):
    mesh = mesh_lib.create_mesh(jax.devices()[:devices])
    some = feed.StreamFeed(streamed, mesh, total_steps=9)
    images, _ = next(some.batches(0))
    assert images.sharding == mesh_lib.batch_sharded(mesh) and images.dtype == jnp.uint8
    same(take(some, 3, 5), [streamed(step) for step in range(3, 8)])
    assert len(list(some.batches(7))) == 2  # nothing beyond the end


@pytest.mark.slow
def test_a_config_gives_the_feed(tiny_config, make_picture_folder, tmp_path):
    config = tiny_config({'data.name': 'folder', 'data.data_dir': str(make_picture_folder(tmp_path / 'x'))})
    config.update_from_flattened_dict({'data.image_size': 8, 'data.batch_size': 8, 'data.workers': 0})
    config.data.subset_fraction = 1.0
    experiment = setup.build(config, jax.devices()[:2])
    some = experiment.feed()
    assert isinstance(some, feed.StreamFeed) and some.training.augmentation == config.data.augmentation
    assert experiment.steps_per_epoch == len(experiment.prepared.train.labels) // 8
    assert experiment.input_shape == (8, 8, 3)
    assert len(experiment.attacked.labels) == 12  # all there are
    np.testing.assert_array_equal(experiment.attacked.images, np.asarray(experiment.source.test.images))
    # Evaluation by streaming is evaluation in memory.
    state, test = experiment.initial_state(), experiment.data['test']
    whole = experiment.evaluator.evaluate(state.eval_variables, experiment.attacked_data)
    experiment.evaluator.batch_size = 8
    found = experiment.evaluator.evaluate(state.eval_variables, test)
    assert isinstance(test['images'], streaming.StreamedImages)
    assert found['accuracy'] == whole['accuracy'] and found['loss'] == pytest.approx(whole['loss'], rel=1e-5)
    config.eval.examples = 5
    assert len(setup.build(config, jax.devices()[:2]).attacked.labels) == 5


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; a dict whose 'now' may be set."""
    time = {'now': 0.0}
    monkeypatch.setattr(feed.time, 'perf_counter', lambda: time['now'])
    return time


def batches(clock, seconds):
    """An endless supply that takes its time."""
    for number in itertools.count():
        clock['now'] += seconds
        yield number


def test_slow_input_is_told_once_an_epoch(clock):
    waiting, slow = feed.Waiting(), batches(clock, 0.25)
    for epoch in range(2):
        waiting.begin_epoch(seconds=1000.0 * epoch)
        for step in range(150):
            waiting.next_batch(slow, jnp.zeros(()))
            line = waiting.warning(1000.0 * epoch + step + 1, 3, ended=False)
            assert bool(line) == (step == 99)
            if line:
                assert line.startswith('input bound: 25% of the time was spent waiting for images')
                assert 'config.data.workers (now 3)' in line
        assert not waiting.warning(1000.0 * epoch + 150, 3, ended=True)


def test_a_short_epoch_is_judged_at_its_end(clock):
    waiting, slow = feed.Waiting(), batches(clock, 0.25)
    for _ in range(4):
        waiting.next_batch(slow, jnp.zeros(()))
    assert waiting.warning(2.0, 0, ended=False) == ''
    assert '50% of the time' in waiting.warning(2.0, 0, ended=True)


def test_fast_input_is_not_mentioned(clock):
    waiting, fast = feed.Waiting(), batches(clock, 0.05)
    for _ in range(200):
        waiting.next_batch(fast, jnp.zeros(()))
    assert waiting.seconds == pytest.approx(10)
    assert waiting.warning(200.0, 3, ended=True) == ''
