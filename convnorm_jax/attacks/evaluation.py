"""The robust accuracy of any net, by the attacks that papers report, with the checks that people get wrong."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.attacks import inputs, losses
from convnorm_jax.attacks.auto_attack.batches import Batches
from convnorm_jax.attacks.auto_attack.ensemble import STANDARD, EnsembleResult, run_ensemble
from convnorm_jax.attacks.gradient import fgsm, pgd
from convnorm_jax.attacks.nets import as_logits_fn

# Clean accuracy below this multiple of chance is a sign of a mistake.
_NEAR_CHANCE = 1.5
_FEWEST_TO_JUDGE = 20


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
      rows: (attack, accuracy in [0, 1], seconds) in the order they ran: 'clean', 'FGSM', 'PGD-20 x 5', 'AutoAttack'.
      robust_accuracy: the figure to report: the share that is classified correctly and broken by none of the attacks.
      interval: its 95 % interval (Wilson), for another sample of as many images.
      examples: number of images.
      epsilon, norm: the ball.
      images: float32 [N, H, W, C]: adversarial where one was found, else the clean image.
      robust: bool [N].
      ensemble: of AutoAttack alone, with its attacks in turn.
      warnings: sentences; where there is one, the figure is not to be trusted before it is understood.
    """

    rows: list[tuple[str, float, float]]
    robust_accuracy: float
    interval: tuple[float, float]
    examples: int
    epsilon: float
    norm: str
    images: np.ndarray
    robust: np.ndarray
    ensemble: EnsembleResult
    warnings: list[str]

    def __str__(self) -> str:
        radius = f'{255 * self.epsilon:g}/255' if self.norm == 'linf' else f'{self.epsilon:g}'
        low, high = (100 * end for end in self.interval)
        lines = [f'{name:<12} {100 * accuracy:6.2f} %  {seconds:7.1f} s' for name, accuracy, seconds in self.rows]
        return '\n'.join(
            [
                f'{self.examples} images, {self.norm} radius {radius}',
                *lines,
                f'robust accuracy {100 * self.robust_accuracy:.2f} % (95 % interval {low:.1f} to {high:.1f})',
                *(f'warning: {warning}' for warning in self.warnings),
            ]
        )


def evaluate(
    net: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float,
    norm: str = 'linf',
    rng: jax.Array | None = None,
    attacks: Sequence[str] = STANDARD,
    batch_size: int = 250,
    state_path: str | None = None,
    log: Callable[[str], None] = print,
    **options: Any,
) -> Evaluation:
    """Clean accuracy, FGSM (linf), PGD-20 with five starts and AutoAttack, and the one figure to report.

    An image counts as robust if it is classified correctly and none of the attacks breaks it.

    Args:
      net: see `nets.as_logits_fn`: a function of pixels, or a net of Linen, NNX or Equinox.
      images: float [N, H, W, C] in [0, 1]. labels: int [N].
      epsilon: radius of the ball, in pixel units of [0, 1] (8/255, not 8).
      norm: 'linf' or 'l2'.
      rng: one PRNG key; None for `jax.random.key(0)`.
      attacks: of AutoAttack, see `run_ensemble`.
      batch_size: examples at a time.
      state_path: see `run_ensemble`.
      log: takes a line of text.
      **options: of `run_ensemble`.

    Returns:
      `Evaluation`; printed, it is a table.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name; a net in training mode.
    """
    images, labels = inputs.checked_examples(images, labels, epsilon, norm, batch_size)
    logits_fn = as_logits_fn(net)
    rng = jax.random.key(0) if rng is None else inputs.typed_key(rng)
    batches = Batches(min(batch_size, len(labels)), options.get('sharding'))
    rows: list[tuple[str, float, float]] = []
    robust, found = np.ones(len(labels), bool), images.copy()
    for name, attack in _single(epsilon, norm):
        accuracy, seconds = _under(attack, logits_fn, (images, labels), rng, batches, robust, found)
        log(f'{name}: accuracy {accuracy:.2%} ({seconds:.1f} s)')
        rows.append((name, accuracy, seconds))
    ensemble = run_ensemble(
        logits_fn,
        images,
        labels,
        epsilon=epsilon,
        norm=norm,
        rng=rng,
        attacks=attacks,
        batch_size=batches.size,
        state_path=state_path,
        log=log,
        **options,
    )
    found = np.where((robust & ~ensemble.robust)[:, None, None, None], ensemble.images, found)
    robust &= ensemble.robust
    seconds = sum(attack['seconds'] for attack in ensemble.attacks)
    rows = [('clean', ensemble.clean_accuracy, 0.0), *rows, ('AutoAttack', ensemble.robust_accuracy, seconds)]
    interval = stats.binomtest(int(robust.sum()), len(robust)).proportion_ci(0.95, 'wilson')
    warnings = [*ensemble.warnings, *_warnings(rows, labels, _classes(logits_fn, images, batches))]
    return Evaluation(
        rows=rows,
        robust_accuracy=float(robust.mean()),
        interval=(float(interval.low), float(interval.high)),
        examples=len(labels),
        epsilon=float(epsilon),
        norm=norm,
        images=found,
        robust=robust,
        ensemble=ensemble,
        warnings=warnings,
    )


