"""Which form of an operation runs is decided when a program is lowered, for the platform that it is lowered for."""

from collections.abc import Callable

import jax


def by_platform(*arguments, cpu: Callable, accelerator: Callable, tpu: Callable | None = None):
    """`cpu(*arguments)` in a program for the CPU, `accelerator(*arguments)` in one for a GPU or, without `tpu`, a TPU.

    All are traced; the program holds the one of its platform. (`jax.default_backend()` tells of the machine that
    traces, which is another one for `jax.export` and for a CPU program on a GPU machine.)
    """
    others = {} if tpu is None else {'tpu': tpu}
    return jax.lax.platform_dependent(*arguments, cpu=cpu, **others, default=accelerator)
