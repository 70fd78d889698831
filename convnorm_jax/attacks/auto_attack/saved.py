"""The state of an AutoAttack run, and its file.

In a run of several processes, process 0 reads and writes the file, which may be on its own disk, and broadcasts the
content to the others.
"""

import dataclasses
import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.files import check_place, write_atomically
from convnorm_jax.mesh import from_leader

_DAMAGED = (
    *(ValueError, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
# What differs for another net, or for this one on another device or version.
_OUTPUTS = ('predictions', 'logits', 'logits next to the images')


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
      images: float32 [N, H, W, C], adversarial where one was found. robust: bool [N].
      attacks: figures of the finished attacks, see `ensemble.EnsembleResult`.
      warnings: from before the first attack.
      turn, chunk: finished rounds of the current attack, and finished chunks of the current round.
      kept: leaves of the current round's state, of the examples that are still robust; None at its start.
      attacked: number of examples at the start of the current attack; None before it.
      seconds: taken by the current attack so far.
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

    def next_attack(self) -> None:
        """Resets the fields of the current attack, for the next one."""
        self.turn, self.chunk, self.kept, self.attacked, self.seconds = 0, 0, None, None, 0.0


def save_progress(path: str, identity: Mapping[str, Any], progress: Progress) -> None:
    """Writes the state to a file, atomically.

    Args:
      path: of the file, ending in .npz or not.
      identity: {name: number, text, list or array}, which a resumed run must share.
      progress: of the run.
    """
    plain = {name: getattr(progress, name) for name in ('attacks', 'warnings', 'turn', 'chunk', 'attacked', 'seconds')}
    words = json.dumps({'identity': _plain(identity), 'progress': plain, 'kept': progress.kept is not None})
    content: dict[str, Any] = {f'kept_{i}': np.asarray(leaf) for i, leaf in enumerate(progress.kept or ())}
    content |= {'words': np.array(words), 'images': progress.images, 'robust': progress.robust}
    write_atomically(path, lambda file: np.savez(file, **content))


def check_state_path(path: str) -> None:
    """Raises UserError, in all processes, unless process 0 can write a file there."""

    def check():
        check_place(path, 'state_path')
        return b''

    from_leader(check)


def load_progress(path: str, identity: Mapping[str, Any]) -> Progress | None:
    """The state in a file, or None if there is no such file.

    Args:
      path, identity: see `save_progress`.

    Raises:
      UserError: the file cannot be read, is damaged, or is of a run of another identity.
    """
    content = from_leader(lambda: _checked_file(path, identity))
    return _parsed(content)[0] if content else None


def _checked_file(path, identity):
    """The bytes of a file that holds a state of this identity; b'' if there is no file."""
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
        raise zipfile.BadZipFile('images and robust do not match')
    return Progress(images, robust, kept=kept, **words['progress']), dict(words['identity'])


def _plain(identity):
    """The identity with arrays replaced by digests, for JSON."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        if isinstance(value, np.ndarray)
        else value
        for name, value in identity.items()
    }
