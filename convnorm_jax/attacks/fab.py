"""FAB-T, the targeted fast adaptive boundary attack: the smallest perturbation that fools the model.

Croce and Hein 2020 (arXiv 1907.02044), algorithm 1, as in AutoAttack: one target class at a time, no final search. Each
iteration linearizes the boundary between the label and the target at the current point, projects the current point and
the clean image onto it (exactly, within [0, 1]), moves slightly past these projections, and steps back towards the
clean image if the model is fooled.

The radius epsilon only scales the random start. To know whether an example is broken within epsilon, compare
`FabState.distance` with it.

Every array of the state has the batch as its first axis, so that an attack can run in chunks, between which examples
can be packed into other batches.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from convnorm_jax.attacks import inputs, loops, losses, projections
from convnorm_jax.attacks.inputs import LogitsFn
from convnorm_jax.errors import UserError

# The settings of the paper and of AutoAttack.
ALPHA_MAX = 0.1  # largest weight of the clean image's projection
ETA = 1.05  # how far a step goes past the boundary
BETA = 0.9  # what a step back towards the clean image leaves of the perturbation

# An iteration is a gradient and a prediction at another point.
_PASSES = 2
_SHORTEST_MOVE = 1e-8


class FabState(NamedTuple):
    """The current point of the attack, and the best it has found.

    Attributes:
      current: float [B, H, W, C], the point of the next linearization, in [0, 1].
      nearest: float [B, H, W, C], the image nearest to the clean one that fools the model; the
        clean image where there is none yet.
      distance: float32 [B] or wider, norm of `nearest` minus the clean image, inf where there is none yet
        and 0 where the clean image itself is misclassified.
    """

    current: jax.Array
    nearest: jax.Array
    distance: jax.Array


def fab(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    targets: jax.Array,
    norm: str = 'linf',
    steps: int = 100,
    epsilon: float | jax.Array | None = None,
    rng: jax.Array | None = None,
) -> jax.Array:
    """The smallest perturbation found that makes the model predict another class than the label.

    Fooled means any wrong class, the target or not, and logits that are not finite.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K].
      images: float [B, H, W, C] in [0, 1].
      labels: int [B], the true classes.
      targets: int [B], or [T, B]: T attacks one after another, each from its own start; an example
        keeps the best. FAB-T takes the most likely wrong classes (`nth_wrong_class`).
      norm: is minimized, 'linf' or 'l2' (static).
      steps: number of iterations, at least 1 (static).
      epsilon: needed with `rng`, see `fab_start`.
      rng: None starts at the clean image, as AutoAttack does. A PRNG key, or one key per image,
        draws a random start.

    Returns:
      Adversarial images, shape and dtype of `images`, in [0, 1], at any distance; the clean image
      where it is misclassified or where nothing was found. A constant to differentiation.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    inputs.check_count(steps, 'steps')
    _check_goal(epsilon, norm, rng)
    images, labels = inputs.checked_problem(logits_fn, images, labels, targets)
    targets = jnp.asarray(targets)
    targets = targets[None] if targets.ndim == 1 else targets
    keys = None if rng is None else inputs.example_keys(rng, images.shape[0])

    def attempt(number, best):
        goal = jax.lax.dynamic_index_in_dim(targets, number, keepdims=False)
        start_rng = None if keys is None else inputs.fold_in(keys, number)
        state = _first_state(logits_fn, images, labels, epsilon, norm, start_rng)
        state = fab_advance(logits_fn, images, labels, state, norm=norm, targets=goal, count=steps)
        better = state.distance < best.distance
        return jax.tree.map(functools.partial(projections.choose, better), state, best)

    turns = targets.shape[0]
    nothing = FabState(images, images, jnp.full(images.shape[0], jnp.inf, projections.wide_dtype(images)))
    return loops.repeat(turns, attempt, nothing, turns * (_PASSES * steps + 1)).nearest


