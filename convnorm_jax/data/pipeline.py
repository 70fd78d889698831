"""Chooses the examples of each batch as a pure function of (seed, epoch), so that no order has to be saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError

# Makes the order independent of everything else that draws from the same seed.
_ORDER_STREAM = 0x0D3


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of whole batches in an epoch; the remainder of each epoch's permutation is dropped.

    Args:
        num_examples: training examples.
        batch_size: examples in a batch.

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


def epoch_order(seed: int | jax.Array, epoch: int | jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Draws the order of one epoch: a new permutation, cut into whole batches.

    >>> epoch_order(seed=0, epoch=0, num_examples=10, batch_size=4).shape
    (2, 4)

    Args:
        seed: int or traced integer scalar.
        epoch: int or traced integer scalar.
        num_examples: int, static under jit.
        batch_size: int, static under jit.

    Returns:
        int32 [steps_per_epoch, batch_size], indices in [0, num_examples), each at most once.

    Raises:
        ValueError: see `steps_per_epoch`.
    """
    steps = steps_per_epoch(num_examples, batch_size)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ORDER_STREAM), epoch)
    order = jax.random.permutation(key, num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size).astype(jnp.int32)


@functools.lru_cache(maxsize=2)  # a reader's threads work on one epoch, or at its end on two
def streamed_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Draws the order of one epoch of a streamed data set, on the host.

    Args:
        seed: int >= 0.
        epoch: int >= 0.
        num_examples: int >= 0.

    Returns:
        int64 [num_examples], a permutation, read-only.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, _ORDER_STREAM], counter=[0, 0, epoch, 0]))
    order = rng.permutation(num_examples)
    order.setflags(write=False)
    return order


def take_batch(
    images: np.ndarray | jax.Array,
    labels: np.ndarray | jax.Array,
    order: np.ndarray | jax.Array,
    index: int | jax.Array,
) -> dict[str, jax.Array]:
    """Gathers one batch.

    Args:
        images: [N, H, W, C], any dtype.
        labels: [N].
        order: int [steps, batch_size], as returned by `epoch_order`.
        index: row of `order`, int or traced; the caller keeps it in [0, steps).

    Returns:
        {'images': [batch_size, H, W, C], 'labels': [batch_size]}, dtypes unchanged.
    """
    # asarray: NumPy arrays cannot be indexed by a traced array.
    chosen = jnp.asarray(order)[index]
    return {'images': jnp.asarray(images)[chosen], 'labels': jnp.asarray(labels)[chosen]}


def padded_batches(num_examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Order of an evaluation: every example once, in order; the last batch is padded and masked.

    >>> indices, mask = padded_batches(num_examples=3, batch_size=2)
    >>> indices
    array([[0, 1],
           [2, 0]], dtype=int32)
    >>> mask
    array([[1., 1.],
           [1., 0.]], dtype=float32)

    Args:
        num_examples: int >= 0; 0 gives no batches.
        batch_size: int >= 1, may exceed num_examples.

    Returns:
        (indices int32, mask float32), each [ceil(num_examples / batch_size), batch_size]. Padding has index 0
        and mask 0.

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


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f'batch_size={batch_size}: expected at least 1; set --config.data.batch_size to e.g. 128')
