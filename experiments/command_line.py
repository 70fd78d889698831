"""The command line: a config file, overrides, a run folder; every mistake one line."""

import difflib
import glob
import os

from absl import flags
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'a file of configs/, e.g. configs/digits_convnorm.py', lock_config=True)


def parse(argv):
  """(config, workdir, mode) of a command line, checked.

  In eval mode the config is that of the run in --workdir with the overrides of the
  command line; --config may be left out.

  Raises:
    ValueError: anything the user got wrong, in one line.
  """
  argv = _with_config(list(argv))
  _parse_flags(argv)
  config, values = _CONFIG.value, flags.FLAGS
  from convnorm_jax.training import config as config_lib  # heavy: after the flags are known to be good

  config_lib.check_config(config)
  workdir = values.workdir or default_workdir(_config_name(argv), config)
  if values.mode == 'eval':
    config = _run_config(config, workdir, config_lib)
  return config, workdir, values.mode


def default_workdir(name, config):
  """runs/<config file>-<net>-<layer>-seed<seed>."""
  return os.path.join('runs', f'{name}-{config.model.name}-{config.model.layer}-seed{config.seed}')


def _run_config(given, workdir, config_lib):
  """The config of the run in `workdir`, with what this command line overrides."""
  from convnorm_jax.training.loop import load_config

  saved = load_config(workdir)
  overrides = flags.FLAGS['config'].override_values
  merged = ConfigDict(given.to_dict())
  with merged.unlocked():
    for key, value in config_lib.flatten(saved).items():
      _set(merged, key, tuple(value) if isinstance(value, list) else value)
    for key, value in overrides.items():
      _set(merged, key, value)
  config_lib.check_config(merged)
  config_lib.check_same_run(saved, merged.to_dict(), workdir)
  return merged


def _set(config, key, value):
  *sections, name = key.split('.')
  for section in sections:
    if section not in config:
      config[section] = ConfigDict()
    config = config[section]
  with config.ignore_type():
    config[name] = value


def _with_config(argv):
  """The arguments, with the base config where eval mode leaves --config out."""
  if any(a == '--config' or a.startswith('--config=') for a in argv):
    return argv
  if not any(a in ('--mode=eval', '-mode=eval') for a in argv) and 'eval' not in argv:
    if any(a in ('--help', '--helpfull', '-h') for a in argv):
      return argv
    raise ValueError(f'--config is missing: give one of {", ".join(_configs())}')
  base = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs', 'default.py')
  return [argv[0], f'--config={base}', *argv[1:]]


def _configs():
  return sorted(path for path in glob.glob('configs/*.py') if not path.endswith(('__init__.py', 'default.py')))


def _config_name(argv):
  path = next((a.split('=', 1)[1] for a in argv if a.startswith('--config=')), None)
  path = path or argv[argv.index('--config') + 1]
  return os.path.splitext(os.path.basename(path.split(':')[0]))[0]


def _parse_flags(argv):
  """Parses the flags; config_flags raises many kinds of errors."""
  try:
    rest = flags.FLAGS(argv)
    config = _CONFIG.value
  except (FileNotFoundError, ModuleNotFoundError, ImportError, SyntaxError) as error:
    raise ValueError(f'--config={_config_name(argv)}: {_first_line(error)}; configs here: {", ".join(_configs())}') from error
  except (AttributeError, KeyError) as error:
    raise ValueError(_unknown_key(argv) or _first_line(error)) from error
  except (flags.Error, TypeError, ValueError) as error:
    raise ValueError(_unknown_key(argv) or _first_line(error)) from error
  if rest[1:]:
    raise ValueError(f'{rest[1]!r}: not understood; options look like --config.train.epochs=10')
  if config is None:
    raise ValueError(f'--config is missing: give one of {", ".join(_configs())}')


def _unknown_key(argv):
  """What to say of the first override that names no key of the config, or None."""
  try:
    config = flags.FLAGS['config'].value
  except (AttributeError, KeyError, flags.Error):
    config = None
  if config is None:
    return None
  for argument in argv[1:]:
    if not argument.startswith('--config.'):
      continue
    key = argument[len('--config.'):].split('=', 1)[0]
    section, trail = config, []
    for part in key.split('.'):
      if not isinstance(section, ConfigDict) or part not in section:
        return _suggest(key, section, trail, config)
      section, trail = section[part], [*trail, part]
  return None


def _suggest(key, section, trail, config):
  from_here = list(section.keys()) if isinstance(section, ConfigDict) else []
  where = '.'.join(['config', *trail])
  if not from_here:
    return f'config.{key}: {where} is a value, it holds no further keys'
  everywhere = _all_keys(config)
  close = difflib.get_close_matches(key, everywhere, 1) or [
      k for k in everywhere if k.split('.')[-1] == key.split('.')[-1]][:1]
  hint = f'; did you mean config.{close[0]}?' if close else ''
  return f'config.{key}: no such key{hint} {where} has {", ".join(sorted(from_here))}'


def _all_keys(config, prefix=''):
  keys = []
  for name, value in config.items():
    keys += _all_keys(value, f'{prefix}{name}.') if isinstance(value, ConfigDict) else [prefix + name]
  return keys


def _first_line(error):
  return str(error).strip().strip('\'"').split('\\n')[0].split('\n')[0] or type(error).__name__