def fab_start(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array | None,
    norm: str,
    rng: jax.Array | None,
    targets: jax.Array,
) -> FabState:
    """The state before the first iteration; one forward pass, which finds the misclassified examples.

    Args:
      logits_fn, images, labels, norm: as for `fab`.
      epsilon: radius in pixel units of [0, 1], one, or one per image, [B]. The random start lies at half of
        it from the clean image (before clipping to [0, 1]), in a random direction; not used, and may be
        None, without `rng`.
      rng: as for `fab`.
      targets: int [B], checked here; `fab_advance` uses them.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    _check_goal(epsilon, norm, rng)
    images, labels = inputs.checked_problem(logits_fn, images, labels, targets)
    return _first_state(logits_fn, images, labels, epsilon, norm, rng)


def fab_advance(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    state: FabState,
    *,
    norm: str,
    targets: jax.Array,
    count: int,
    limit: int | jax.Array | None = None,
) -> FabState:
    """The state `count` iterations (static) later; several short calls equal one long call.

    An iteration costs a gradient and a forward pass. Arguments and errors are those of `fab_start`.

    Args:
      limit: iterations of this call past so many change nothing (may be traced), so that the last chunk can use the
        program of the others. None: no limit.
    """
    images, labels = inputs.checked_batch(images, labels)
    inputs.check_ball(None, norm)
    inputs.check_count(count, 'count')
    targets = jnp.asarray(targets)
    inputs.check_classes(targets, images.shape[0], 'targets')

    def body(turn, state):
        new = _iterate(logits_fn, images, labels, targets, state, norm)
        return new if limit is None else jax.tree.map(lambda a, b: jnp.where(turn < limit, a, b), new, state)

    return loops.repeat(count, body, state, _PASSES * count)


def _check_goal(epsilon, norm, rng):
    inputs.check_ball(epsilon, norm)
    if rng is not None and epsilon is None:
        raise UserError('epsilon=None: expected the radius of the random start, as rng is given')


def _first_state(logits_fn, images, labels, epsilon, norm, rng):
    wrong = ~losses.correct(logits_fn(images), labels)
    distance = jnp.where(wrong, 0, jnp.inf).astype(projections.wide_dtype(images))
    return FabState(_start(images, epsilon, norm, rng), images, distance)


def _iterate(logits_fn, images, labels, targets, state, norm):
    """One iteration of the paper's algorithm 1, in float32 or wider."""

    def lead(logits):
        logits = projections.wide(logits)
        return losses.at_label(logits, targets) - losses.at_label(logits, labels)

    gap, _, slope = losses.value_and_gradient(logits_fn, state.current, lead)
    points = projections.wide(jnp.stack([state.current, images]))
    # Adversarial training must not differentiate through the loop of the projection.
    gap, slope = jax.lax.stop_gradient((gap.astype(points.dtype), projections.finite(slope).astype(points.dtype)))
    clean_gap = gap + jnp.sum(slope * (points[1] - points[0]), axis=(1, 2, 3))
    pixels = math.prod(images.shape[1:])
    moves = _shortest_move(
        points.reshape(2, images.shape[0], pixels),
        slope.reshape(1, images.shape[0], pixels),
        jnp.stack([gap, clean_gap]),
        norm,
    ).reshape(points.shape)
    lengths = [jnp.maximum(projections.norm_of(move, norm), _SHORTEST_MOVE) for move in moves]
    weight = projections.expand(jnp.minimum(lengths[0] / (lengths[0] + lengths[1]), ALPHA_MAX))
    past = points + ETA * moves
    moved = projections.clip_pixels(past[0] * (1 - weight) + past[1] * weight).astype(images.dtype)
    fooled = ~losses.correct(logits_fn(moved), labels)
    return _record(images, moved, fooled, state, norm)


def _record(images, moved, fooled, state, norm):
    """The state after a move: keeps the nearest, steps back where the model is fooled."""
    delta = moved - images
    distance = projections.norm_of(delta, norm)
    better = fooled & (distance < state.distance)
    return FabState(
        projections.choose(fooled, images + BETA * delta, moved),
        projections.choose(better, moved, state.nearest),
        jnp.where(better, distance, state.distance),
    )


def _start(images, epsilon, norm, rng):
    if rng is None:
        return images
    noise = projections.unit(projections.uniform_start(rng, images, 1, norm), norm)
    return projections.clip_pixels(images + 0.5 * inputs.per_image(epsilon, images, 'epsilon') * noise)


def _shortest_move(points, normals, excess, norm):
    """The shortest move, in `norm`, from points to hyperplanes, without leaving [0, 1].

    The delta of smallest norm with <normal, delta> = -excess and 0 <= point + delta <= 1. If the box does not reach the
    plane, point + delta is the corner of the box nearest to it. An entry where the normal is 0 does not move. Of the
    many solutions in 'linf' it is the one that moves every entry by the same amount, or up to the face of the box.

    Every entry moves by min(level * rate, room): its rate is 1 in 'linf' and |normal| in 'l2' (Karush-Kuhn-Tucker),
    its room is the distance to the face of the box that it moves to. Exact up to rounding. AutoAttack's code sorts;
    Newton's method, which ends after finitely many steps on a concave piecewise linear function, was 30 times faster
    for 64 CIFAR images (2 cores, jax 0.10.2).

    Args:
      points: float [..., D] in [0, 1]. normals: float [..., D]. excess: float [...], <normal, point> minus the offset.
      norm: 'linf' or 'l2' (static).

    Returns:
      delta, float [..., D].
    """
    # In units of the largest entry: squares of the entries of a tiny gradient would underflow.
    scale = jnp.max(jnp.abs(normals), axis=-1)
    scale = jnp.where(scale > 0, scale, 1)
    normals, excess = normals / scale[..., None], excess / scale
    direction = jnp.sign(normals) * jnp.where(excess > 0, -1, 1).astype(normals.dtype)[..., None]
    room = jnp.where(direction > 0, 1 - points, points)
    room = jnp.where(direction == 0, 0, jnp.maximum(room, 0))
    slopes = jnp.broadcast_to(jnp.abs(normals), room.shape)
    rates = slopes if norm == 'l2' else jnp.ones_like(slopes)
    # A square that still underflows would make 0 * inf.
    limits = jnp.where((room > 0) & (slopes * rates > 0), room / rates, 0)
    level = _level(slopes * rates, limits, jnp.abs(excess))[..., None]
    return direction * jnp.where(room > 0, jnp.minimum(level * rates, room), 0)


def _level(weights, limits, total):
    """The level >= 0 with sum_i weights_i * min(level, limits_i) = total; inf where there is none.

    Newton's method from below: the sum is concave and piecewise linear in the level, so that every
    iteration either stays or passes at least one limit. It took 3 to 9 iterations.

    Args:
      weights, limits: float [..., D], at least 0. total: float [...], at least 0.
    """
    full = weights * limits

    def newton(level):
        free = limits > level[..., None]
        return (total - jnp.sum(full, -1, where=~free)) / jnp.sum(weights, -1, where=free)

    def body(state):
        level, _ = state
        new = newton(level)
        # False for nan (no total, nothing free): the level stays, and the loop ends.
        rises = new > level
        return jnp.where(rises, new, level), rises.any()

    return jax.lax.while_loop(lambda state: state[1], body, (jnp.zeros_like(total), jnp.array(True)))[0]
