"""The Square attack: random search with square-shaped changes, using only the logits.

Andriushchenko, Croce, Flammarion, Hein 2020 (arXiv 1912.00049): algorithm 1 with the proposals of
algorithms 2 ('linf') and 3 ('l2'). Constants and margin loss are those of AutoAttack's version.

Two differences from AutoAttack's code: positions include the last row and column, as in the paper, and every example
draws its own ones, where AutoAttack's batch shares them.
"""

import bisect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.attacks import inputs, loops, losses, projections
from convnorm_jax.attacks.inputs import LogitsFn

# The share of pixels that a square covers: 0.8 at first, halved after each of these queries out of 10,000.
_FIRST_SHARE = 0.8
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

_SMALLEST_NORM = 1e-12


class SquareState(NamedTuple):
    """The state of the attack; every array has the batch as its first axis.

    images: float [B, H, W, C], the best perturbed images so far, in the ball and in [0, 1].
    margin: float32 [B] or wider, their largest wrong logit minus the logit of the label.
    queries: int32 [B], passes of the network that each example has used, with its start.
    fooled: bool [B], whether another class than the label is predicted, or logits are not finite.
    """

    images: jax.Array
    margin: jax.Array
    queries: jax.Array
    fooled: jax.Array


def square(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array,
    norm: str = 'linf',
    queries: int = 5000,
    rng: jax.Array,
) -> SquareState:
    """The whole attack: a start, then up to `queries` random changes, each kept if the margin grows.

    Can be jitted. It ends when all are fooled. On a CPU more than a few queries are much faster as a
    host loop over a jitted `square_advance` (`loops.unrolls` says why). An example whose clean image
    is misclassified is attacked like any other.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K]. Never differentiated.
      images: float [B, H, W, C] in [0, 1].
      labels: int [B], the true classes.
      epsilon: radius of the ball, in pixel units of [0, 1] (l2: Euclidean length over all pixels
        and channels); a number, or one per image, [B]; may be traced.
      norm: 'linf' or 'l2' (static).
      queries: changes tried after the start, at least 1 (static); sets how fast the squares shrink.
      rng: a PRNG key, or one key per image.

    Returns:
      SquareState; its images are the adversarial ones. A constant to differentiation.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    inputs.check_count(queries, 'queries')
    options: dict[str, Any] = {'epsilon': epsilon, 'norm': norm, 'rng': rng}
    start = square_start(logits_fn, images, labels, **options)
    images = projections.clip_pixels(jnp.asarray(images))  # checked by now: only rounding is left

    def advance(state, first_query, count):
        return square_advance(
            logits_fn, images, labels, state, first_query=first_query, queries=queries, count=count, **options
        )

    def goes_on(carry):
        query, state = carry
        return (query < queries) & ~jnp.all(state.fooled)

    def loop(start):
        turn = lambda carry: (carry[0] + 1, advance(carry[1], carry[0], 1))
        return jax.lax.while_loop(goes_on, turn, (jnp.int32(0), start))[1]

    return loops.by_platform(queries, lambda start: advance(start, 0, queries), loop, start)


def square_start(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array,
    norm: str = 'linf',
    rng: jax.Array,
) -> SquareState:
    """The first perturbation and its margin: one query.

    'linf': every column of every channel moves by +-epsilon (vertical stripes). 'l2': a grid of
    about 5 x 5 of the attack's pattern, scaled to epsilon. Clipped to [0, 1].

    Arguments and errors: see `square`.
    """
    inputs.check_ball(epsilon, norm)
    images, labels = inputs.checked_problem(logits_fn, images, labels)
    keys = inputs.fold_in(inputs.example_keys(rng, images.shape[0]), 0)
    noise = jax.vmap({'linf': _stripes, 'l2': _grid}[norm], (0, None))(keys, images.shape[1:])
    epsilon = inputs.per_image(epsilon, images, 'epsilon')
    perturbed = projections.clip_pixels(images + epsilon * noise.astype(images.dtype))
    margin, fooled = _judged(logits_fn, perturbed, labels)
    return SquareState(perturbed, margin, jnp.ones(labels.shape, jnp.int32), fooled)


def square_advance(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    state: SquareState,
    *,
    epsilon: float | jax.Array,
    norm: str = 'linf',
    rng: jax.Array,
    first_query: int | jax.Array,
    queries: int = 5000,
    count: int,
) -> SquareState:
    """`count` more queries, from number `first_query` on; those past `queries` change nothing.

    One compiled program serves all chunks of an attack, because `first_query` may be traced. A fooled
    example is neither changed nor counted any more. Examples may be packed into other batches between
    two calls, together with their labels, state and keys (`inputs.example_keys`).

    Args:
      images, labels: the clean images and their classes, as given to `square_start`.
      state: from `square_start` or an earlier call.
      first_query: queries of the attack, without the start, before this call.
      queries: of the whole attack, without the start (static); sets the size of the squares.
      count: queries of this call, at least 1 (static).
      logits_fn, epsilon, norm, rng: see `square`.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    images, labels = inputs.checked_batch(images, labels)
    inputs.check_ball(epsilon, norm)
    inputs.check_count(queries, 'queries')
    inputs.check_count(count, 'count')
    epsilon = jnp.broadcast_to(inputs.per_image(epsilon, images, 'epsilon').ravel(), labels.shape)
    keys = inputs.example_keys(rng, images.shape[0])
    propose, corners = {'linf': (_propose_linf, 1), 'l2': (_propose_l2, 2)}[norm]
    # Drawn at once: unrolled with the queries, the generator would take most of the compile time.
    numbers = jax.vmap(_numbers, (None, 0, None))(
        keys, first_query + jnp.arange(count), 2 * corners + 1 + images.shape[3]
    )

    def body(turn, state):
        query = first_query + turn
        candidate = propose(images, state.images, numbers[turn], _stage(query, queries), epsilon)
        return _better(logits_fn, candidate, labels, state, query < queries)

    return loops.repeat(count, body, state)


