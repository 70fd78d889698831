"""The standard suite of robustness measurements of one net, each stored as soon as it ends.

An interrupted evaluation resumes where it stopped and ends with the same figures: finished parts
are kept in a folder that is named by everything that could change them.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from convnorm_jax import attacks
from convnorm_jax.attacks.simba import BASES, simba_active, simba_advance, simba_result, simba_start
from convnorm_jax.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, mean_corruption_accuracy
from convnorm_jax.errors import UserError
from convnorm_jax.evaluation.classifier import AttackSettings, Evaluator
from convnorm_jax.evaluation.lipschitz import lipschitz_lower_bound
from convnorm_jax.evaluation.operators import layer_operators, product_bound
from convnorm_jax.files import write_atomically, written
from convnorm_jax.mesh import batch_sharded, is_leader, leader_says, replicate

SUITES = ('', 'standard')
PARTS = ('autoattack', 'curve', 'simba', 'corruptions', 'operators')

_LIPSCHITZ_EXAMPLES = 256  # that secants are sought from
_SIMBA_CHUNK = 25  # queries in one program; the last program stops at the budget


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
      evaluator: of the net.
      variables: of the net.
      images: uint8 [N, H, W, C], NumPy.
      labels: int [N].
      seed: of all random numbers.
      folder: of the results, see `open_folder`.
      log: called with a line of text.
    """

    evaluator: Evaluator
    variables: Any
    images: np.ndarray
    labels: np.ndarray
    seed: int
    folder: str
    log: Callable[[str], None]

    @property
    def pixels(self) -> np.ndarray:
        """float32 [N, H, W, C] in [0, 1]."""
        return self.images.astype(np.float32) / 255

    @property
    def split(self) -> dict[str, jax.Array]:
        """Images and labels on the device, as the evaluator expects them."""
        split: dict[str, jax.Array] = replicate(self.evaluator.mesh, {'images': self.images, 'labels': self.labels})
        return split

    @property
    def logits_fn(self) -> Callable[[jax.Array], jax.Array]:
        """Pixels -> logits, a `jax.tree_util.Partial` that holds the variables."""
        return jax.tree_util.Partial(self.evaluator.logits_fn, self.variables)

    def stored(self, name: str, measure: Callable[[], Any]) -> Any:
        """Returns the JSON data of `measure()`; reads it from the folder if it was measured before.

        Raises:
          ValueError: the processes of a run do not share the folder.
        """
        path = os.path.join(self.folder, f'{name}.json')
        found = self._kept(path)
        if leader_says(found is not None):
            if found is None:
                raise UserError(f'{path}: cannot be read by this process; all processes must share the run folder')
            return found
        found = measure()
        if is_leader():
            write_atomically(path, lambda file: file.write(json.dumps(found).encode()))
        return found

    def _kept(self, path: str) -> Any:
        """The JSON data of a file; None if there is none, or if it is damaged, which is logged."""
        try:
            with open(path) as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.log(f'{path} is damaged ({error}); it is measured again')
            return None


