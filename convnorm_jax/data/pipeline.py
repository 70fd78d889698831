"""Which examples make up which batch, as a pure function of (seed, epoch): nothing to save, nothing to resume."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError

# Keeps the order apart from whatever else draws from the key of the same seed.
_ORDER_STREAM = 0x0D3


def steps_per_epoch(num_examples, batch_size):
    """Whole batches in an epoch; the remainder of each epoch's permutation is dropped.

    Args:
        num_examples, batch_size: int.

    Returns:
        int >= 1.

    Raises:
        ValueError: batch_size below 1 or above num_examples.
    """
    _check_batch_size(batch_size)
    if batch_size > num_examples:
        raise UserError(
            f'batch_size={batch_size}: expected at most the number of training examples, {num_examples}; '
            'set a smaller --config.data.batch_size or a larger --config.data.subset_fraction'
        )
    return num_examples // batch_size


def epoch_order(seed, epoch, num_examples, batch_size):
    """The examples of one epoch: a fresh permutation, cut into whole batches.

    Args:
        seed, epoch: int or traced integer scalar.
        num_examples, batch_size: int (static under jit).

    Returns:
        int32 [steps_per_epoch, batch_size], indices in [0, num_examples), each at most once.

    Raises:
        ValueError: as `steps_per_epoch`.
    """
    steps = steps_per_epoch(num_examples, batch_size)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ORDER_STREAM), epoch)
    order = jax.random.permutation(key, num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size).astype(jnp.int32)


@functools.lru_cache(maxsize=2)  # the threads of a reader are in one epoch, or between two
def streamed_order(seed, epoch, num_examples):
    """The examples of one epoch of a data set that is streamed: a permutation drawn on the host.

    Args:
        seed, epoch, num_examples: ints >= 0.

    Returns:
        int64 [num_examples], NumPy, read-only.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, _ORDER_STREAM], counter=[0, 0, epoch, 0]))
    order = rng.permutation(num_examples)
    order.setflags(write=False)
    return order


def take_batch(images, labels, order, index):
    """Gather one batch.

    Args:
        images: [N, H, W, C], any dtype.
        labels: [N].
        order: int [steps, batch_size], as `epoch_order` gives it.
        index: row of `order`, int or traced; the caller keeps it in [0, steps).

    Returns:
        {'images': [batch_size, H, W, C], 'labels': [batch_size]}, dtypes unchanged.
    """
    # asarray: NumPy arrays cannot be indexed by a traced array.
    chosen = jnp.asarray(order)[index]
    return {'images': jnp.asarray(images)[chosen], 'labels': jnp.asarray(labels)[chosen]}


def padded_batches(num_examples, batch_size):
    """Evaluation order: every example once, in order; the last batch is filled up and masked.

    Args:
        num_examples: int >= 0; 0 gives no batches.
        batch_size: int >= 1, may exceed num_examples.

    Returns:
        (indices int32, mask float32), NumPy, each [ceil(num_examples / batch_size), batch_size]. Fillers
        have index 0 and mask 0.

    Raises:
        ValueError: batch_size below 1 or num_examples below 0.
    """
    _check_batch_size(batch_size)
    if num_examples < 0:
        raise UserError(f'num_examples={num_examples}: expected a number >= 0; give the length of the split')
    batches = -(-num_examples // batch_size)
    flat = np.arange(batches * batch_size, dtype=np.int32)
    mask = flat < num_examples
    shape = (batches, batch_size)
    return np.where(mask, flat, 0).astype(np.int32).reshape(shape), mask.astype(np.float32).reshape(shape)


def _check_batch_size(batch_size):
    if batch_size < 1:
        raise UserError(f'batch_size={batch_size}: expected at least 1; set --config.data.batch_size to e.g. 128')