def _better(logits_fn, candidate, labels, state, in_time):
    """The state after the candidates were evaluated, changed only where an example is still active."""
    margin, fooled = _judged(logits_fn, candidate, labels)
    active = in_time & ~state.fooled
    taken = active & (fooled | (margin > state.margin))
    return SquareState(
        projections.choose(taken, candidate, state.images),
        jnp.where(taken, margin, state.margin),
        state.queries + active.astype(jnp.int32),
        state.fooled | (active & fooled),
    )


def _judged(logits_fn, images, labels):
    # Without stop_gradient a training step around the attack would differentiate its loop.
    logits = jax.lax.stop_gradient(logits_fn(images))
    return losses.attack_loss(logits, labels, 'margin'), ~losses.correct(logits, labels)


def _stage(query, queries):
    """How many times the covered share has been halved at this query (traced) of `queries` (static)."""

    # Rounded as in AutoAttack, in double precision: the first query of every stage is computed on the host.
    def rescaled(number):
        return int(number / queries * 10000)

    firsts = [bisect.bisect_right(range(queries), limit, key=rescaled) for limit in _HALVINGS]
    return jnp.sum(query >= jnp.asarray(firsts))


def _sides(height, width, norm):
    """The side of the square at every stage, int [stages]; 'l2': odd where the image allows it."""
    sides = []
    for stage in range(len(_HALVINGS) + 1):
        side = round((_FIRST_SHARE / 2**stage * height * width) ** 0.5)
        side = max(side, 1) if norm == 'linf' else max(side, 3) | 1
        sides.append(min(side, height, width))
    return sides


def _numbers(keys, query, count):
    """The random numbers of one query, uniform in [0, 1), float32 [B, count]; query -1 is the start."""
    draw = lambda key: jax.random.uniform(key, (count,), jnp.float32)
    return jax.vmap(draw)(inputs.fold_in(keys, query + 1))


def _moves(numbers, side, shape):
    """Positions and signs from one example's numbers [2 * corners + 1 + C].

    Returns:
      (rows [corners], columns [corners] of the upper left corners of squares, a coin (bool),
      signs [C] of -1 and 1).
    """
    height, width, channels = shape
    corners, coin, signs = numbers[: -channels - 1], numbers[-channels - 1], numbers[-channels:]
    rows, columns = corners.reshape(2, -1)
    # As floats: strict promotion forbids mixing them with integers.
    reach = [jnp.asarray(size - side + 1).astype(numbers.dtype) for size in (height, width)]
    rows, columns = ((place * size).astype(jnp.int32) for place, size in zip((rows, columns), reach))
    return rows, columns, coin < 0.5, jnp.where(signs < 0.5, -1.0, 1.0)


def _window(row, column, side, shape):
    """1 in the square, else 0, [H, W, 1]: by comparison, because `side` changes within one program."""
    rows = jnp.arange(shape[0])[:, None, None] - row
    columns = jnp.arange(shape[1])[None, :, None] - column
    return (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)


def _propose_linf(images, best, numbers, stage, epsilon):
    """Algorithm 2: in one square every channel moves to +epsilon or to -epsilon, [B, H, W, C]."""
    shape = images.shape[1:]
    side = jnp.asarray(_sides(*shape[:2], 'linf'))[stage]

    def one(image, best, numbers, epsilon):
        rows, columns, _, signs = _moves(numbers, side, shape)
        moved = projections.clip_pixels(image + epsilon * signs.astype(image.dtype)[None, None])
        return jnp.where(_window(rows[0], columns[0], side, shape), moved, best)

    return jax.vmap(one)(images, best, numbers, epsilon)


