"""JAX's persistent compilation cache: a command loads the programs that an earlier one compiled."""

import contextlib
import glob
import os
import re
import sys
import tempfile
import warnings
from typing import Any

import jax

from convnorm_jax.data.cache import cache_root

MAX_BYTES = 2 << 30
_ENTRIES = '*-cache'  # JAX's names for them
_TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.DOTALL)


def keep_programs() -> None:
    """Turns JAX's persistent compilation cache on, in `xla` next to the cached data, unless the user has set it.

    A folder that cannot be used, a full disk or a damaged entry gives one line on stderr, and is no error.
    """
    # Before 0.10.2 XLA:CPU warns of each program that it loads on a CPU with AVX-512 that it might crash.
    options: Any = jax.config  # whose attributes are made when jax is imported
    if jax.__version_info__ < (0, 10, 2) or not options.jax_enable_compilation_cache:
        return
    if options.jax_compilation_cache_dir is not None:
        return
    folder = cache_root() / 'xla'
    try:
        _prepare(folder)
    except OSError as error:
        _say(f'are not kept in {folder}', error.strerror)
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    _listen(folder)


def _prepare(folder):
    """Makes the folder, and evicts the oldest entries. Raises OSError if it cannot be written or is another user's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The programs in it are executed.
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(None, 'it belongs to another user')
    with tempfile.TemporaryFile(dir=folder):
        pass
    # JAX's own limit needs the package filelock.
    total = 0
    for _, size, path in sorted(_entries(folder), reverse=True):
        total += size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)


def _entries(folder):
    """[(time of the last use, bytes, path)] of the entries."""
    found = []
    for path in folder.glob(_ENTRIES):
        with contextlib.suppress(FileNotFoundError):  # another process has just deleted it
            stat = path.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    return found


def _listen(folder):
    """Turns JAX's warnings about its cache into one line, and deletes the damaged entries, which JAX never replaces.

    JAX writes entries in place: a full disk or a killed process leaves a damaged one, and another process may read one
    that is half written. The warning has the program's name, with which the names of its entries begin. Entries of
    other programs are kept: other processes share the folder.
    """
    show, said = warnings.showwarning, []

    def listen(message, *where, **options):
        trouble = _TROUBLE.fullmatch(str(message))
        if not trouble:
            show(message, *where, **options)
            return
        with contextlib.suppress(OSError):
            for path in folder.glob(f'{glob.escape(trouble[2])}-*-cache'):
                path.unlink(missing_ok=True)
        if not said:
            reading = trouble[1] == 'reading'
            _say(f'of {trouble[2]} in {folder} are damaged' if reading else f'are not kept in {folder}', trouble[3])
        said.append(message)

    warnings.showwarning = listen


def _say(what, reason):
    reason = ' '.join(str(reason).split())[:200]
    print(f'compiled programs {what} ({reason}); the run compiles instead', file=sys.stderr)
