"""Sizes of a net as a user may give them, Python's ints or NumPy's, as Python's."""

import numpy as np

from convnorm_jax.errors import UserError


def whole_number(name, value, least, or_none=''):
    """A size as an int; None stays None where `or_none` says what it stands for.

    Args:
      name: of the option, for the message.
      value: int, NumPy integer, or None.
      least: smallest one allowed.
      or_none: what None is, e.g. "the net's own"; '' where it is not allowed.

    Raises:
      ValueError: anything else.
    """
    if value is None and or_none:
        return None
    if not is_whole_number(value) or value < least:
        otherwise = f', or None for {or_none}' if or_none else ''
        raise UserError(f'{name}={value!r}: expected a whole number of {least} or more{otherwise}')
    return int(value)


def is_whole_number(value):
    """Whether a value is an int, Python's or NumPy's; bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def plain_options(options):
    """Options of a layer, NumPy's integers as Python's."""
    return {name: int(value) if isinstance(value, np.integer) else value for name, value in options.items()}
