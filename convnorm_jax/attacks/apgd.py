"""Auto-PGD: PGD that adapts its step size (Croce and Hein 2020, arXiv 2003.01690, algorithm 1).

Where the authors' code (AutoAttack) and their paper differ, this follows the code: each interval between checks is
rounded down; the first loss counts as an increase if it is above 0, whatever the loss of the start was; the first check
does not test whether the best loss has stalled. Unlike in both, an example is not changed any more once it is fooled.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from convnorm_jax.attacks import inputs, loops, losses, projections
from convnorm_jax.attacks.inputs import LogitsFn
from convnorm_jax.errors import UserError

_FIRST_STEP = 2.0  # in units of epsilon
_MOMENTUM = 0.75  # alpha of the paper: the share of the new step
_RHO = 0.75  # the step is kept if the loss rose in more than this share of the iterations


@struct.dataclass
class ApgdState:
    """A run between two iterations; a frozen pytree.

    Every leaf but `iteration` has the batch as its first axis, so that a subset of the examples can be selected:
    `jax.tree.map(lambda leaf: leaf[kept] if leaf.ndim else leaf, state)`.

    Attributes:
      iteration: int32 scalar, iterations done.
      perturbed, previous: [B, H, W, C], the iterate and the one before it.
      gradient: [B, H, W, C], the gradient of the loss at `perturbed`.
      best_images, best_gradient, best_loss: the point of highest loss, its gradient, its loss [B].
      last_loss: [B], the loss of the last iteration; 0 before the first.
      best_at_check: [B], `best_loss` at the last check of the step size.
      increases: int32 [B], iterations since the last check in which the loss rose.
      reduced: bool [B], whether the last check halved the step; true before the first.
      step_size: [B], in units of the pixels, float32 or wider.
      fooled: bool [B], whether `perturbed` is misclassified; such an example no longer moves.
    """

    iteration: jax.Array
    perturbed: jax.Array
    previous: jax.Array
    gradient: jax.Array
    best_images: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    last_loss: jax.Array
    best_at_check: jax.Array
    increases: jax.Array
    reduced: jax.Array
    step_size: jax.Array
    fooled: jax.Array

    @property
    def adversarial(self) -> jax.Array:
        """Images [B, H, W, C]: the iterate that fooled the model, else the point of highest loss."""
        return projections.choose(self.fooled, self.perturbed, self.best_images)


def apgd(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array,
    norm: str = 'linf',
    steps: int = 100,
    rng: jax.Array,
    loss: str = 'cross_entropy',
    targets: jax.Array | None = None,
) -> jax.Array:
    """A whole run from one random start on the surface of the ball.

    Pure and jittable; `steps` + 2 forward and `steps` + 1 backward passes. It is one program, in which a fooled example
    still costs its passes. For many examples use `autoattack`: it runs chunks of iterations and packs the examples that
    are still robust into full batches.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K].
      images: float [B, H, W, C] in [0, 1].
      labels: int [B], the true classes.
      epsilon: radius of the ball, in pixel units of [0, 1] (l2: Euclidean length over all pixels
        and channels); a number, or one per image, [B]; may be traced.
      norm: 'linf' or 'l2' (static).
      steps: number of iterations, at least 1 (static).
      rng: a PRNG key for the start, or one key per image.
      loss: is maximized, one of `inputs.LOSSES` (static).
      targets: int [B], target classes of `losses.targeted_loss`. Any wrong prediction counts as fooled, with targets
        too.

    Returns:
      Images of the shape and dtype of `images`, a constant to differentiation. A misclassified example is returned
      unchanged; any other as its first misclassified iterate, else as its point of highest loss.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    inputs.check_count(steps, 'steps')
    images, labels = _checked_problem(logits_fn, images, labels, targets, epsilon, norm, loss)
    goal: dict[str, Any] = {'epsilon': epsilon, 'norm': norm, 'loss': loss, 'targets': targets}
    state = _start(logits_fn, images, labels, rng=rng, **goal)
    state = apgd_advance(logits_fn, images, labels, state, steps=steps, count=steps, **goal)
    clean = losses.correct(logits_fn(images), labels)
    return jax.lax.stop_gradient(projections.choose(clean, state.adversarial, images))


def apgd_start(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array,
    norm: str,
    rng: jax.Array,
    loss: str,
    targets: jax.Array | None = None,
) -> ApgdState:
    """The state before the first iteration; one forward and one backward pass. Arguments: see `apgd`."""
    images, labels = _checked_problem(logits_fn, images, labels, targets, epsilon, norm, loss)
    return _start(logits_fn, images, labels, epsilon=epsilon, norm=norm, rng=rng, loss=loss, targets=targets)


def _start(logits_fn, images, labels, *, epsilon, norm, rng, loss, targets):
    loss_fn = _goal(labels, targets, loss)
    epsilon = inputs.per_image(epsilon, images, 'epsilon')
    start = projections.clip_pixels(images + epsilon * _surface(rng, images, norm))
    value, logits, gradient = losses.value_and_gradient(logits_fn, start, loss_fn)
    return ApgdState(
        iteration=jnp.zeros((), jnp.int32),
        perturbed=start,
        previous=start,
        gradient=gradient,
        best_images=start,
        best_gradient=gradient,
        best_loss=value,
        last_loss=jnp.zeros_like(value),
        best_at_check=value,
        increases=jnp.zeros(labels.shape, jnp.int32),
        reduced=jnp.ones(labels.shape, bool),
        step_size=jnp.broadcast_to(projections.wide(_FIRST_STEP * epsilon).ravel(), labels.shape),
        fooled=~losses.correct(logits, labels),
    )


