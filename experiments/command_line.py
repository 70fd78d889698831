"""Command lines: a config file, overrides, a run folder; every mistake is one line."""

import difflib
import glob
import importlib.util
import itertools
import logging as standard_logging
import os
import sys

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'a file of configs/, e.g. configs/digits_convnorm.py', lock_config=True
)
_BASE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs', 'default.py')

# The end of the help of commands that take --config.
ABOUT_CONFIGS = 'Every key of a config is in configs/default.py.'


def run_command(run, *texts):
    """Runs a command; a user's mistake becomes one line and exit code 2.

    CONVNORM_TRACEBACK=1 in the environment shows where in the code it was noticed.

    Args:
      run: function of nothing -> exit code. User errors are raised as ValueError.
      *texts: the paragraphs of what --help prints.

    Returns:
      The exit code.
    """
    _quiet_libraries()
    if any(argument.lstrip('-') in ('help', 'h') for argument in sys.argv[1:]):
        print(*(text.strip() for text in texts), sep='\n\n')
        return 0
    try:
        return run()
    except ValueError as error:
        if os.environ.get('CONVNORM_TRACEBACK'):
            raise
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except OSError as error:
        from convnorm_jax.training.disk import reason

        if reason(error) is None or os.environ.get('CONVNORM_TRACEBACK'):
            raise
        print(f'error: {error.filename or "writing failed"}: {reason(error)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130


def _quiet_libraries():
    logging.set_verbosity(logging.FATAL)  # Orbax warns of what is meant, and says twice what it raises
    # Its reads and writes that fail leave others behind, which end when their event loop is gone.
    standard_logging.getLogger('asyncio').setLevel(standard_logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_closed_loops


def _without_closed_loops(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def parse(argv):
    """(config, workdir, mode) of a command line, checked.

    In eval mode the config is that of the run in --workdir with the overrides of the
    command line; --config may be left out.

    Raises:
      ValueError: anything the user got wrong, in one line.
    """
    argv, path = _with_config(list(argv))
    config = _checked_config(argv, path, flags.FLAGS, _CONFIG)
    mode, workdir = flags.FLAGS.mode, flags.FLAGS.workdir
    if not workdir and path == _BASE:
        raise ValueError("--workdir is missing: give the run's folder to evaluate")
    workdir = os.path.expanduser(workdir or default_workdir(path, config))
    if mode == 'eval':
        config = _run_config(config, workdir)
    return config, workdir, mode


def read_config(arguments):
    """The config of `--config=FILE` and `--config.KEY=VALUE` arguments, checked; absl's global flags stay as they are.

    Raises:
      ValueError: as `parse`, also for any other option.
    """
    argv, path = _with_config(['', *arguments])
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values, sys_argv=argv)
    return _checked_config(argv, path, values, holder)


def default_workdir(path, config):
    """runs/<config file>-<net>-<layer>-seed<seed>."""
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.join('runs', f'{name}-{config.model.name}-{config.model.layer}-seed{config.seed}')


def _with_config(argv):
    """The arguments as --config=PATH ..., and that path."""
    for i, argument in enumerate(argv):
        if argument in ('--config', '-config') and i + 1 < len(argv):
            argv[i : i + 2] = [f'--config={argv[i + 1]}']
            break
    path = next((a.split('=', 1)[1] for a in argv if a.startswith(('--config=', '-config='))), None)
    if path is not None:
        return argv, path
    words = [a.lstrip('-') for a in argv]
    if 'mode=eval' not in words and ('mode', 'eval') not in itertools.pairwise(words):
        raise ValueError(f'--config is missing: give one of {_configs()}')
    return [argv[0], f'--config={_BASE}', *argv[1:]], _BASE


def _configs():
    names = glob.glob('configs/*.py')
    names = sorted(n for n in names if not n.endswith(('__init__.py', 'default.py')))
    return ', '.join(names) or 'the files in configs/ (run this from the root of the repository)'


def _load(path):
    """The config of a file, before any override."""
    if not os.path.isfile(path):
        raise ValueError(f'--config={path}: no such file; give one of {_configs()}')
    spec = importlib.util.spec_from_file_location('given_config', path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # the user's own file may raise anything
        raise ValueError(f'--config={path}: {type(error).__name__}: {error}') from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f'--config={path}: get_config() returns a {type(config).__name__}, expected a ConfigDict')
    if path != _BASE:
        _check_keys(path, config, _load(_BASE))
    return config


def _check_keys(path, config, base):
    """Raises ValueError unless a config file has the keys of the base config, and no others."""
    given, known = set(_all_keys(config)), set(_all_keys(base))
    for key in sorted(given - known):
        close = difflib.get_close_matches(key, known, 1)
        hint = f'; did you mean config.{close[0]}?' if close else ''
        raise ValueError(f'--config={path}: sets config.{key}, which configs/default.py does not have{hint}')
    if known - given:
        raise ValueError(
            f'--config={path}: lacks config.{min(known - given)}; start from configs/default.py: '
            'config = default.get_config()'
        )


def _check_overrides(argv, config):
    """Raises ValueError for the first --config.KEY that the config does not have."""
    for argument in argv[1:]:
        name = argument.lstrip('-')
        prefix = next((p for p in ('config.', 'noconfig.') if name.startswith(p)), None)
        if prefix and argument.startswith('-'):
            _check_key(name[len(prefix) :].split('=', 1)[0], config)


def _check_key(key, config):
    section, trail = config, ['config']
    for part in key.split('.'):
        if not isinstance(section, ConfigDict):
            raise ValueError(f'config.{key}: {".".join(trail)} is a value, it holds no further keys')
        if part not in section:
            raise ValueError(_unknown_key(key, section, '.'.join(trail), config))
        section, trail = section[part], [*trail, part]
    if isinstance(section, ConfigDict):
        raise ValueError(f'config.{key} is a section: set one of its keys, {", ".join(sorted(section))}')


def _unknown_key(key, section, where, config):
    everywhere = _all_keys(config)
    leaf = key.split('.')[-1]
    close = [k for k in everywhere if k.split('.')[-1] == leaf] or difflib.get_close_matches(key, everywhere, 1)
    hint = f'did you mean config.{close[0]}? ' if close else ''
    return f'config.{key}: no such key; {hint}{where} has {", ".join(sorted(section))}'


def _all_keys(config, prefix=''):
    keys = []
    for name, value in config.items():
        keys += _all_keys(value, f'{prefix}{name}.') if isinstance(value, ConfigDict) else [prefix + name]
    return keys


def _checked_config(argv, path, values, holder):
    """The config at `path` with the overrides of `argv`, by a `FlagValues` and its config flag, checked."""
    _check_overrides(argv, _load(path))
    config = _parse_flags(argv, values, holder)
    # Heavy imports only now: a mistake in the flags has been answered by here.
    from convnorm_jax.training.config import check_config

    _check_types(config, _load(_BASE))
    _split_names(config)
    check_config(config)
    return config


def _check_types(config, base, section='config'):
    """Raises ValueError for the first value that is of another type than in the base config.

    ml_collections sees to it, but a file may tell it not to, and config.json may hold anything.
    """
    for name in base:
        key, value, kind = f'{section}.{name}', config[name], base.get_type(name)
        if isinstance(base[name], ConfigDict) and isinstance(value, ConfigDict):
            _check_types(value, base[name], key)
            continue
        allowed = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
        absent = value is None and base[name] is None
        if not absent and (not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool)):
            kind = 'section' if issubclass(kind, ConfigDict) else kind.__name__
            raise ValueError(f'{key}={value!r}: expected a value of type {kind}, as in configs/default.py')


def _parse_flags(argv, values, holder):
    try:
        rest = values(argv)
        config = holder.value
    except flags.IllegalFlagValueError as error:
        raise ValueError(_illegal_value(str(error))) from error
    except (flags.Error, TypeError, ValueError, AttributeError, KeyError, OSError) as error:
        raise ValueError(str(error)) from error
    if rest[1:]:
        raise ValueError(f'{rest[1]!r}: not understood; options look like --config.train.epochs=10')
    return config


def _illegal_value(message):
    # absl says: flag --config.KEY=VALUE: reason
    return message.removeprefix('flag --') + '; give a value of the type in configs/default.py' * ('config.' in message)


def _split_names(config):
    # A bare a,b on the command line arrives as the one string 'a,b'.
    names = (
        (config.attack, 'names'),
        (config.eval, 'parts'),
        (config.eval, 'features'),
        (config.eval.autoattack, 'attacks'),
        (config.gan, 'augmentation'),
    )
    for section, key in names:
        section[key] = tuple(part for name in section[key] for part in str(name).split(',') if part)


def _run_config(given, workdir):
    """The config of the run in `workdir`, with what this command line overrides."""
    from convnorm_jax.training import config as config_lib
    from convnorm_jax.training.workdir import load_config

    saved = load_config(workdir)
    merged = ConfigDict(given.to_dict())
    for key, value in config_lib.flatten(saved).items():
        _set(merged, key, tuple(value) if isinstance(value, list) else value)
    for key in flags.FLAGS['config'].override_values:
        _set(merged, key, _get(given, key))
    _check_types(merged, _load(_BASE))
    config_lib.check_config(merged)
    config_lib.check_same_run(saved, merged.to_dict(), workdir)
    return merged


def _get(config, key):
    for part in key.split('.'):
        config = config[part]
    return config


def _set(config, key, value):
    *sections, name = key.split('.')
    for section in sections:
        config = config[section] if section in config else config.setdefault(section, ConfigDict())
    with config.ignore_type():
        config[name] = value
