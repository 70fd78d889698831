"""Command lines: a config file, overrides, a run folder. Every mistake of the user is one line of error."""

import difflib
import errno
import glob
import importlib.util
import itertools
import logging as standard_logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from convnorm_jax.cli import overrides as overrides_lib
from convnorm_jax.configs import default, keys
from convnorm_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'a config of convnorm_jax, e.g. digits_convnorm, or a file of your own', lock_config=True
)
_PACKAGED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs')
_BASE = os.path.join(_PACKAGED, 'default.py')

# The end of --help of commands that take --config.
ABOUT_CONFIGS = """
Every key of a config, with its default and what it is for, is in convnorm_jax/configs/default.py, and on the page
"Every key of a config" of the site. Of a KEY that is given twice the last value counts. None is accepted where it is
the default.
"""
_ABOUT_ERRORS = """
A mistake in a command, its config, its data or its folders is one line of error, and exit code 2. With
CONVNORM_TRACEBACK=1 in the environment a traceback shows where it was detected. Any other error is a fault of the
program: please report its traceback.
"""
# Errors of a file system that no program can avoid.
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
FAULT = (
    'the error above is a fault of the program, not a mistake in the command: please report it, with all these lines '
    'and the command, on the issue tracker of convnorm_jax'
)


def run_command(run: Callable[[], int], *texts: str | None) -> int:
    """Runs a command; a user's mistake becomes one line and exit code 2, see `_ABOUT_ERRORS`.

    Args:
      run: the command; returns the exit code, and raises a user's mistake as `UserError`.
      *texts: the paragraphs that --help prints.

    Returns:
      The exit code.
    """
    _quiet_libraries()
    if any(argument.lstrip('-') in ('help', 'h') for argument in sys.argv[1:]):
        print(*(text.strip() for text in (*texts, _ABOUT_ERRORS) if text), sep='\n\n')
        return 0
    try:
        return run()
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except Exception as error:
        return report_error(error)


def say(line: object) -> None:
    """Prints a line to the standard error at once."""
    print(line, file=sys.stderr, flush=True)


def report_error(error: BaseException) -> int:
    """Prints to the standard error what went wrong; returns the exit code: 2 for a user's mistake, else 1.

    Args:
      error: an exception that is being handled.
    """
    line = _users_mistake(error)
    if line is None or os.environ.get('CONVNORM_TRACEBACK'):
        traceback.print_exc()
    print(FAULT if line is None else f'error: {" ".join(line.split())}', file=sys.stderr, flush=True)
    return 1 if line is None else 2


def _users_mistake(error):
    """The line for an error that the user can do something about; None for a fault of the program."""
    from convnorm_jax.files import unwritten
    from convnorm_jax.runs.disk import reason

    if isinstance(error, UserError):
        return str(error)
    if reason(error) is not None:
        return f'{unwritten(error)}: {reason(error)}'
    if _is_full_shared_memory(error):
        return (
            'shared memory (/dev/shm) is too small for the batches of the data workers: enlarge it (docker run '
            '--shm-size=8g), or give fewer config.data.workers (0: threads, which need none)'
        )
    if isinstance(error, OSError) and error.filename and error.errno in _UNREADABLE:
        return f'{error.filename}: cannot be read ({error.strerror})'
    if type(error).__name__ in ('JaxRuntimeError', 'XlaRuntimeError') and 'RESOURCE_EXHAUSTED' in str(error):
        return (
            f'not enough memory on the device ({str(error)[:200]}); give a smaller config.data.batch_size, or '
            'config.eval.batch_size where it was evaluating'
        )
    return None