def apgd_advance(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    state: ApgdState,
    *,
    epsilon: float | jax.Array,
    norm: str,
    loss: str,
    steps: int,
    count: int,
    targets: jax.Array | None = None,
) -> ApgdState:
    """The state `count` iterations later, in a run of `steps` in all.

    Several short calls equal one long call. `state.iteration` may be traced: one program serves all chunks of a run.
    Iterations past `steps` change nothing, so that the last chunk can be as long as the others.

    Args:
      state: as `apgd_start` or this function returned it for the same arguments.
      steps: iterations of the whole run; they determine when the step size is checked (static).
      count: iterations of this call, at least 1 (static).
      Others: see `apgd`.

    Raises:
      UserError: as `apgd`, or a state of another batch.
    """
    images, labels = inputs.checked_batch(images, labels)
    inputs.check_loss(loss)
    inputs.check_ball(epsilon, norm)
    inputs.check_count(steps, 'steps')
    inputs.check_count(count, 'count')
    loss_fn = _goal(labels, targets, loss)
    if state.perturbed.shape != images.shape:
        raise UserError(f'state.perturbed.shape={state.perturbed.shape}: expected {images.shape}, as images')
    epsilon = inputs.per_image(epsilon, images, 'epsilon')
    windows = jnp.asarray(_windows(steps))

    def body(_, state):
        moved = _moved(state, images, epsilon, norm)
        new = _judged(state, moved, *losses.value_and_gradient(logits_fn, moved, loss_fn), labels)
        new = _checked_step(new, windows[state.iteration])
        goes_on = ~state.fooled & (state.iteration < steps)
        kept = jax.tree.map(lambda a, b: projections.choose(goes_on, a, b) if a.ndim else a, new, state)
        return kept.replace(iteration=jnp.minimum(state.iteration + 1, steps))

    return loops.repeat(count, body, state)


def _checked_problem(logits_fn, images, labels, targets, epsilon, norm, loss):
    inputs.check_loss(loss)
    inputs.check_ball(epsilon, norm)
    fewest = inputs.fewest_classes(loss, targeted=targets is not None)
    return inputs.checked_problem(logits_fn, images, labels, targets, classes=fewest)


def _goal(labels, targets, loss):
    """logits -> loss [B]."""
    if targets is None:
        return lambda logits: losses.attack_loss(logits, labels, loss)
    targets = jnp.asarray(targets)
    inputs.check_classes(targets, labels.shape[0], 'targets')
    return lambda logits: losses.targeted_loss(logits, labels, targets, loss)


def _surface(rng, images, norm):
    """Noise of norm 1: uniform in a cube, or normal, divided by its norm."""
    keys, shape, dtype = inputs.example_keys(rng, images.shape[0]), images.shape[1:], projections.wide_dtype(images)
    if norm == 'linf':
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, -1, 1))(keys)
    else:
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
    return projections.unit(noise, norm).astype(images.dtype)


def _windows(steps):
    """int32 [steps]: for an iteration that ends with a check, the iterations since the last check; else 0."""
    window, shorter, smallest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    table = np.zeros(steps, np.int32)
    done = window
    while done <= steps:
        table[done - 1] = window
        window = max(window - shorter, smallest)
        done += window
    return table


def _moved(state, images, epsilon, norm):
    """The next iterate: a projected ascent step, mixed with the last move by `_MOMENTUM`."""
    ascent = projections.expand(state.step_size).astype(images.dtype) * projections.steepest(state.gradient, norm)
    target = projections.project(state.perturbed + ascent, images, epsilon, norm)
    share = jnp.where(state.iteration == 0, 1, _MOMENTUM).astype(images.dtype)
    mixed = state.perturbed + share * (target - state.perturbed) + (1 - share) * (state.perturbed - state.previous)
    return projections.project(mixed, images, epsilon, norm)


def _judged(state, moved, loss, logits, gradient, labels):
    """The state at the new iterate, before the check of its step size."""
    better = loss > state.best_loss
    return state.replace(
        perturbed=moved,
        previous=state.perturbed,
        gradient=gradient,
        best_images=projections.choose(better, moved, state.best_images),
        best_gradient=projections.choose(better, gradient, state.best_gradient),
        best_loss=jnp.where(better, loss, state.best_loss),
        last_loss=loss,
        increases=state.increases + (loss > state.last_loss).astype(jnp.int32),
        fooled=~losses.correct(logits, labels),
    )


def _checked_step(state, window):
    """Halves the step and restarts from the best point where progress was poor (section 3.2 of the paper).

    Args:
      window: int scalar, see `_windows`.
    """
    due = window > 0
    oscillates = state.increases.astype(jnp.float32) <= _RHO * window.astype(jnp.float32)
    stands_still = ~state.reduced & (state.best_at_check >= state.best_loss)
    halve = due & (oscillates | stands_still)
    # An example that has just been fooled keeps its iterate.
    back = halve & ~state.fooled
    return state.replace(
        perturbed=projections.choose(back, state.best_images, state.perturbed),
        gradient=projections.choose(back, state.best_gradient, state.gradient),
        step_size=jnp.where(halve, state.step_size / 2, state.step_size),
        reduced=jnp.where(due, halve, state.reduced),
        best_at_check=jnp.where(due, state.best_loss, state.best_at_check),
        increases=jnp.where(due, 0, state.increases),
    )
