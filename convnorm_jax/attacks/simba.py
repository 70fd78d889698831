"""SimBA: steps along one vector of an orthonormal basis at a time, kept if the label's probability decreases.

Guo, Gardner, You, Wilson, Weinberger 2019 (arXiv 1905.07121), algorithm 1, in the basis of
pixels or of the discrete cosine transform. Orders and counts are those of the authors' code: the clean image is not
counted as a query; a step counts 1 if +step is taken, else 2.

In each pass of the network every example tries its own next step (+ or - its own next vector), so that none waits for
another; `queries` of an example are the passes in which it was active.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.attacks import inputs, loops, losses, projections
from convnorm_jax.attacks.inputs import LogitsFn
from convnorm_jax.errors import UserError

BASES = ('pixel', 'dct')


class SimbaState(NamedTuple):
    """The state of the attack; every array has the batch as its first axis.

    delta: float [B, H, W, C], the sum of the steps taken, before any clipping.
    odds: float32 [B] or wider, log(p / (1 - p)) of the label's probability p there.
    order: int32 [B, steps], each example's vectors, as flat indices into [H, W, C].
    place: int32 [B], the step that each example is at.
    plus_failed: bool [B], whether +step was tried there already.
    queries: int32 [B], used so far, the clean image not counted.
    fooled: bool [B], whether another class than the label is predicted, or logits are not finite.
    """

    delta: jax.Array
    odds: jax.Array
    order: jax.Array
    place: jax.Array
    plus_failed: jax.Array
    queries: jax.Array
    fooled: jax.Array


class SimbaResult(NamedTuple):
    """What SimBA found, per example.

    images: float [B, H, W, C] in [0, 1].
    queries: int32 [B]; 0 exactly where the clean image was misclassified.
    success: bool [B], whether another class than the label is predicted, or logits are not finite.
    l2: float32 [B] or wider, Euclidean length of images - clean images, after clipping (the authors' code
      measures it before).
    """

    images: jax.Array
    queries: jax.Array
    success: jax.Array
    l2: jax.Array


def simba(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    step_size: float | jax.Array = 0.2,
    steps: int | None = None,
    queries: int | None = None,
    basis: str = 'pixel',
    frequencies: int | None = None,
    stride: int | None = None,
    epsilon: float | jax.Array | None = None,
    rng: jax.Array,
) -> SimbaResult:
    """The whole attack; an example ends when it is misclassified or has tried all its vectors.

    Can be jitted. On a CPU more than a few steps are much faster as a host loop over a jitted
    `simba_advance` (`loops.unrolls` says why).

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K]. Never differentiated.
      images: float [B, H, W, C] in [0, 1].
      labels: int [B], the true classes.
      step_size: length of a step, in pixel units of [0, 1]; a number, or one per image, [B]; may be traced.
      steps: number of vectors, each tried once (static). None: all.
      queries: limit for each example, even if only +step of its last vector has been tried (static). None: two per
        vector.
      basis: 'pixel' or 'dct' (static).
      frequencies: 'dct': only the `frequencies` x `frequencies` lowest of each channel, in random
        order (static). None: all.
      stride: 'dct', with `frequencies`: all frequencies, first that lowest block, then blocks that
        reach `stride` further each, in random order within each (static).
      epsilon: the perturbation is clipped to +-epsilon; None: not. A number, or one per image, [B]; may
        be traced.
      rng: a PRNG key, or one key per image.

    Returns:
      SimbaResult; a constant to differentiation.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    if queries is not None:
        inputs.check_count(queries, 'queries')
    state = simba_start(
        logits_fn, images, labels, steps=steps, basis=basis, frequencies=frequencies, stride=stride, rng=rng
    )
    images = projections.clip_pixels(jnp.asarray(images))  # checked by now: only rounding is left
    most = 2 * state.order.shape[1]
    most = most if queries is None else min(most, queries)
    options = {'step_size': step_size, 'queries': queries, 'basis': basis, 'epsilon': epsilon}

    def advance(state, count):
        return simba_advance(logits_fn, images, labels, state, count=count, **options)

    def loop(state):
        goes_on = lambda state: jnp.any(simba_active(state, queries))
        return jax.lax.while_loop(goes_on, lambda state: advance(state, 1), state)

    state = loops.by_platform(most, lambda state: advance(state, most), loop, state)
    return simba_result(images, state, epsilon)