def _is_full_shared_memory(error):
    """Whether data workers ended because of it: with an error, or with SIGBUS."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or (isinstance(error, RuntimeError) and 'terminated unexpectedly with exit code -7' in str(error))


def _quiet_libraries():
    logging.set_verbosity(logging.FATAL)  # Orbax warns of what is intended, and logs what it raises
    # After a failed read or write, Orbax's other tasks end when their event loop is closed: no news for the user.
    standard_logging.getLogger('asyncio').setLevel(standard_logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_closed_loops


def _without_closed_loops(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str, str]:
    """(config, workdir, mode) of a command line, checked.

    In eval mode the config is that of the run in --workdir with the overrides of the command line; --config may be left
    out.

    Raises:
      UserError: a mistake of the user, in one line.
    """
    argv, path = _with_config(list(argv))
    config, absent = _checked_config(argv, path, flags.FLAGS, _CONFIG)
    mode, workdir = flags.FLAGS.mode, flags.FLAGS.workdir
    if not workdir and path == _BASE:
        raise UserError("--workdir is missing: give the run's folder to evaluate")
    workdir = os.path.expanduser(workdir or default_workdir(path, config))
    if mode == 'eval':
        overridden = flags.FLAGS['config'].override_values  # type: ignore[attr-defined]  # of ml_collections' flags
        config = _run_config(config, workdir, [*overridden, *absent])
    return config, workdir, mode


def parse_own(values: flags.FlagValues, argv: Sequence[str], options: str) -> None:
    """Parses a command line by a command's own flags, whose values it sets.

    Args:
      values: the flags.
      argv: the command line.
      options: their names, for the error.

    Raises:
      UserError: a wrong value, or anything else on the line.
    """
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error
    if rest[1:]:
        raise UserError(f'{rest[1]!r}: not understood; options are {options}')


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """The config of `--config=FILE` and `--config.KEY=VALUE` arguments, checked; absl's global flags do not change.

    Raises:
      UserError: as `parse`, also for any other option.
    """
    argv, path = _with_config(['', *arguments])
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values, sys_argv=argv)
    return _checked_config(argv, path, values, holder)[0]


def default_workdir(path: str, config: ConfigDict) -> str:
    """runs/<config file>-<net>-<layer>-seed<seed>."""
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.join('runs', f'{name}-{config.model.name}-{config.model.layer}-seed{config.seed}')


def _with_config(argv):
    """The arguments as --config=PATH ..., and that path."""
    i = 0
    while i < len(argv) - 1:
        if argv[i] in ('--config', '-config'):
            argv[i : i + 2] = [f'--config={argv[i + 1]}']
        i += 1
    places = [i for i, a in enumerate(argv) if a.startswith(('--config=', '-config='))]
    paths = [argv[i].split('=', 1)[1] for i in places]
    if len(paths) > 1:
        raise UserError(f'--config is given {len(paths)} times, as {", ".join(paths)}: give one file')
    if paths:
        path = _config_path(paths[0])
        argv[places[0]] = f'--config={path}'
        return argv, path
    words = [a.lstrip('-') for a in argv]
    if 'mode=eval' not in words and ('mode', 'eval') not in itertools.pairwise(words):
        raise UserError(f'--config is missing: give one of {_configs()}')
    return [argv[0], f'--config={_BASE}', *argv[1:]], _BASE


def _config_path(given):
    """The file that was given; else the packaged config of that name: digits_convnorm, configs/digits_convnorm.py."""
    if given.endswith('.py') and os.path.isfile(given):
        return given
    folder, name = os.path.split(given)
    packaged = os.path.join(_PACKAGED, f'{name.removesuffix(".py")}.py')
    return packaged if folder in ('', 'configs') and os.path.isfile(packaged) else given


def _configs():
    names = sorted(os.path.basename(path).removesuffix('.py') for path in glob.glob(os.path.join(_PACKAGED, '*.py')))
    return ', '.join(name for name in names if name not in ('__init__', 'default', 'keys')) + ', or a file of your own'


def _load(path):
    """The config of a file, before any override."""
    if not os.path.isfile(path):
        raise UserError(f'--config={path}: no such file; give one of {_configs()}')
    if not path.endswith('.py'):
        raise UserError(f'--config={path}: is not a Python file, NAME.py; give one of {_configs()}')
    spec = importlib.util.spec_from_file_location('given_config', path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # the user's own file may raise anything
        raise UserError(f'--config={path}: {type(error).__name__}: {error}') from error
    if not isinstance(config, ConfigDict):
        raise UserError(f'--config={path}: get_config() returns a {type(config).__name__}, expected a ConfigDict')
    if path != _BASE:
        _check_keys(path, config, _load(_BASE))
    return config


def _check_keys(path, config, base):
    """Raises UserError unless a config file has the keys of the base config, and no others."""
    given, known = set(keys.flatten(config)), set(keys.flatten(base))
    for key in sorted(given - known):
        close = difflib.get_close_matches(key, known, 1)
        hint = f'; did you mean config.{close[0]}?' if close else ''
        raise UserError(f'--config={path}: sets config.{key}, which configs/default.py does not have{hint}')
    if known - given:
        raise UserError(
            f'--config={path}: lacks config.{min(known - given)}; start from configs/default.py: '
            'config = default.get_config()'
        )


def _checked_config(argv, path, values, holder):
    """The config at `path` with the overrides of `argv`, by a `FlagValues` and its config flag, checked.

    Returns:
      (the config, the keys that the command line sets to None).
    """
    base = _load(_BASE)
    overrides_lib.check_keys(argv, _load(path))
    argv, absent = overrides_lib.last_of_each(argv, base)
    config = _parse_flags(argv, values, holder, base)
    for key in absent:
        keys.put(config, key, None)
    keys.check_types(config, base)
    _split_names(config)
    # JAX is imported only now: a mistake in the flags is answered without it.
    from convnorm_jax.training.config import check_config

    check_config(config)
    return config, absent


def _parse_flags(argv, values, holder, base):
    try:
        rest = values(argv)
        config = holder.value
    except flags.IllegalFlagValueError as error:
        raise UserError(overrides_lib.illegal_value(str(error), base)) from error
    except (flags.Error, TypeError, ValueError, AttributeError, KeyError, OSError) as error:
        raise UserError(str(error)) from error
    if rest[1:]:
        raise UserError(f'{rest[1]!r}: not understood; options look like --config.train.epochs=10')
    return config


def _split_names(config):
    # A bare a,b on the command line arrives as the one string 'a,b'.
    for name, key in default.KEYS.items():
        if key.names:
            given = keys.get(config, name)
            keys.put(config, name, tuple(part for text in given for part in str(text).split(',') if part))


def _run_config(given, workdir, overridden):
    """The config of the run in `workdir`, with the keys that this command line overrides."""
    from convnorm_jax.runs.workdir import check_same_run, load_config
    from convnorm_jax.training.config import check_config

    saved = load_config(workdir)
    merged = ConfigDict(given.to_dict())
    keys.merge(merged, saved)
    for key in overridden:
        keys.put(merged, key, keys.get(given, key))
    keys.check_types(merged, _load(_BASE))
    check_config(merged)
    known = {key: value for key, value in keys.flatten(saved).items() if key in default.KEYS}
    check_same_run(known, merged.to_dict(), workdir)
    return merged
