"""Checks of a net's sizes, which a user may give as ints of Python or NumPy."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from convnorm_jax.errors import UserError


def whole_number(name: str, value: Any, least: int, or_none: str = '') -> Any:
    """Returns a size as an int, or None where that is allowed.

    Args:
      name: of the option, for the message.
      value: an int of Python or NumPy, or None.
      least: the smallest allowed size.
      or_none: what None stands for, such as "the net's own"; '' does not allow None.

    Raises:
      ValueError: another value.
    """
    if value is None and or_none:
        return None
    if not is_whole_number(value) or value < least:
        otherwise = f', or None for {or_none}' if or_none else ''
        raise UserError(f'{name}={value!r}: expected a whole number of {least} or more{otherwise}')
    return int(value)


def is_whole_number(value: Any) -> TypeGuard[int]:
    """Returns whether a value is an int of Python or NumPy; a bool does not count."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a layer with NumPy's integers converted to int."""
    return {name: int(value) if isinstance(value, np.integer) else value for name, value in options.items()}
