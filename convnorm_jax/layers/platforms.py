"""Chooses the form of an operation when a program is lowered, by the platform that it is lowered for."""

from collections.abc import Callable
from typing import Any

import jax


def by_platform(*arguments: Any, cpu: Callable, accelerator: Callable, tpu: Callable | None = None) -> Any:
    """Returns the result of the form for the program's platform, called with `arguments`.

    All forms are traced; the program holds that of its platform. `jax.default_backend()` would not do: it names the
    platform of the tracing process, which differs with `jax.export` and for a CPU program on a machine with a GPU.

    Args:
      arguments: arrays.
      cpu: form for the CPU.
      accelerator: form for a GPU, and for a TPU without `tpu`.
      tpu: form for a TPU.
    """
    others = {} if tpu is None else {'tpu': tpu}
    return jax.lax.platform_dependent(*arguments, cpu=cpu, **others, default=accelerator)
