"""The state of an ensemble's run, and its file."""

import dataclasses
import hashlib
import json
import os
import zipfile

import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.files import write_atomically


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
      images: float32 [N, H, W, C], adversarial where one was found. robust: bool [N].
      attacks: figures of the attacks that are done, see `ensemble.EnsembleResult`.
      warnings: from before the first attack.
      turn, chunk: rounds of the current attack that are done, and chunks of the current round.
      kept: leaves of the current round's state, of the examples still robust, or None at its start.
      attacked: examples that the current attack began with, or None before it.
      seconds: that the current attack has taken.
    """

    images: np.ndarray
    robust: np.ndarray
    attacks: list = dataclasses.field(default_factory=list)
    warnings: list = dataclasses.field(default_factory=list)
    turn: int = 0
    chunk: int = 0
    kept: list | None = None
    attacked: int | None = None
    seconds: float = 0.0

    def next_attack(self):
        """Back to the start, for the next attack."""
        self.turn, self.chunk, self.kept, self.attacked, self.seconds = 0, 0, None, None, 0.0


def save_progress(path, identity, progress):
    """Writes the state to a file, at once or not at all.

    Args:
      path: of the file, ending in .npz or not.
      identity: {name: number, text, list or array}, what a later run must share.
      progress: a `Progress`.
    """
    plain = {name: getattr(progress, name) for name in ('attacks', 'warnings', 'turn', 'chunk', 'attacked', 'seconds')}
    words = json.dumps({'identity': _plain(identity), 'progress': plain, 'kept': progress.kept is not None})
    arrays = {f'kept_{i}': np.asarray(leaf) for i, leaf in enumerate(progress.kept or ())}
    content = {'words': np.array(words), 'images': progress.images, 'robust': progress.robust, **arrays}
    write_atomically(path, lambda file: np.savez(file, **content))


def load_progress(path, identity):
    """The state in a file, or None if there is no such file.

    Raises:
      ValueError: the file is damaged, or of a run of another identity.
    """
    if not os.path.exists(path):
        return None
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        words = json.loads(str(arrays['words']))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{path}: not a readable state of an evaluation ({error}); delete it to start anew') from error
    given = _plain(identity)
    changed = [name for name in given if words['identity'].get(name) != given[name]]
    if changed:
        raise UserError(f'{path}: a state of other {", ".join(changed)}; delete it to start anew')
    kept = [arrays[f'kept_{i}'] for i in range(len(arrays) - 3)] if words['kept'] else None
    return Progress(arrays['images'], arrays['robust'], kept=kept, **words['progress'])


def _plain(identity):
    """Arrays as digests, so that JSON holds them."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        if isinstance(value, np.ndarray)
        else value
        for name, value in identity.items()
    }