def _single(epsilon, norm):
    """[(name, (logits_fn, images, labels, keys) -> images)] of the attacks next to AutoAttack."""
    step = epsilon / 4
    attacks = [
        (
            'PGD-20 x 5',
            lambda f, x, y, keys: pgd(
                f, x, y, epsilon=epsilon, step_size=step, steps=20, restarts=5, norm=norm, rng=keys
            ),
        )
    ]
    if norm == 'linf':
        attacks.insert(0, ('FGSM', lambda f, x, y, keys: fgsm(f, x, y, epsilon=epsilon)))
    return attacks


def _under(attack, logits_fn, examples, rng, batches, robust, found):
    """(accuracy, seconds) under an attack; what it breaks is noted in `robust` and `found`."""
    begun, (images, labels) = time.monotonic(), examples
    keys = inputs.example_keys(rng, len(labels))

    @jax.jit
    def attacked(f, x, y, data):
        adversarial = jnp.clip(attack(f, x, y, jax.random.wrap_key_data(data, impl=jax.random.key_impl(rng))), 0, 1)
        return adversarial, losses.correct(f(adversarial), y)

    data, right = np.asarray(jax.random.key_data(keys)), 0
    for chosen, pack in batches.packs(np.arange(len(labels))):
        adversarial, correct = attacked(logits_fn, *map(batches.place, (images[pack], labels[pack], data[pack])))
        correct = mesh_lib.fetch(correct)[: len(chosen)]
        broken = chosen[~correct & robust[chosen]]
        found[broken] = mesh_lib.fetch(adversarial)[: len(chosen)][~correct & robust[chosen]]
        robust[broken] = False
        right += int(correct.sum())
    return right / len(labels), time.monotonic() - begun


def _classes(logits_fn, images, batches):
    return inputs.class_count(logits_fn, jax.ShapeDtypeStruct((batches.size, *images.shape[1:]), jnp.float32))


def _warnings(rows, labels, classes):
    """Of the examples and the order of the accuracies."""
    found, accuracy = [], dict((name, accuracy) for name, accuracy, _ in rows)
    if len(np.unique(labels)) == 1 and len(labels) > 1:
        found.append(f'all images are of class {labels[0]}: take a sample of the whole test set')
    if len(labels) >= _FEWEST_TO_JUDGE and accuracy['clean'] < _NEAR_CHANCE / classes:
        found.append(
            f'clean accuracy {accuracy["clean"]:.1%} is near chance ({1 / classes:.1%}): is the normalization of the '
            'training inside the net, are the channels and the labels in its order?'
        )
    if accuracy.get('FGSM', 1) < accuracy['PGD-20 x 5']:
        found.append('FGSM breaks more than PGD with restarts: the gradients are probably masked')
    if accuracy['PGD-20 x 5'] < accuracy['AutoAttack']:
        found.append('PGD breaks more than AutoAttack: run it with more steps or restarts')
    return found
