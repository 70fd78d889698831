"""One training at a time in a run's folder."""

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator

from convnorm_jax.errors import UserError
from convnorm_jax.mesh import any_process, is_leader

NAME = 'lock'
_TAKEN = (errno.EACCES, errno.EAGAIN)  # of flock, where another process holds the lock


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Within `with`, no other training can run in a folder, which is made if it is missing.

    The kernel releases the lock when the process ends, however it ends. A file system without locks gives a line of
    warning. Of several processes the leader holds it; collective.

    Raises:
      UserError: another run is training there, or the folder cannot be made.
    """
    file, problem = None, None
    if is_leader():
        try:
            os.makedirs(workdir, exist_ok=True)
            file = _take(workdir)
        except ValueError as error:
            problem = error
        except OSError as error:
            problem = UserError(f'--workdir={workdir}: cannot write there ({error.strerror}); give another folder')
            problem.__cause__ = error
    try:
        if any_process(problem is not None):
            raise problem or UserError(f'--workdir={workdir}: process 0 cannot train there; see its error')
        yield
    finally:
        if file is not None:
            file.close()


def _take(workdir):
    """The locked file, open; None where there are no locks."""
    file = open(os.path.join(workdir, NAME), 'ab+', buffering=0)  # noqa: SIM115, the lock lasts as long as the file is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            file.seek(0)
            holder = file.read().decode(errors='replace').strip() or 'of unknown number'
            file.close()
            raise UserError(
                f'--workdir={workdir}: another run (process {holder}) is training there; wait for it, '
                'or give another folder'
            ) from error
        file.close()
        print(f'warning: --workdir={workdir}: the file system has no locks ({error.strerror})', file=sys.stderr)
        return None
    now = datetime.datetime.now().astimezone()
    with contextlib.suppress(OSError):  # on a full disk the lock holds, without a name
        file.truncate(0)
        file.write(f'{os.getpid()} on {socket.gethostname()}, since {now:%Y-%m-%d %H:%M:%S %Z}'.encode())
    return file
