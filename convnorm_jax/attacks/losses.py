"""Losses that attacks maximize, their gradients, and correct predictions.

An attack is given a model as `logits_fn`: images [B, H, W, C] with pixels in [0, 1] -> logits [B, K]. Normalization,
`train=False` and the parameters are inside it. Every example has its own loss (a sum, not a mean), so that its result
depends neither on the rest of its batch nor on the batch's size.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.attacks.inputs import Array, LogitsFn, check_loss, fewest_classes
from convnorm_jax.attacks.projections import wide
from convnorm_jax.errors import UserError

AnyArray = TypeVar('AnyArray', jax.Array, np.ndarray)

_SMALLEST_DISTANCE = 1e-12


def correct(logits: AnyArray, classes: Array) -> AnyArray:
    """Whether the largest logit is that of the class, and all are finite, bool [B].

    An output that is not finite is no prediction: argmax of NaN is class 0. For JAX arrays or NumPy's.
    """
    numpy = np if isinstance(logits, np.ndarray) else jnp
    return (logits.argmax(-1) == classes) & numpy.isfinite(logits).all(-1)


def attack_loss(logits: jax.Array, labels: jax.Array, loss: str) -> jax.Array:
    """The loss that an untargeted attack maximizes, one value per example.

    Args:
      logits: float [B, K], K at least 2; computed in float32 or wider.
      labels: int [B].
      loss: 'cross_entropy', -log softmax(logits)[label], or
        'margin', max over j != label of logits[j], minus logits[label]: above 0 exactly where
        the prediction is wrong (except for ties), or
        'dlr', the margin over the distance from the largest to the third largest logit: the same
        sign, but unchanged if all logits are scaled (Croce and Hein 2020, arXiv 2003.01690,
        equation 6). Needs three classes.

    Returns:
      float [B].

    Raises:
      UserError: an unknown loss, or logits that are not [B, K] with K large enough.
    """
    check_loss(loss)
    logits = _checked_logits(logits, labels, fewest_classes(loss))
    if loss == 'cross_entropy':
        return -at_label(jax.nn.log_softmax(logits), labels)
    margin = _best_other(logits, labels) - at_label(logits, labels)
    if loss == 'margin':
        return margin
    ordered = jnp.sort(logits, axis=-1)
    return margin / (ordered[:, -1] - ordered[:, -3] + _SMALLEST_DISTANCE)


def targeted_loss(logits: jax.Array, labels: jax.Array, targets: jax.Array, loss: str) -> jax.Array:
    """The loss that an attack towards the classes `targets` maximizes, one value per example.

    Args:
      logits: float [B, K]. labels, targets: int [B], the true and the target classes.
      loss: 'cross_entropy', log softmax(logits)[target];
        'margin', logits[target] minus the largest other logit; or
        'dlr', logits[target] - logits[label] over the largest logit minus the mean of the third
        and the fourth (arXiv 2003.01690, equation 7). Needs four classes.

    Returns:
      float [B].

    Raises:
      UserError: as `attack_loss`.
    """
    check_loss(loss)
    logits = _checked_logits(logits, labels, fewest_classes(loss, targeted=True))
    if loss == 'cross_entropy':
        return at_label(jax.nn.log_softmax(logits), targets)
    if loss == 'margin':
        return at_label(logits, targets) - _best_other(logits, targets)
    ordered = jnp.sort(logits, axis=-1)
    scale = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + _SMALLEST_DISTANCE
    return (at_label(logits, targets) - at_label(logits, labels)) / scale


def nth_wrong_class(logits: jax.Array, labels: jax.Array, n: int | jax.Array) -> jax.Array:
    """The wrong class with the n-th largest logit (n = 0: the largest), int32 [B]; n below K - 1."""
    order = jnp.argsort(-jnp.where(_is_label(logits, labels), -jnp.inf, logits), axis=-1)
    return order[:, n].astype(jnp.int32)


def value_and_gradient(
    logits_fn: LogitsFn, images: jax.Array, loss_fn: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss [B], logits [B, K], gradient of the summed loss with respect to the images).

    A sum, not a mean: an example's gradient then does not depend on the rest of the batch, and small gradients do not
    underflow in a large batch.

    Args:
      logits_fn, images: see `attacks.pgd`.
      loss_fn: logits -> loss [B].
    """

    def total(pixels):
        logits = logits_fn(pixels)
        loss = loss_fn(logits)
        return loss.sum(), (loss, logits)

    gradient, (loss, logits) = jax.grad(total, has_aux=True)(images)
    return loss, logits, gradient


def at_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[i, labels[i]], [B]."""
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _is_label(logits, labels):
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)


def _best_other(logits, labels):
    return jnp.max(jnp.where(_is_label(logits, labels), -jnp.inf, logits), axis=-1)


def _checked_logits(logits, labels, classes):
    if logits.ndim != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < classes:
        raise UserError(f'logits.shape={logits.shape}: expected [{labels.shape[0]}, K] with K at least {classes}')
    return wide(logits)
