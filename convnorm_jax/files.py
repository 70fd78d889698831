"""Writing files: whole or not at all, whoever else writes them; and which errors came from writing."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from convnorm_jax.errors import UserError


def write_atomically(path, write):
    """Calls `write(file)` with a temporary binary file next to `path`, then renames it to `path`.

    A reader sees the old file or the whole new one. The temporary file has a name of its own, so that several
    processes may write the same path: the last one wins.

    Args:
      path: of the file; its folder must exist.
      write: function of a file open for writing bytes.
    """
    path = Path(path)
    with written(path), _temporary(path, write) as temporary:
        os.replace(temporary, path)


def write_text(path, text):
    """Writes a text file by `write_atomically`; of many processes of a run, one writes."""
    from convnorm_jax.mesh import is_leader

    if is_leader():
        write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, content):
    """Writes a JSON file as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + '\n')


def write_new(path, write):
    """As `write_atomically`, but never over a file that is there.

    Raises:
      FileExistsError: there is a file of that name, which stays as it is.
    """
    path = Path(path)
    with written(path), _temporary(path, write) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            os.replace(temporary, path)


def read_whole(path) -> bytes:
    """The content of a file; raises UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error


def check_place(path, name):
    """Raises UserError unless a file can be written at `path`: before the work whose result goes there.

    Args:
      path: of a file, there or not.
      name: of the argument that gives it.
    """
    path = Path(path)
    problem = 'it is a folder' if path.is_dir() else None
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        problem = f'{error.strerror}: {path.parent}'
    if problem:
        raise UserError(
            f'{name}={str(path)!r}: cannot be written ({problem}); expected a file in a folder that is there'
        )


@contextlib.contextmanager
def _temporary(path, write):
    """The path of a temporary file that holds what `write` wrote; gone afterwards."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name[:200]}-')
    try:
        with os.fdopen(handle, 'wb') as file:
            write(file)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out others who share the folder
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def written(path):
    """Within `with`, a file or folder is written: an error keeps its path, see `unwritten`."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, '_convnorm_path'):
            error._convnorm_path = str(path)
        raise


def unwritten(error):
    """The path that an error, or one that caused it, kept from being written; None if it did not come from writing."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if hasattr(error, '_convnorm_path'):
            return error._convnorm_path
        error = error.__cause__ or error.__context__
    return None
