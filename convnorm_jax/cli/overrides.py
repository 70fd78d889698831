"""The overrides of a command line, --config.KEY=VALUE: unknown keys, None, and values of a wrong type."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from convnorm_jax.configs import keys
from convnorm_jax.errors import UserError

_NO_VALUE = object()


def check_keys(argv: Sequence[str], config: ConfigDict) -> None:
    """Raises UserError for the first --config.KEY that the config does not have."""
    for argument in argv[1:]:
        key, _, _ = _parts(argument)
        if key is not None:
            _check_key(key, config)


def last_of_each(argv: Sequence[str], base: ConfigDict) -> tuple[list[str], list[str]]:
    """(the arguments with the last override of each key only, the keys that it sets to None).

    ml_collections cannot set a key to None, and joins the values of a tuple that is given twice.

    Args:
      argv: the command line, its keys checked.
      base: the config whose defaults say which keys may be None.
    """
    kept: list[Any] = [argv[0]]
    places: dict[str, int] = {}
    i = 1
    while i < len(argv):
        key, value, negated = _parts(argv[i])
        tokens: Sequence[str | None] = argv[i : i + 1]
        if key is not None and value is _NO_VALUE and not negated and not _is_boolean(key, base) and i + 1 < len(argv):
            tokens, value = argv[i : i + 2], argv[i + 1]
        i += len(tokens)
        if key in places:
            kept[places.pop(key)] = ()
        if key is not None:
            places[key] = len(kept)
            if value == 'None':
                _check_none(key, base)
                tokens = (None,)
        kept.append(tokens)
    absent = [key for key, place in places.items() if kept[place] == (None,)]
    return [kept[0], *(token for tokens in kept[1:] for token in tokens if token is not None)], absent


def illegal_value(message: str, base: ConfigDict) -> str:
    """Our error for a value that cannot be parsed, from absl's."""
    found = re.match(r'flag --(?:no)?config\.([\w.]+)=(.*?): ', message, re.DOTALL)
    if not found:
        return message.removeprefix('flag --')
    key, value = found.groups()
    or_none = ', or None' if keys.get(base, key) is None else ''
    return f'config.{key}={value}: expected a value of type {keys.value_type(base, key).__name__}{or_none}'


def _parts(argument):
    """(key, value, whether it is --noconfig.KEY) of an override; (None, ...) for any other argument."""
    found = re.match(r'-{1,2}(no)?config\.([^=]*)(=(.*))?$', argument, re.DOTALL)
    if not found:
        return None, _NO_VALUE, False
    return found[2], _NO_VALUE if found[3] is None else found[4], bool(found[1])


def _check_none(key, base):
    """Raises UserError if None makes no sense for a key."""
    default = keys.get(base, key)
    if default is None:
        return
    hint = f'; for nothing give --config.{key}=' if default == '' else ''
    if isinstance(default, tuple):
        hint = f"; for nothing give '--config.{key}=()'"
    raise UserError(
        f'config.{key}=None: expected a value of type {type(default).__name__}, as in configs/default.py{hint}'
    )


def _is_boolean(key, base):
    return keys.value_type(base, key) is bool


def _check_key(key, config):
    section, trail = config, ['config']
    for part in key.split('.'):
        if not isinstance(section, ConfigDict):
            raise UserError(f'config.{key}: {".".join(trail)} is a value, it holds no further keys')
        if part not in section:
            raise UserError(_unknown_key(key, section, '.'.join(trail), config))
        section, trail = section[part], [*trail, part]
    if isinstance(section, ConfigDict):
        raise UserError(f'config.{key} is a section: set one of its keys, {", ".join(sorted(section))}')


def _unknown_key(key, section, where, config):
    everywhere = list(keys.flatten(config))
    leaf = key.split('.')[-1]
    close = [k for k in everywhere if k.split('.')[-1] == leaf] or difflib.get_close_matches(key, everywhere, 1)
    hint = f'did you mean config.{close[0]}? ' if close else ''
    return f'config.{key}: no such key; {hint}{where} has {", ".join(sorted(section))}'
