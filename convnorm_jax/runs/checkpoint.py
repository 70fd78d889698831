"""Checkpoints by Orbax: atomic, asynchronous; the latest and the best are kept, damaged ones are detected."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from convnorm_jax.errors import UserError
from convnorm_jax.files import written
from convnorm_jax.mesh import any_process, is_leader, wait_for_all
from convnorm_jax.runs import digest as digest_lib

# Errors of this process, not of the checkpoint.
_OUR_TROUBLE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_OUR_TROUBLE_WORDS = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED')


class Damaged(UserError):
    """A checkpoint is not what was saved.

    Attributes:
      reason: in a few words.
    """

    def __init__(self, folder: str, reason: str) -> None:
        super().__init__(f'{folder}: the checkpoint cannot be read ({reason})')
        self.reason = reason


class OtherNet(UserError):
    """A checkpoint holds other arrays than those asked for."""


@dataclasses.dataclass
class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    keep: int
    best: Any  # steps -> the best of them, or None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """See Orbax: which of the checkpoints, oldest first, are kept."""
        del context
        best = self.best([c.step for c in checkpoints])
        first = len(checkpoints) - self.keep
        return [i >= first or c.step == best for i, c in enumerate(checkpoints)]


class Checkpointer:
    """Saves and restores what a run needs to continue: device arrays and host progress.

    Keeps the `keep` latest checkpoints and the one with the best rating. Each is saved with a digest of its arrays and
    of its progress, and is checked against them when it is restored. Every method is collective: of several processes,
    all must call it.
    """

    def __init__(self, workdir: str, keep: int = 2, read_only: bool = False) -> None:
        self.folder = os.path.abspath(os.path.join(workdir, 'checkpoints'))
        self.damaged_folder = os.path.abspath(os.path.join(workdir, 'damaged'))
        self._keep, self._read_only = keep, read_only
        self._ratings: dict[int, float | None] = {}  # of the steps that were asked for; None: unrated
        self._open()

    def _open(self):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(self._keep, self._best),
            read_only=self._read_only,
            create=not self._read_only,
            cleanup_tmp_directories=not self._read_only,
            lightweight_initialize=True,  # this class reads the ratings, which may be damaged
        )
        handlers = {'arrays': ocp.StandardCheckpointHandler(), 'progress': ocp.JsonCheckpointHandler()}
        with self._writing():
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def _writing(self):
        """Within `with`, Orbax writes, or raises what went wrong when it wrote in the background."""
        return contextlib.nullcontext() if self._read_only else written(self.folder)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the best rating; None if none was rated."""
        return self._best(self._manager.all_steps())

    def save(self, step: int, arrays: Any, progress: dict[str, Any], rating: float | None = None) -> None:
        """Saves in the background.

        Args:
          step: updates done.
          arrays: pytree of arrays; may be donated to the next step as soon as this returns.
          progress: what JSON can hold.
          rating: how good it is, for `best_step`; None for unrated.
        """
        stored = {
            'progress': progress,
            'rating': rating,
            'structure': digest_lib.structure(arrays),
            'digest': digest_lib.digest(arrays),
        }
        stored['crc'] = _crc(stored)
        self._ratings[step] = rating
        with self._writing():
            # force: the loop decides when to save, not Orbax.
            self._manager.save(
                step,
                force=True,
                args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(stored)),
            )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(arrays, progress) of a step.

        Args:
          step: of the checkpoint.
          like: pytree of arrays or ShapeDtypeStructs with shardings, the structure saved.

        Raises:
          Damaged: it is not what was saved.
          OtherNet: it holds other arrays, those of another net.
          UserError: this process cannot read it, which says nothing about the checkpoint.
        """
        stored = self._stored(step)
        expected = stored.get('structure')
        if expected not in (None, digest_lib.structure(like)):
            raise self._of_another_net(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        try:
            arrays = self._manager.restore(step, args=items)['arrays']
        except Exception as error:  # Orbax raises many kinds for a damaged folder
            if expected is None and self._differs(step, like):
                raise self._of_another_net(step) from error
            raise self._trouble(step, error) from error
        if 'digest' in stored and digest_lib.digest(arrays) != stored['digest']:
            raise Damaged(f'{self.folder}/{step}', 'its arrays are not those that were saved')
        return arrays, stored['progress']

    def resume(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, arrays, progress) of the newest intact checkpoint; None before the first.

        Damaged ones are moved to `damaged_folder`, and a line says so.

        Raises:
          UserError: all are damaged, or see `restore`.
        """
        found: Any = None
        damaged: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            # Older ones are validated too: retention would otherwise treat a damaged one as unrated, and delete it.
            read = self._stored if found else lambda step: (step, *self.restore(step, like))
            value, reason = _attempt(read, step)
            if reason:
                damaged[step] = reason
            elif not found:
                found = value
        if damaged:
            self._put_aside(damaged, f'resuming from step {found[0]}' if found else 'none is left')
        if damaged and not found:
            raise UserError(
                f'{self.folder}: all checkpoints were damaged, and are kept in {self.damaged_folder}; put a good copy '
                'of one there, or rerun the same command to start from step 0'
            )
        return found

    def restore_one(self, which: str, like: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """(arrays, progress) of the best or latest intact checkpoint, and the newest progress.

        Nothing is moved; a line says which is damaged.

        Args:
          which: 'best', by the rating (the latest if none was rated), or 'latest'.
          like: see `restore`.

        Raises:
          UserError: there is none, all are damaged, or see `restore`.
        """
        best = self._best if which == 'best' else lambda steps: None
        _, found = self._first_whole(lambda step: self.restore(step, like), best)
        _, stored = self._first_whole(self._stored, lambda steps: None, quiet=True)
        return *found, stored['progress']

    def _first_whole(self, read, choose, quiet=False):
        """(step, what `read` returns) of the chosen step if it can be read, else of the latest that can."""
        tried: set[int] = set()
        damaged: dict[int, str] = {}
        while left := [s for s in self._steps() if s not in tried]:  # listed again: training may be running
            chosen = choose(left)
            step = max(left) if chosen is None else chosen
            tried.add(step)
            value, reason = _attempt(read, step)
            if not reason:
                for bad, why in damaged.items():
                    if not quiet:
                        _say(f'checkpoint of step {bad} is damaged ({why}); using that of step {step} instead')
                return step, value
            if os.path.isdir(f'{self.folder}/{step}'):
                damaged[step] = reason
        if not damaged:
            raise UserError(f'{self.folder}: no checkpoint there yet; train first')
        step, reason = next(iter(damaged.items()))
        raise UserError(
            f'{self.folder}: the checkpoint cannot be read: all of them are damaged (step {step}: {reason}); '
            'put a good copy of one there, or train again'
        )

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written."""
        self.wait()
        with self._writing():
            self._manager.close()

    def _steps(self):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return [int(name) for name in os.listdir(self.folder) if name.isdigit()]
        return []

    def _best(self, steps):
        """The step with the best rating, the first of equal ones; None if none is rated."""
        rated = [(self._rating(step), -step) for step in steps if self._rating(step) is not None]
        return -max(rated)[1] if rated else None

    def _rating(self, step):
        if step not in self._ratings:
            try:
                self._ratings[step] = self._stored(step)['rating']
            except ValueError:
                return None
        return self._ratings[step]

    def _stored(self, step):
        """What is saved next to the arrays, checked; 'progress' and 'rating' at least."""
        try:
            stored = self._json(step, 'progress', 'metadata')
            if not {'progress', 'rating', 'structure', 'digest', 'crc'} & set(stored):
                return self._stored_formerly(step, stored)
            if stored.pop('crc') != _crc(stored):
                raise ValueError('it is not what was saved')
        except Exception as error:
            raise self._trouble(step, error, 'its progress: ') from error
        return stored

    def _stored_formerly(self, step, progress):
        """Of a checkpoint without digests: the rating was in a file of its own."""
        try:
            rating = float(self._json(step, 'metrics', 'metrics')['rating'])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            rating = None
        return {'progress': progress, 'rating': rating}

    def _json(self, step, item, name):
        handler = ocp.JsonCheckpointHandler(filename=name)
        return dict(handler.restore(epath.Path(self.folder) / str(step) / item))

    def _trouble(self, step, error, what=''):
        """What to raise for an error while reading: `Damaged`, unless it is not the checkpoint's fault."""
        reason = what + f'{type(error).__name__}: {error}'.strip().split('\n')[0][:200]
        if isinstance(error, jax.errors.JaxRuntimeError):  # the device, or another process
            return error
        ours = isinstance(error, MemoryError) or getattr(error, 'errno', None) in _OUR_TROUBLE
        if ours or any(word in reason for word in _OUR_TROUBLE_WORDS):
            return UserError(f'{self.folder}/{step}: the checkpoint cannot be read ({reason})')
        return Damaged(f'{self.folder}/{step}', reason)

    def _of_another_net(self, step):
        return OtherNet(
            f'{self.folder}/{step}: the checkpoint is of another net or optimizer (its arrays differ from those of '
            'this config in name, shape or dtype); give the config and the version it was trained with, '
            'or another --workdir'
        )

    def _differs(self, step, like):
        """Whether Orbax's own record of the arrays, if it can be read, is of other arrays."""
        shapes = lambda tree: {name: tuple(leaf.shape) for name, leaf in digest_lib.named_leaves(tree)}
        with contextlib.suppress(Exception):
            return shapes(self._manager.item_metadata(step)['arrays']) != shapes(like)
        return False

    def _put_aside(self, damaged, outlook):
        """Moves steps into the folder of damaged ones."""
        self._manager.close()
        for step, reason in damaged.items():
            if is_leader():
                names = itertools.chain([f'{step}'], (f'{step}-{n}' for n in itertools.count(1)))
                place = next(p for p in (os.path.join(self.damaged_folder, n) for n in names) if not os.path.exists(p))
                with written(self.damaged_folder):
                    os.makedirs(self.damaged_folder, exist_ok=True)
                    os.replace(f'{self.folder}/{step}', place)
                _say(f'checkpoint of step {step} is damaged ({reason}); kept in {place}; {outlook}')
            self._ratings.pop(step, None)
        wait_for_all('damaged checkpoints are put aside')
        self._open()


def first_fitting(restore: Callable[[Any], Any], likes: Sequence[Any]) -> Any:
    """What `restore` returns for the first of several structures that fits the checkpoint.

    Args:
      restore: function of a `like`, see `Checkpointer.restore`.
      likes: structures, the current one first.

    Raises:
      OtherNet: none fits. Others: as `restore`.
    """
    first, *others = likes
    try:
        return restore(first)
    except OtherNet:
        for like in others:
            with contextlib.suppress(OtherNet):
                return restore(like)
        raise


def _attempt(read, step):
    """(what `read` returns, '') or (None, why the checkpoint is damaged), the same in all processes."""
    try:
        value, reason = read(step), ''
    except Damaged as damage:
        value, reason = None, damage.reason
    if any_process(bool(reason)):
        return None, reason or 'another process cannot read it'
    return value, ''


def _say(line):
    if is_leader():
        print(line, file=sys.stderr, flush=True)


def _crc(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
