"""The order of examples: whole, fresh each epoch, the same under jit, and counted once in evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.data import pipeline


@pytest.mark.parametrize(('n', 'batch', 'steps'), [(100, 10, 10), (109, 10, 10), (7, 7, 1), (5, 1, 5)])
def test_epoch_order_takes_each_example_at_most_once(n, batch, steps):
    order = np.asarray(pipeline.epoch_order(0, 3, n, batch))
    assert order.shape == (steps, batch) == (pipeline.steps_per_epoch(n, batch), batch) and order.dtype == np.int32
    flat = order.ravel()
    assert len(set(flat.tolist())) == steps * batch and flat.min() >= 0 and flat.max() < n


def test_order_depends_on_seed_and_epoch_only():
    first = pipeline.epoch_order(0, 0, 1000, 32)
    np.testing.assert_array_equal(first, pipeline.epoch_order(0, 0, 1000, 32))
    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        assert (np.asarray(pipeline.epoch_order(seed, epoch, 1000, 32)) == first).mean() < 0.02
    assert (np.asarray(first).ravel() == np.arange(992)).mean() < 0.02


def test_dropped_remainder_changes_with_the_epoch():
    seen = {int(i) for epoch in range(30) for i in np.asarray(pipeline.epoch_order(0, epoch, 11, 8)).ravel()}
    assert seen == set(range(11))


def test_jitted_equals_eager_with_traced_seed_and_epoch():
    traces = []

    def traced(*arguments):
        traces.append(arguments)
        return pipeline.epoch_order(*arguments)

    order = jax.jit(traced, static_argnums=(2, 3))
    for epoch in (0, 5):
        np.testing.assert_array_equal(order(7, epoch, 100, 9), pipeline.epoch_order(7, epoch, 100, 9))
    assert len(traces) == 1


@pytest.mark.parametrize('put', [np.asarray, jnp.asarray])
def test_take_batch(put):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(20, dtype=np.int32)
    order = pipeline.epoch_order(0, 0, 20, 6)
    take = jax.jit(functools.partial(pipeline.take_batch, put(images), put(labels)))
    for index in range(3):
        for batch in (take(order, index), pipeline.take_batch(put(images), put(labels), order, index)):
            assert set(batch) == {'images', 'labels'}
            np.testing.assert_array_equal(batch['images'], images[order[index]])
            np.testing.assert_array_equal(batch['labels'], labels[order[index]])
            assert batch['images'].dtype == jnp.uint8 and batch['labels'].dtype == jnp.int32


@pytest.mark.parametrize(('n', 'batch', 'batches'), [(10, 5, 2), (11, 5, 3), (3, 8, 1), (0, 4, 0), (4, 1, 4)])
def test_padded_batches_count_every_example_once(n, batch, batches):
    indices, mask = pipeline.padded_batches(n, batch)
    assert isinstance(indices, np.ndarray) and isinstance(mask, np.ndarray)
    assert indices.shape == mask.shape == (batches, batch)
    assert indices.dtype == np.int32 and mask.dtype == np.float32
    assert indices[mask == 1].tolist() == list(range(n))
    assert mask.sum() == n and set(indices[mask == 0].tolist()) <= {0} and set(np.unique(mask)) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (
            lambda: pipeline.steps_per_epoch(10, 11),
            'batch_size=11: expected at most the number of training examples, 10',
        ),
        (lambda: pipeline.epoch_order(0, 0, 10, 11), 'batch_size=11: expected at most'),
        (lambda: pipeline.steps_per_epoch(10, 0), 'batch_size=0: expected at least 1'),
        (lambda: pipeline.padded_batches(10, -1), 'batch_size=-1: expected at least 1'),
        (lambda: pipeline.padded_batches(-1, 4), 'num_examples=-1: expected a number >= 0'),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)
