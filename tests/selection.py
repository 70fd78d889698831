"""What of a test's parameters is in the default selection."""

import pytest


def few(values, *chosen):
    """Of values for `parametrize` those that are not chosen, marked slow."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]
