"""Decoded arrays kept as .npy files, so that a data set is decoded once per machine."""

import hashlib
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np

from convnorm_jax.files import write_atomically

# Part of the key: raise it when what is stored changes, and older files are simply never found.
_FORMAT = 1


def cache_root():
    """Folder of the cache: $CONVNORM_CACHE, else ~/.cache/convnorm_jax."""
    return Path(os.environ.get('CONVNORM_CACHE') or '~/.cache/convnorm_jax').expanduser()


def cache_folder(name, location, files):
    """Where the arrays decoded from `files` are kept.

    Args:
        name: the data set's name.
        location: folder or archive the files were found at.
        files: paths of the source files. Their names, sizes and modification times are part of the
            key, so that a replaced file is decoded anew.

    Returns:
        A path (which need not exist).
    """
    facts = []
    for path in sorted(Path(f) for f in files):
        stat = path.stat()
        facts.append([path.name, stat.st_size, stat.st_mtime_ns])
    text = json.dumps([_FORMAT, name, str(Path(location).resolve()), facts])
    return cache_root() / f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}'


def read_arrays(folder, names):
    """The arrays `names` of a cache folder, or None where they cannot be had.

    A file that is absent is no news (first use, or another process is still writing); one that cannot be
    read gives a warning. Neither is an error: the caller decodes the source again.
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


def warn_ignored(path, reason):
    """Warn that a cache file or folder is not used, and why."""
    reason = ' '.join(str(reason).split())
    warnings.warn(f'cache {path} is ignored ({reason}); the data set is decoded again', RuntimeWarning, stacklevel=3)


def write_arrays(folder, arrays):
    """Write a dict of arrays to a cache folder; a folder that cannot be written gives only a warning."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            write_atomically(folder / f'{name}.npy', lambda f, a=array: np.save(f, a, allow_pickle=False))
    except OSError as error:
        warnings.warn(
            f'cache {folder} cannot be written ({error}); the data set will be decoded at every '
            'start: set CONVNORM_CACHE to a writable folder',
            RuntimeWarning,
            stacklevel=2,
        )