def simba_start(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    steps: int | None = None,
    basis: str = 'pixel',
    frequencies: int | None = None,
    stride: int | None = None,
    rng: jax.Array,
) -> SimbaState:
    """The state before the first step (one forward pass), with every example's order of vectors.

    Arguments and errors: see `simba`.
    """
    images, labels = inputs.checked_problem(logits_fn, images, labels)
    blocks = _blocks(images.shape[1:], basis, frequencies, stride)
    if steps is not None:
        inputs.check_count(steps, 'steps')
    order = jax.vmap(_order, (0, None))(inputs.example_keys(rng, images.shape[0]), blocks)[:, :steps]
    odds, fooled = _judged(logits_fn, images, labels)
    zeros = jnp.zeros(labels.shape, jnp.int32)
    return SimbaState(images - images, odds, order, zeros, zeros > 0, zeros, fooled)  # NaN where not valid


def simba_advance(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    state: SimbaState,
    *,
    step_size: float | jax.Array = 0.2,
    queries: int | jax.Array | None = None,
    basis: str = 'pixel',
    epsilon: float | jax.Array | None = None,
    count: int,
) -> SimbaState:
    """`count` (static) more queries for every example that is still active (`simba_active`).

    It draws no random numbers: examples may be packed into other batches between two calls.

    Args:
      images, labels: the clean images and their classes, as given to `simba_start`.
      state: from `simba_start` (of the same basis) or an earlier call.
      queries: limit for each example, of the whole attack; may be traced.
      count: queries of this call.
      logits_fn, step_size, basis, epsilon: see `simba`.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    images, labels = inputs.checked_batch(images, labels)
    inputs.check_count(count, 'count')
    _check_basis(basis)
    inputs.check_step_size(step_size, 'l2')  # the length of a vector: a pixel may move less
    step_size = inputs.per_image(step_size, images, 'step_size')
    epsilon = _checked_epsilon(epsilon, images)
    rows, columns = (jnp.asarray(_basis(size, basis), images.dtype) for size in images.shape[1:3])

    def body(_, state):
        number = jnp.take_along_axis(state.order, state.place[:, None], axis=1, mode='clip')[:, 0]
        row, column, channel = jnp.unravel_index(number, images.shape[1:])
        channels = jax.nn.one_hot(channel, images.shape[3], dtype=images.dtype)
        vector = rows[row][:, :, None, None] * columns[column][:, None, :, None] * channels[:, None, None, :]
        step = jnp.where(projections.expand(state.plus_failed), -step_size, step_size)
        delta = state.delta + step * vector
        active = simba_active(state, queries)
        return _next(state, active, delta, *_judged(logits_fn, _applied(images, delta, epsilon), labels))

    return loops.repeat(count, body, state)


def simba_active(state: SimbaState, queries: int | jax.Array | None = None) -> jax.Array:
    """Whether an example is still being attacked, bool [B], with a limit of `queries` in all (None: no limit)."""
    active = ~state.fooled & (state.place < state.order.shape[1])
    return active if queries is None else active & (state.queries < queries)


def simba_result(images: jax.Array, state: SimbaState, epsilon: float | jax.Array | None = None) -> SimbaResult:
    """What was found so far.

    Args:
      images: the clean images.
      state: from `simba_advance`, with this `epsilon`; NaN in it where `simba_start` was given a traced image,
        or a label of it, out of range.
    """
    images = jax.lax.stop_gradient(jnp.asarray(images))
    perturbed = _applied(images, state.delta, _checked_epsilon(epsilon, images))
    return SimbaResult(perturbed, state.queries, state.fooled, projections.l2_norm(perturbed - images))


def simba_summary(result: SimbaResult) -> dict[str, float]:
    """The published figures, over the examples whose clean image was classified correctly.

    Args:
      result: of any number of examples, on the host or not.

    Returns:
      examples: how many were attacked.
      average_queries, mean_l2: over all of these.
      average_queries_success, mean_l2_success: over those that were fooled.
      success_rate: the share that was, in [0, 1].
      A mean of nothing is nan.
    """
    queries, success, l2 = (np.asarray(x) for x in (result.queries, result.success, result.l2))
    attacked = queries > 0
    fooled = attacked & success
    return {
        'examples': int(attacked.sum()),
        'average_queries': _mean(queries[attacked]),
        'average_queries_success': _mean(queries[fooled]),
        'success_rate': _mean(success[attacked]),
        'mean_l2': _mean(l2[attacked]),
        'mean_l2_success': _mean(l2[fooled]),
    }


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix, float64 [size, size]: row k is the cosine of frequency k."""
    frequency, place = np.ogrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