def open_folder(parent: str, variables: Any, settings: Any) -> str:
    """Makes the folder of the results for these variables and settings, and returns its path.

    Args:
      parent: e.g. the run's folder/evaluation.
      variables: of the net; their bytes are part of the name.
      settings: JSON data, everything else that determines the results.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode())
    for leaf in jax.tree.leaves(variables):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    folder = os.path.join(parent, digest.hexdigest()[:16])
    with written(folder):
        os.makedirs(folder, exist_ok=True)
    return folder


def run_autoattack(subject: Subject, *, epsilon: float, norm: str, **options: Any) -> attacks.EnsembleResult:
    """Runs `attacks.run_ensemble` on all devices, with its state in the subject's folder.

    Args:
      subject: what is measured.
      epsilon: radius, in units of pixels in [0, 1].
      norm: see `attacks.run_ensemble`.
      **options: see `attacks.run_ensemble`.

    Returns:
      The result of the ensemble.
    """
    evaluator = subject.evaluator
    return attacks.run_ensemble(
        subject.logits_fn,
        subject.pixels,
        subject.labels,
        epsilon=epsilon,
        norm=norm,
        rng=jax.random.key(subject.seed),
        batch_size=evaluator.batch_size,
        sharding=batch_sharded(evaluator.mesh),
        state_path=os.path.join(subject.folder, 'autoattack.npz'),
        log=subject.log,
        **options,
    )


def run_curve(subject: Subject, attack: AttackSettings, factors: Sequence[float]) -> list[list[float]]:
    """Measures accuracy at several radii, with the attack's step in proportion.

    Args:
      subject: what is measured.
      attack: the attack and its settings.
      factors: of the attack's radius; 0 measures clean accuracy.

    Returns:
      List of [epsilon, accuracy], epsilon in units of pixels in [0, 1].
    """
    rows = []
    for factor in factors:
        scaled = dataclasses.replace(attack, epsilon=factor * attack.epsilon, step_size=factor * attack.step_size)

        def measure(scaled: AttackSettings = scaled) -> Any:
            if not scaled.epsilon:
                return subject.evaluator.evaluate(subject.variables, subject.split)
            return subject.evaluator.robust_accuracy(subject.variables, subject.split, scaled, seed=subject.seed)

        found = subject.stored(f'curve-{factor:g}', measure)
        subject.log(f'{attack.name} at epsilon {scaled.epsilon:.4g}: {found["accuracy"]:.2%}')
        rows.append([scaled.epsilon, found['accuracy']])
    return rows


def run_simba(subject: Subject, *, examples: int, queries: int, step_size: float) -> dict[str, dict[str, Any]]:
    """Runs SimBA in both bases on the first examples.

    Args:
      subject: what is measured.
      examples: number of examples.
      queries: budget of an example.
      step_size: see `attacks.simba`.

    Returns:
      {'pixel' | 'dct': {the figures of `simba_summary` (a mean of nothing is None), 'queries': [...],
      'success': [...], 'seconds'}}.
    """
    found = {}
    for basis in BASES:
        found[basis] = subject.stored(
            f'simba-{basis}', functools.partial(_simba, subject, basis, examples, queries, step_size)
        )
        fooled, average = sum(found[basis]['success']), found[basis]['average_queries_success']
        after = '' if average is None else f', on average after {average:.0f} queries'
        subject.log(f'simba-{basis}: fooled {fooled} of {found[basis]["examples"]}{after}')
    return found


def _simba(subject: Subject, basis: str, examples: int, queries: int, step_size: float) -> dict[str, Any]:
    pixels, labels = jnp.asarray(subject.pixels[:examples]), jnp.asarray(subject.labels[:examples])
    start = jax.jit(functools.partial(simba_start, basis=basis))
    advance = jax.jit(
        functools.partial(simba_advance, basis=basis, step_size=step_size, queries=queries, count=_SIMBA_CHUNK)
    )
    began = time.perf_counter()
    state = start(subject.logits_fn, pixels, labels, rng=jax.random.key(subject.seed))
    for _ in range(-(-queries // _SIMBA_CHUNK)):
        if not bool(simba_active(state, queries).any()):
            break
        state = advance(subject.logits_fn, pixels, labels, state)
    result = simba_result(pixels, state)
    # JSON has no nan: the mean of nothing becomes null.
    summary = {name: value if math.isfinite(value) else None for name, value in attacks.simba_summary(result).items()}
    misclassified = np.asarray(result.queries) == 0  # without an attack
    return {
        **summary,
        'queries': np.asarray(result.queries).tolist(),
        'success': (np.asarray(result.success) & ~misclassified).tolist(),
        'seconds': time.perf_counter() - began,
    }


def run_corruptions(subject: Subject) -> dict[str, Any]:
    """Measures accuracy under the fifteen common corruptions.

    Returns:
      {'table': {name: {severity: accuracy}}, 'corruptions': {name: mean}, 'mean': mean of these}.
    """
    mesh = subject.evaluator.mesh

    def measure(name: str) -> dict[str, float]:
        row = {}
        for severity in SEVERITIES:
            images = corrupt(subject.images, name, severity, subject.seed)
            split = replicate(mesh, {'images': images, 'labels': subject.labels})
            row[str(severity)] = subject.evaluator.evaluate(subject.variables, split)['accuracy']
        return row

    table = {}
    for name in CORRUPTIONS:
        row = subject.stored(f'corruption-{name}', functools.partial(measure, name))
        table[name] = {int(severity): accuracy for severity, accuracy in row.items()}
        subject.log(f'{name}: ' + ' '.join(f'{accuracy:.2%}' for accuracy in row.values()))
    return {'table': table, **mean_corruption_accuracy(table)}


def run_operators(subject: Subject, model: nn.Module) -> dict[str, Any]:
    """Measures the net's layers, and how steep its logits are.

    Args:
      subject: what is measured.
      model: the Linen net of `subject.variables`.

    Returns:
      {'layers': [{'name', 'conv_norm', 'layer_norm', 'condition'}], 'largest_conv_norm', 'median_condition',
      'product_bound', 'lipschitz_lower_bound', 'seconds'}. The condition number is that of the circular convolution
      with the effective kernel; norms, see `operators`. The lower bound is of the logits in l2 for pixels in [0, 1],
      the product bound for normalized images. None where something is not linear.
    """
    return subject.stored('operators', functools.partial(_operators, subject, model))


def _operators(subject: Subject, model: nn.Module) -> dict[str, Any]:
    began = time.perf_counter()
    operators = layer_operators(model, subject.variables, subject.images.shape[1:])
    convolutions = [o for o in operators if len(o.input_shape) > 1]
    layers = [
        {
            'name': o.name,
            'conv_norm': o.conv_norm,
            'layer_norm': o.layer_norm,
            'condition': float(o.conv_circular[0] / max(o.conv_circular[-1], np.finfo(np.float32).tiny)),
        }
        for o in convolutions
    ]
    search = jax.jit(functools.partial(lipschitz_lower_bound, subject.logits_fn))
    size, found = subject.evaluator.batch_size, []
    for start in range(0, min(_LIPSCHITZ_EXAMPLES, len(subject.labels)), size):
        pixels = subject.pixels[start : start + size]
        found.append(np.asarray(search(pixels, rng=jax.random.key(subject.seed))).max())
    return {
        'layers': layers,
        'largest_conv_norm': max(o.conv_norm for o in convolutions),
        'median_condition': float(np.median([layer['condition'] for layer in layers])),
        'product_bound': product_bound(model, operators),
        'lipschitz_lower_bound': float(max(found)),
        'seconds': time.perf_counter() - began,
    }
