"""Writing files atomically, also by several processes; and which errors came from writing."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from convnorm_jax.errors import UserError


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls `write(file)` with a temporary binary file next to `path`, then renames it to `path`.

    A reader sees the old file or the whole new one. Every call has its own temporary file, so that several processes
    may write the same path: the last one wins.

    Args:
      path: of the file; its folder must exist.
      write: function of a file open for writing bytes.
    """
    path = Path(path)
    with _temporary(path, write) as temporary, written(path):
        os.replace(temporary, path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Within `with`, a temporary path next to `path`; renamed to `path` at the end, deleted after an error.

    For what writes a file by its name. Nothing is at `path` before the block has ended.
    """
    path = Path(path)
    with _temporary(path, lambda file: None) as temporary:
        yield temporary
        with written(path):
            os.replace(temporary, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file by `write_atomically`; in a run of several processes, only the leader writes."""
    from convnorm_jax.mesh import is_leader

    if is_leader():
        write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a JSON file as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + '\n')


def write_new(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
    """As `write_atomically`, but never replaces a file.

    Raises:
      FileExistsError: there is a file of that name; it is not changed.
    """
    path = Path(path)
    with _temporary(path, write) as temporary, written(path):
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            os.replace(temporary, path)


def read_whole(path: str | os.PathLike) -> bytes:
    """The content of a file; raises UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error


def check_place(path: str | os.PathLike, name: str) -> None:
    """Raises UserError unless a file can be written at `path`; for use before the work whose result goes there.

    Args:
      path: of a file, which may exist.
      name: of the argument that it was given as.
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
    """The path of a temporary file that holds what `write` wrote; deleted afterwards."""
    with written(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name[:200]}-')
    try:
        with written(path):
            with os.fdopen(handle, 'wb') as file:
                write(file)
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out others who share the folder
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[None]:
    """Marks errors of a block that writes a file or folder with its path; `unwritten` reads the mark."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, '_convnorm_path'):
            error._convnorm_path = str(path)  # type: ignore[attr-defined]  # an attribute of our own
        raise


def unwritten(error: BaseException | None) -> str | None:
    """The path that could not be written because of an error or its cause; None if it did not come from writing."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if hasattr(error, '_convnorm_path'):
            return error._convnorm_path
        error = error.__cause__ or error.__context__
    return None