def _checked_epsilon(epsilon, images):
    if epsilon is None:
        return None
    inputs.check_ball(epsilon, 'linf')
    return inputs.per_image(epsilon, images, 'epsilon')


def _next(state, active, delta, odds, fooled):
    """The state after each active example's candidate `delta` was evaluated."""
    taken = active & (odds < state.odds)
    done = taken | (active & state.plus_failed)
    return state._replace(
        delta=projections.choose(taken, delta, state.delta),
        odds=jnp.where(taken, odds, state.odds),
        place=state.place + done.astype(jnp.int32),
        plus_failed=jnp.where(active, ~done, state.plus_failed),
        queries=state.queries + active.astype(jnp.int32),
        fooled=state.fooled | (taken & fooled),
    )


def _judged(logits_fn, images, labels):
    """(log-odds of the label [B], is another class predicted [B])."""
    # Without stop_gradient a training step around the attack would differentiate its loop.
    logits = jax.lax.stop_gradient(logits_fn(images))
    margin = losses.attack_loss(logits, labels, 'margin')
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits.astype(margin.dtype))
    # They have the order of the probabilities, and still differ where float32 rounds all of these to 1.
    odds = -margin - jax.nn.logsumexp(others - others.max(axis=-1, keepdims=True), axis=-1)
    # An output that is not finite is no prediction: the lowest odds there are.
    odds = jnp.where(jnp.isfinite(logits).all(-1), odds, -jnp.inf)
    return odds, ~losses.correct(logits, labels)


def _applied(images, delta, epsilon):
    return projections.clip_pixels(images + (delta if epsilon is None else jnp.clip(delta, -epsilon, epsilon)))


def _basis(size, basis):
    return np.eye(size) if basis == 'pixel' else dct_matrix(size)


def _blocks(shape, basis, frequencies, stride):
    """The block [H * W * C] of each vector, -1 for none: lower blocks come first."""
    _check_basis(basis)
    height, width, _ = shape
    largest = max(height, width)
    if basis == 'pixel' and (frequencies is not None or stride is not None):
        raise UserError(f"frequencies={frequencies}, stride={stride}: expected None with basis='pixel'")
    if frequencies is None and stride is not None:
        raise UserError(f'stride={stride}: expected None without frequencies')
    for name, value in (('frequencies', frequencies), ('stride', stride)):
        if value is not None:
            inputs.check_count(value, name)
    if frequencies is not None and frequencies > largest:
        raise UserError(f'frequencies={frequencies}: expected at most {largest}, the longer side of the images')
    row, column, _ = np.indices(shape)
    beyond = np.maximum(row, column) - (frequencies or largest)
    further = -1 if stride is None else 1 + beyond // stride
    return np.where(beyond < 0, 0, further).ravel()


def _order(key, blocks):
    """The indices of all vectors in a block, block by block, shuffled within each, int32."""
    numbers = np.flatnonzero(blocks >= 0)
    shuffled = jax.random.permutation(key, jnp.asarray(numbers, jnp.int32))
    return shuffled[jnp.argsort(jnp.asarray(blocks)[shuffled], stable=True)]


def _check_basis(basis):
    if basis not in BASES:
        raise UserError(f'basis={basis!r}: expected one of {", ".join(BASES)}')


def _mean(values):
    return float(values.mean()) if values.size else float('nan')
