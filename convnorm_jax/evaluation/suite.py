"""The standard suite of robustness measurements of one net, part by part, each stored as it ends.

An evaluation that was interrupted goes on where it stopped and ends with the same figures: what is
done lies in a folder named after everything that could change it.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax import attacks
from convnorm_jax.attacks.simba import BASES, simba_active, simba_advance, simba_result, simba_start
from convnorm_jax.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, mean_corruption_accuracy
from convnorm_jax.errors import UserError
from convnorm_jax.evaluation.classifier import AttackSettings, Evaluator
from convnorm_jax.files import write_atomically, written
from convnorm_jax.mesh import batch_sharded, is_leader, leader_says, replicate

SUITES = ('', 'standard')
PARTS = ('autoattack', 'curve', 'simba', 'corruptions')

_SIMBA_CHUNK = 25  # queries in one program; those of the last beyond the budget are not made


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
      evaluator, variables: of the net.
      images: uint8 [N, H, W, C], NumPy. labels: int [N].
      seed: of everything random.
      folder: of the results, see `open_folder`.
      log: takes a line of text.
    """

    evaluator: Evaluator
    variables: Any
    images: np.ndarray
    labels: np.ndarray
    seed: int
    folder: str
    log: Callable[[str], None]

    @property
    def pixels(self):
        """float32 [N, H, W, C] in [0, 1]."""
        return self.images.astype(np.float32) / 255

    @property
    def split(self):
        """The same on the device, as the evaluator wants it."""
        return replicate(self.evaluator.mesh, {'images': self.images, 'labels': self.labels})

    @property
    def logits_fn(self):
        """Pixels -> logits, a `jax.tree_util.Partial` that holds the variables."""
        return jax.tree_util.Partial(self.evaluator.logits_fn, self.variables)

    def stored(self, name, measure):
        """What `measure()` returns, JSON data; from the folder if it has been measured before."""
        path = os.path.join(self.folder, f'{name}.json')
        found = self._kept(path)
        if leader_says(found is not None):
            if found is None:
                raise UserError(f'{path}: cannot be read by this process; the run folder must be one that all share')
            return found
        found = measure()
        if is_leader():
            write_atomically(path, lambda file: file.write(json.dumps(found).encode()))
        return found

    def _kept(self, path):
        """What a file of JSON data holds; None if there is none, or a damaged one, which is said."""
        try:
            with open(path) as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.log(f'{path} is damaged ({error}); it is measured again')
            return None


def open_folder(parent, variables, settings):
    """Makes the folder of the results of these variables and settings, and returns its path.

    Args:
      parent: e.g. the run's folder/evaluation.
      variables: of the net; their bytes are part of the name.
      settings: JSON data, all else that decides the results.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode())
    for leaf in jax.tree.leaves(variables):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    folder = os.path.join(parent, digest.hexdigest()[:16])
    with written(folder):
        os.makedirs(folder, exist_ok=True)
    return folder


def run_autoattack(subject, *, epsilon, norm, **options):
    """`attacks.run_ensemble` on the subject, over all devices, its state in the subject's folder.

    Returns:
      `attacks.EnsembleResult`.
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


def run_curve(subject, attack: AttackSettings, factors):
    """Accuracy at several radii, the attack's step in proportion.

    Returns:
      List of [epsilon, accuracy], epsilon in units of pixels in [0, 1].
    """
    rows = []
    for factor in factors:
        scaled = dataclasses.replace(attack, epsilon=factor * attack.epsilon, step_size=factor * attack.step_size)

        def measure(scaled=scaled):
            if not scaled.epsilon:
                return subject.evaluator.evaluate(subject.variables, subject.split)
            return subject.evaluator.robust_accuracy(subject.variables, subject.split, scaled, seed=subject.seed)

        found = subject.stored(f'curve-{factor:g}', measure)
        subject.log(f'{attack.name} at epsilon {scaled.epsilon:.4g}: {found["accuracy"]:.2%}')
        rows.append([scaled.epsilon, found['accuracy']])
    return rows


def run_simba(subject, *, examples, queries, step_size):
    """SimBA in both bases on the first examples: figures, and each example's queries and success.

    Returns:
      {'pixel' | 'dct': {`simba_summary`'s figures (a mean of nothing is None), 'queries': [...],
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


def _simba(subject, basis, examples, queries, step_size):
    pixels, labels = jnp.asarray(subject.pixels[:examples]), jnp.asarray(subject.labels[:examples])
    start = jax.jit(functools.partial(simba_start, basis=basis))
    options = {'basis': basis, 'step_size': step_size, 'queries': queries, 'count': _SIMBA_CHUNK}
    advance = jax.jit(functools.partial(simba_advance, **options))
    begun = time.perf_counter()
    state = start(subject.logits_fn, pixels, labels, rng=jax.random.key(subject.seed))
    for _ in range(-(-queries // _SIMBA_CHUNK)):
        if not bool(simba_active(state, queries).any()):
            break
        state = advance(subject.logits_fn, pixels, labels, state)
    result = simba_result(pixels, state)
    # JSON has no nan: the mean of nothing is null there.
    summary = {name: value if math.isfinite(value) else None for name, value in attacks.simba_summary(result).items()}
    wrong_from_the_start = np.asarray(result.queries) == 0
    return {
        **summary,
        'queries': np.asarray(result.queries).tolist(),
        'success': (np.asarray(result.success) & ~wrong_from_the_start).tolist(),
        'seconds': time.perf_counter() - begun,
    }


def run_corruptions(subject):
    """Accuracy under the fifteen common corruptions.

    Returns:
      {'table': {name: {severity: accuracy}}, 'corruptions': {name: mean}, 'mean': mean of these}.
    """
    mesh = subject.evaluator.mesh

    def measure(name):
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
