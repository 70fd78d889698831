"""Errors of a folder that cannot be written: a full disk, no permission."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator

from convnorm_jax.errors import UserError
from convnorm_jax.files import unwritten, written

_REASONS = {
    errno.ENOSPC: 'no space left on the device',
    errno.EDQUOT: 'no space left on the device (the quota is used up)',
    errno.EACCES: 'no permission to write there',
    errno.EPERM: 'no permission to write there',
    errno.EROFS: 'the file system is read-only',
}
# Orbax's background writers pass on only the text of an error.
_REASONS_BY_TEXT = {os.strerror(number): reason for number, reason in _REASONS.items() if number != errno.EPERM}
_FULL = (_REASONS[errno.ENOSPC], _REASONS[errno.EDQUOT])


class DiskTrouble(UserError):
    """A folder cannot be written."""


def reason(error: BaseException | None) -> str | None:
    """Why writing failed, in a few words; None if the error did not come from writing, or has another reason.

    Looks at the causes of the error too. Reading fails for the same reasons (an image without permission, a full
    /dev/shm), so only errors that passed `files.written` count.
    """
    if unwritten(error) is None:
        return None
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _REASONS:
            return _REASONS[error.errno]
        found = [why for text, why in _REASONS_BY_TEXT.items() if text in str(error)]
        if found:
            return found[0]
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def explained(workdir: str) -> Iterator[None]:
    """Within `with`, an error because a run's folder cannot be written becomes a `DiskTrouble` that says what to do.

    Raises:
      DiskTrouble: see above; other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why, path = reason(error), unwritten(error)
        if why is None or path is None:
            raise
        place = os.path.abspath(path)
        inside = os.path.commonpath([place, os.path.abspath(workdir)]) == os.path.abspath(workdir)
        advice = 'free some space' if why in _FULL else 'make it writable'
        raise DiskTrouble(
            f'{f"--workdir={workdir}" if inside else place}: {why}; {_last_good(workdir)}; {advice} and rerun the same '
            'command'
        ) from error


def check_writable(workdir: str) -> None:
    """Raises DiskTrouble unless a file can be made in a folder; for use before hours of work whose results go there."""
    with explained(workdir), written(workdir), tempfile.TemporaryFile(dir=workdir):
        pass


def _last_good(workdir):
    try:
        steps = [int(name) for name in os.listdir(os.path.join(workdir, 'checkpoints')) if name.isdigit()]
    except OSError:
        steps = []
    return f'the last good checkpoint is of step {max(steps)}' if steps else 'there is no checkpoint yet'
