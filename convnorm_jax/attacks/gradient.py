"""Gradient attacks with a fixed step in a ball: FGSM and PGD.

FGSM: Goodfellow, Shlens, Szegedy 2015 (arXiv 1412.6572), equation in section 4.
PGD:  Madry et al. 2018 (arXiv 1706.06083), section 2.1.
Margin loss: Carlini and Wagner 2017 (arXiv 1608.04644), f_6 with the opposite sign and no cut-off.

An attack is start x step x projection x loss; the pieces are in `projections.py` and `losses.py`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from convnorm_jax.attacks import inputs, loops, losses, projections
from convnorm_jax.attacks.inputs import LogitsFn
from convnorm_jax.errors import UserError


def fgsm(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array,
    loss: str = 'cross_entropy',
) -> jax.Array:
    """One step of `epsilon` along the sign of the gradient, from the clean image.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K].
      images: float [B, H, W, C] in [0, 1].
      labels: int [B], the true classes.
      epsilon: radius of the ball, in pixel units of [0, 1]; a number, or one per image, [B]; may be traced.
      loss: is maximized, one of `LOSSES` (static).

    Returns:
      Adversarial images, shape and dtype of `images`, in [0, 1]; a constant to differentiation. NaN
      where traced pixels or classes are out of range (see `inputs`).

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    inputs.check_loss(loss)
    inputs.check_ball(epsilon, 'linf')
    images, labels = inputs.checked_problem(logits_fn, images, labels, classes=inputs.fewest_classes(loss))
    epsilon = inputs.per_image(epsilon, images, 'epsilon')
    loss_fn = functools.partial(losses.attack_loss, labels=labels, loss=loss)
    return _step(logits_fn, images, images, loss_fn, epsilon, epsilon, 'linf')


def pgd(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array,
    step_size: float | jax.Array,
    steps: int,
    norm: str = 'linf',
    rng: jax.Array | None = None,
    init: jax.Array | None = None,
    restarts: int = 1,
    loss: str | Callable = 'cross_entropy',
    targets: jax.Array | None = None,
) -> jax.Array:
    """`steps` steps of steepest ascent, each projected on the ball and on [0, 1].

    A step goes along the sign of the gradient ('linf') or along the gradient over its length
    ('l2'). The start is the clean image plus `init` if given, else plus noise drawn uniformly from
    the ball with `rng` if given, else the clean image itself; projected.

    With several restarts, each from its own noise, an example keeps the first perturbation that
    fools the model, else the one of highest loss. Restart number i draws the same noise whatever
    `restarts` is, so that more restarts never find less.

    Examples are independent: neither padding a batch nor its size changes an example's gradient.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K].
      images: float [B, H, W, C] in [0, 1].
      labels: int [B], the true classes.
      epsilon: radius of the ball, in pixel units of [0, 1] (l2: Euclidean length over all pixels
        and channels); a number, or one per image, [B]; may be traced.
      step_size: length of a step, same units; a number, or one per image, [B]; may be traced.
      steps: number of steps, at least 1 (static).
      norm: 'linf' or 'l2' (static).
      rng: a PRNG key for the start noise, or one key per image.
      init: float [B, H, W, C], the start noise to use instead of drawing it.
      restarts: number of starts (static); more than one needs `rng` and no `init`.
      loss: is maximized, one of `LOSSES` (static), or a function logits [B, K] -> loss [B]. Unlike
        that of the cross-entropy, the gradient of the margin does not vanish where the model is very
        confident.
      targets: int [B], target classes; an example then counts as fooled when its target is
        predicted. None: any wrong class counts, and so do logits that are not finite.

    Returns:
      Adversarial images, shape and dtype of `images`, in [0, 1]; a constant to differentiation. NaN
      where traced pixels or classes are out of range (see `inputs`).

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name.
    """
    if not callable(loss):
        inputs.check_loss(loss)
    inputs.check_ball(epsilon, norm)
    inputs.check_step_size(step_size, norm)
    inputs.check_count(steps, 'steps')
    fewest = 2 if callable(loss) else inputs.fewest_classes(loss, targeted=targets is not None)
    images, labels = inputs.checked_problem(logits_fn, images, labels, targets, classes=fewest)
    _check_start(images, rng, init, restarts)
    epsilon = inputs.per_image(epsilon, images, 'epsilon')
    step_size = inputs.per_image(step_size, images, 'step_size')
    keys = None if rng is None else inputs.example_keys(rng, images.shape[0])
    loss_fn, fooled = _goal(labels, targets, loss)
    copies = steps * restarts

    def attack_from(noise):
        def body(_, perturbed):
            return _step(logits_fn, perturbed, images, loss_fn, step_size, epsilon, norm)

        return loops.repeat(steps, body, _start(images, noise, epsilon, norm, init is not None), copies)

    def attempt(index):
        return attack_from(projections.uniform_start(inputs.fold_in(keys, index), images, epsilon, norm))

    if init is not None:
        return attack_from(jnp.asarray(init, images.dtype))
    if rng is None:
        return attack_from(jnp.zeros_like(images))
    if restarts == 1:
        return attempt(0)

    def judged(perturbed):
        logits = logits_fn(perturbed)
        loss = loss_fn(logits)
        return perturbed, fooled(logits), jnp.where(jnp.isnan(loss), -jnp.inf, loss)

    def body(index, best):
        return _stronger(best, judged(attempt(index + 1)))

    return loops.repeat(restarts - 1, body, judged(attempt(0)), copies)[0]


def _goal(labels, targets, loss):
    """(logits -> loss [B], logits -> is it fooled [B]) of an attack away from labels or towards targets."""
    if targets is None:
        loss_fn = loss if callable(loss) else functools.partial(losses.attack_loss, labels=labels, loss=loss)
        return loss_fn, lambda logits: ~losses.correct(logits, labels)
    targets = jnp.asarray(targets)
    inputs.check_classes(targets, labels.shape[0], 'targets')
    loss_fn = loss if callable(loss) else lambda logits: losses.targeted_loss(logits, labels, targets, loss)
    return loss_fn, lambda logits: losses.correct(logits, targets)


def _start(images, noise, epsilon, norm, given):
    # Given noise is used as it is, inside the ball or not, as in the published code.
    moved = images + noise
    return projections.clip_pixels(moved) if given else projections.project(moved, images, epsilon, norm)


def _step(logits_fn, perturbed, images, loss_fn, step_size, epsilon, norm):
    """One ascent step, projected."""
    _, _, gradient = losses.value_and_gradient(logits_fn, perturbed, loss_fn)
    return projections.project(perturbed + step_size * projections.steepest(gradient, norm), images, epsilon, norm)


def _stronger(best, candidate):
    """Per example the candidate if it is the first to fool, or if none did and its loss is higher."""
    best_images, best_fooled, best_loss = best
    images, fooled, loss = candidate
    better = ~best_fooled & (fooled | (loss > best_loss))
    return projections.choose(better, images, best_images), best_fooled | fooled, jnp.where(better, loss, best_loss)


def _check_start(images, rng, init, restarts):
    inputs.check_count(restarts, 'restarts')
    if restarts > 1 and (rng is None or init is not None):
        raise UserError(f'restarts={restarts}: more than one needs rng, and no init')
    if init is not None and jnp.shape(init) != images.shape:
        raise UserError(f'init.shape={jnp.shape(init)}: expected {images.shape}, as images')
