"""Decoded arrays kept as .npy files, so that a data set is decoded once per machine."""

import functools
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from convnorm_jax.files import write_atomically

# Part of the key: raise it when the stored arrays change, so that older files are not found.
_FORMAT = 1


def cache_root() -> Path:
    """Folder of the cache: $CONVNORM_CACHE, else ~/.cache/convnorm_jax."""
    return Path(os.environ.get('CONVNORM_CACHE') or '~/.cache/convnorm_jax').expanduser()


def cache_folder(name: str, location: str | Path, files: Iterable[str | Path]) -> Path:
    """The folder where the arrays decoded from `files` are kept.

    Args:
        name: the data set's name.
        location: folder or archive where the files were found.
        files: paths of the source files. Their names, sizes and modification times are part of the key, so
            that a file that was replaced is decoded again.

    Returns:
        A path, which may not exist yet.
    """
    facts = []
    for path in sorted(Path(f) for f in files):
        stat = path.stat()
        facts.append([path.name, stat.st_size, stat.st_mtime_ns])
    text = json.dumps([_FORMAT, name, str(Path(location).resolve()), facts])
    return cache_root() / f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}'


def read_arrays(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Reads the arrays `names` of a cache folder; None if one is missing or cannot be read.

    A missing file is normal: this is the first use, or another process is still writing it. A file that
    cannot be read gives a warning. In both cases the caller decodes the source again.
    """
    arrays = {}
    for name in names:
        path = folder / f'{name}.npy'
        try:
            arrays[name] = np.load(path, allow_pickle=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            warn_ignored(path, error)
            return None
    return arrays


def warn_ignored(path: Path, reason: object) -> None:
    """Warns that a cache file or folder is not used, and why."""
    reason = ' '.join(str(reason).split())
    warnings.warn(f'cache {path} is ignored ({reason}); the data set is decoded again', RuntimeWarning, stacklevel=3)


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a cache folder; warns if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            write = functools.partial(np.save, arr=array, allow_pickle=False)
            write_atomically(folder / f'{name}.npy', write)
    except OSError as error:
        warnings.warn(
            f'cache {folder} cannot be written ({error}); the data set will be decoded at every '
            'start: set CONVNORM_CACHE to a writable folder',
            RuntimeWarning,
            stacklevel=2,
        )
