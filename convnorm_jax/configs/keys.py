"""What a key of a config is, and how configs are made, read and merged. Imports nothing heavy: a mistake in a key
is answered before JAX is loaded.
"""

import dataclasses
import importlib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from convnorm_jax.errors import UserError

_INTERVAL = re.compile(r'([\[(])(.+), (.+)([\])])')


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config: its default, what it may be, and what it decides.

    Attributes:
      default: its value where nothing else is given; None stands for the published value, or for "not used".
      doc: what it means; names every choice.
      kind: type of its values, where the default is None.
      choices: what the value is one of: values, or 'MODULE:NAME' for those of a list in this package.
      names: as `choices`, of a tuple that holds some of them in any order.
      interval: of a number, such as '[0, 1)'.
      resume: 'fixed': another value makes another run. 'free': a resumed run or an evaluation may change it.
        'duration': the length of a run, which its schedule follows: it may change if the learning rate is constant.
      decides_suite: whether the figures of the evaluation suite depend on it, for a given net.
      affects_result: whether `result.json` depends on it.
    """

    default: Any
    doc: str
    kind: type | None = None
    choices: tuple = ()
    names: tuple = ()
    interval: str = ''
    resume: str = 'fixed'
    decides_suite: bool = False
    affects_result: bool = True

    def allowed(self) -> tuple:
        """The values of `choices`, or of `names`, read from the modules that define them."""
        return tuple(value for choice in self.choices or self.names for value in _listed(choice))

    def bounds(self) -> tuple[float, float, bool, bool] | None:
        """(smallest, largest, is the smallest allowed, is the largest allowed) of `interval`; None without one."""
        found = _INTERVAL.fullmatch(self.interval)
        if not found:
            return None
        opening, low, high, closing = found.groups()
        return _number(low), _number(high), opening == '[', closing == ']'


def make_config(keys: Mapping[str, Key]) -> ConfigDict:
    """The config with the defaults of a table {'section.name': Key}."""
    config = ConfigDict()
    for name, key in keys.items():
        *sections, leaf = name.split('.')
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[leaf] = config_dict.placeholder(key.kind) if key.default is None else key.default
    return config


def flatten(config: Mapping) -> dict[str, Any]:
    """{'model.name': value, ...} of a nested config or dict; tuples become lists, as in JSON."""
    flat = {}
    for key, value in config.items():
        if hasattr(value, 'items'):
            flat.update({f'{key}.{inner}': v for inner, v in flatten(value).items()})
        else:
            flat[key] = list(value) if isinstance(value, (list, tuple)) else value
    return flat


def get(config: Mapping, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split('.'):
        config = config[part]
    return config


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a dotted key to a value of any type."""
    section, name = _section(config, key)
    with section.ignore_type():
        section[name] = value


def value_text(value: Any) -> str:
    """A value of a config as people write it: 0.1, 1e-4, resnet18."""
    if isinstance(value, float) and float(f'{value:g}') == value:
        return f'{value:g}'
    return str(value)


def value_type(config: ConfigDict, key: str) -> type:
    """The type of a dotted key's values, also where its value is None."""
    section, name = _section(config, key)
    return section.get_type(name)


def merge(config: ConfigDict, saved: Mapping) -> None:
    """Sets the keys of a config to what a `config.json` holds; passes over keys that the config does not have."""
    known = flatten(config)
    for key, value in flatten(saved).items():
        if key in known:
            put(config, key, tuple(value) if isinstance(value, list) else value)


def check_types(config: ConfigDict, base: ConfigDict, section: str = 'config') -> None:
    """Raises UserError for the first value that is of another type than in the base config.

    ml_collections checks types too, but a file can tell it not to, and config.json may hold anything.
    """
    for name in base:
        key, value, kind = f'{section}.{name}', config[name], base.get_type(name)
        if isinstance(base[name], ConfigDict) and isinstance(value, ConfigDict):
            check_types(value, base[name], key)
            continue
        allowed = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
        absent = value is None and base[name] is None
        if not absent and (not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool)):
            kind = 'section' if issubclass(kind, ConfigDict) else kind.__name__
            raise UserError(f'{key}={value!r}: expected a value of type {kind}, as in configs/default.py')


def _section(config, key):
    """(the section that holds a dotted key, the key's name in it)."""
    *sections, name = key.split('.')
    for part in sections:
        config = config[part]
    return config, name


def _listed(choice):
    """The values that one entry of `Key.choices` stands for."""
    if not isinstance(choice, str) or ':' not in choice:
        return (choice,)
    module, name = choice.split(':')
    return tuple(getattr(importlib.import_module(f'convnorm_jax.{module}'), name))


def _number(text):
    return int(text) if text.isdigit() else float(text)
