"""The state of an ensemble's run, and its file.

In a run of several processes the first one reads and writes the file, and tells the others what it found: the file may
lie on a disk of its own.
"""

import dataclasses
import hashlib
import io
import json
import struct
import zipfile
import zlib

import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.files import check_place, write_atomically
from convnorm_jax.mesh import from_leader

_DAMAGED = (
    *(ValueError, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
# What another net, or this one computed otherwise, changes.
_OUTPUTS = ('predictions', 'logits', 'logits next to the images')


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
    content = {f'kept_{i}': np.asarray(leaf) for i, leaf in enumerate(progress.kept or ())}
    content |= {'words': np.array(words), 'images': progress.images, 'robust': progress.robust}
    write_atomically(path, lambda file: np.savez(file, **content))


def check_place_of_state(path):
    """Raises UserError, in all processes, unless the first one can write a file there."""
    from_leader(lambda: check_place(path, 'state_path') or b'')


def load_progress(path, identity):
    """The state in a file, or None if there is no such file.

    Raises:
      UserError: the file cannot be read, is damaged, or is of a run of another identity.
    """
    content = from_leader(lambda: _checked_file(path, identity))
    return _parsed(content)[0] if content else None


def _checked_file(path, identity):
    """The bytes of a file that holds a state of this identity; none if it is not there."""
    try:
        with open(path, 'rb') as file:
            content = file.read()
    except FileNotFoundError:
        return b''
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); expected a state of an evaluation') from error
    try:
        _, found = _parsed(content)
    except _DAMAGED as error:
        raise UserError(
            f'{path}: not a readable state of an evaluation (damaged?); delete it to start again'
        ) from error
    given = _plain(identity)
    changed = [name for name in given if found.get(name) != given[name]]
    if not changed:
        return content
    if set(changed) <= set(_OUTPUTS):
        raise UserError(
            f'{path}: a state of another net (other {", ".join(changed)}), or of this one on another device or version '
            'of jax; delete it to start again'
        )
    raise UserError(f'{path}: a state of other {", ".join(changed)}; delete it to start again')


def _parsed(content):
    """(Progress, plain identity) of the bytes of a file."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise zipfile.BadZipFile('not an npz file')
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    words = json.loads(str(arrays['words']))
    kept = [arrays[f'kept_{i}'] for i in range(len(arrays) - 3)] if words['kept'] else None
    images, robust = arrays['images'], arrays['robust']
    if robust.dtype != bool or robust.shape != images.shape[:1]:
        raise zipfile.BadZipFile('images and robust do not belong together')
    return Progress(images, robust, kept=kept, **words['progress']), dict(words['identity'])


def _plain(identity):
    """Arrays as digests, so that JSON holds them."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        if isinstance(value, np.ndarray)
        else value
        for name, value in identity.items()
    }