def _propose_l2(images, best, numbers, stage, epsilon):
    """Algorithm 3: the mass of one square moves to another one, in a new pattern, [B, H, W, C].

    In float32 or wider: in float16 the length of a perturbation overflows, and the smallest norm is zero.
    """
    shape, dtype = images.shape[1:], images.dtype
    images, best, epsilon = projections.wide(images), projections.wide(best), projections.wide(epsilon)
    sides = _sides(*shape[:2], 'l2')
    side = jnp.asarray(sides)[stage]
    pattern = jnp.asarray(_canvases(tuple(sides)), images.dtype)[stage]

    def one(image, best, numbers, epsilon):
        rows, columns, coin, signs = _moves(numbers, side, shape)
        target = _window(rows[0], columns[0], side, shape)
        source = _window(rows[1], columns[1], side, shape)
        placed = _placed(jnp.where(coin, pattern.T, pattern), rows[0], columns[0], target)
        delta = _moved_mass(best - image, target, source, placed * signs.astype(image.dtype)[None, None], epsilon)
        return projections.clip_pixels(image + delta * (epsilon / jnp.maximum(_length(delta, None), _SMALLEST_NORM)))

    return jax.vmap(one)(images, best, numbers, epsilon).astype(dtype)


def _moved_mass(delta, target, source, pattern, epsilon):
    """The perturbation [H, W, C] with a new pattern in `target` and zeros in the rest of `source`, unscaled.

    The length of `target`, per channel: that of both windows, and an equal share of what is left to
    the radius of the ball (clipping to [0, 1] shortens perturbations).
    """
    old = jnp.where(target, delta, 0)
    new = pattern + old / jnp.maximum(_length(old), _SMALLEST_NORM)
    spare = jnp.maximum(epsilon**2 - jnp.sum(delta**2), 0) / delta.shape[-1]
    length = jnp.sqrt(spare + _length(jnp.where(target | source, delta, 0)) ** 2)
    new = new * (length / jnp.maximum(_length(new), _SMALLEST_NORM))
    return jnp.where(target, new, jnp.where(source, 0, delta))


def _length(delta, axis=(0, 1)):
    """Euclidean length, of every channel or (axis None) of all of [H, W, C]."""
    return jnp.sqrt(jnp.sum(delta**2, axis=axis, keepdims=True))


def _placed(pattern, row, column, target):
    """The pattern, in the upper left corner of [S, S], moved to (row, column): [H, W, 1], 0 outside of `target`."""
    height, width, _ = target.shape
    rows, columns = jnp.arange(height) - row, jnp.arange(width) - column
    placed = pattern.at[rows[:, None], columns[None]].get(mode='clip', wrap_negative_indices=False)
    return jnp.where(target, placed[:, :, None], 0)


def _canvases(sides):
    """The pattern of every side, each in the upper left corner of zeros, [stages, S, S]."""
    largest = max(sides)
    return np.stack([np.pad(_pattern(side), (0, largest - side)) for side in sides])


def _pattern(side):
    """Section 3.4, `eta`: two bumps of opposite sign, one above the other, float64 [side, side], of length 1."""
    upper = side // 2
    pattern = np.concatenate([_bump(upper, side), -_bump(side - upper, side)])
    return pattern / np.linalg.norm(pattern)


def _bump(height, width):
    """Squares around the centre, the k-th of weight 1 / k^2, summed: [height, width], of length 1."""
    if height == 0:
        return np.zeros((0, width))
    rows, columns = np.ogrid[:height, :width]
    ring = np.maximum(abs(rows - height // 2), abs(columns - width // 2))
    # A cell is in all squares from its ring outwards.
    bump = np.cumsum(1 / np.arange(ring.max() + 1, 0, -1) ** 2)[::-1][ring]
    return bump / np.linalg.norm(bump)


def _stripes(key, shape):
    """+-1, the same down a column, [1, W, C]."""
    return jax.random.rademacher(key, (1, *shape[1:]), jnp.float32)


def _grid(key, shape):
    """A grid of patterns of random signs and directions, [H, W, C], of length 1."""
    height, width, channels = shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    coin_key, sign_key = jax.random.split(key)
    coins = jax.random.bernoulli(coin_key, shape=(rows, columns, 1, 1))
    signs = jax.random.rademacher(sign_key, (rows, columns, 1, 1, channels), jnp.float32)
    pattern = jnp.asarray(_pattern(side), jnp.float32)
    tiles = jnp.where(coins, pattern.T, pattern)[..., None] * signs
    tiles = tiles.swapaxes(1, 2).reshape(rows * side, columns * side, channels)
    before = (height % side // 2, width % side // 2)
    after = (height - rows * side - before[0], width - columns * side - before[1])
    noise = jnp.pad(tiles, ((before[0], after[0]), (before[1], after[1]), (0, 0)))
    return noise / _length(noise, None)
