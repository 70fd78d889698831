"""Signs that an evaluation by attacks cannot be trusted: AutoAttack's checks.

Croce and Hein 2020 (arXiv 2003.01690) and the checks of their code.
"""

from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.attacks import losses, projections
from convnorm_jax.attacks.inputs import Array, LogitsFn

# Allowed relative difference of the outputs of one example between two passes (AutoAttack's value).
_REPEATABLE = 1e-4
_REPEATS = 5
_PROBABILITY = 1e-5
_VANISHING = 1e-7
# The share of the examples by which black-box attacks may be better than white-box attacks.
_BLACK_BOX_LEAD = 0.002


def check_outputs(predict: Callable[[Array], jax.Array], images: np.ndarray) -> list[str]:
    """Warnings about the outputs of one batch: not finite, random, dependent on one another, or probabilities.

    Args:
      predict: images -> logits [B, K], jitted or not.
      images: [B, H, W, C].
    """
    outputs = [mesh_lib.fetch(predict(images)).astype(np.float64) for _ in range(_REPEATS)]
    if not np.isfinite(outputs).all():
        return ['the outputs are not all finite: no attack can follow them']
    warnings = []
    if max(_difference(outputs[0], other) for other in outputs[1:]) > _REPEATABLE:
        warnings.append('the output is random: attacks that do not average over it are too weak')
    elif len(images) > 1 and _difference(outputs[0], _next_to_others(predict, images)) > _REPEATABLE:
        warnings.append('an output depends on the rest of its batch: evaluate with fixed statistics')
    if _are_probabilities(outputs[0]):
        warnings.append('the outputs look like probabilities: give the logits, or gradients vanish')
    return warnings


def check_gradients(logits_fn: LogitsFn, images: jax.Array, labels: jax.Array) -> str | None:
    """A warning if the gradient of the cross-entropy vanishes at some images of one batch.

    It vanishes if it is tiny relative to the gradient of the margin: when a probability rounds to
    one in float32, only rounding errors are left. AutoAttack looks for exact zeros, which XLA's
    fused softmax does not return.
    """

    def lengths(loss):
        gradient = losses.value_and_gradient(logits_fn, images, lambda z: losses.attack_loss(z, labels, loss))[2]
        return projections.norm_of(gradient, 'linf')

    vanishing = int((lengths('cross_entropy') <= _VANISHING * lengths('margin')).sum())
    if not vanishing:
        return None
    return (
        f'the gradient of the cross-entropy vanishes at {vanishing} of {len(labels)} images: attacks along it '
        'cannot work there (a masked gradient?); look at what apgd-dlr and square find'
    )


def check_black_box(
    accuracies: Mapping[str, float], white_box: Collection[str], black_box: Collection[str]
) -> str | None:
    """A warning if attacks without gradients broke examples that those with gradients did not.

    Args:
      accuracies: {attack: robust accuracy after it}, in the order they ran.
      white_box, black_box: names of attacks.
    """
    before = [accuracies[name] for name in accuracies if name in white_box]
    after = [accuracies[name] for name in accuracies if name in black_box]
    if not before or not after or min(before) - min(after) <= _BLACK_BOX_LEAD:
        return None
    return (
        f'attacks without gradients lowered the robust accuracy by {min(before) - min(after):.2%} further: the '
        'gradients are probably masked, and the true robustness is even lower; give Square more queries or write '
        'an attack for this defense'
    )


def check_found(accuracy: float, again: float, rounded: float | None, examples: int) -> list[str]:
    """Warnings if the images that were found are classified otherwise in other batches, or as 8-bit images.

    Args:
      accuracy: robust accuracy as the attacks counted it; again, rounded: see `EnsembleResult`.
      examples: number of images.
    """
    warnings = []
    if again != accuracy:
        warnings.append(
            f'evaluated again in other batches, {abs(round((again - accuracy) * examples))} of {examples} images are '
            f'classified otherwise (accuracy {again:.2%}, not {accuracy:.2%}): the outputs depend on the batch, or are '
            'at the edge of rounding'
        )
    if rounded is not None and rounded != accuracy:
        warnings.append(
            f'rounded to 8 bits, the images that were found have an accuracy of {rounded:.2%}, not {accuracy:.2%}: as '
            'files of images some are not adversarial'
        )
    return warnings


def _next_to_others(predict, images):
    """The outputs of a batch whose second half is replaced by its first, and vice versa."""
    half = len(images) // 2
    left = predict(jnp.concatenate([images[:half], images[: len(images) - half]]))
    right = predict(jnp.concatenate([images[len(images) - half :][::-1][:half], images[half:]]))
    return np.concatenate([np.asarray(left, np.float64)[:half], np.asarray(right, np.float64)[half:]])


def _difference(a, b):
    """The largest distance between two outputs of one example, each divided by its norm."""
    a, b = (x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-10) for x in (a, b))
    return np.linalg.norm(a - b, axis=1).max()


def _are_probabilities(outputs):
    return (
        outputs.min() > -_PROBABILITY
        and outputs.max() < 1 + _PROBABILITY
        and np.abs(outputs.sum(axis=1) - 1).max() < _PROBABILITY
    )
