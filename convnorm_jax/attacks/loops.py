"""Loops over passes of a network, unrolled on a CPU."""

from collections.abc import Callable
from typing import Any

import jax

# A program holds at most this many copies of the network (the paper runs PGD-20).
UNROLLED_COPIES = 50


def unrolls(copies: int) -> bool:
    """Whether a loop over `copies` passes of the network is unrolled on a CPU.

    XLA:CPU runs a convolution inside a while loop 2 to 15 times slower than outside it: 2 times for
    five steps of a ResNet-18, 15 times for twenty of 17 convolutions of 32 channels (2 cores, jax
    0.10.2). Unrolling costs compile time (that net: 0.2 s per copy), hence the limit. Other
    backends get the loop, which compiles fast.
    """
    return copies <= UNROLLED_COPIES


def by_platform(copies: int, unrolled: Callable[..., Any], loop: Callable[..., Any], *args: Any) -> Any:
    """`unrolled(*args)` in a program for a CPU if it `unrolls` so many copies, else `loop(*args)`.

    The choice is made when the program is lowered, not when it is traced, so that `jax.export` to another platform
    makes the right one.
    """
    if not unrolls(copies):
        return loop(*args)
    return jax.lax.platform_dependent(*args, cpu=unrolled, default=loop)


def repeat(count: int, body: Callable[[Any, Any], Any], start: Any, copies: int | None = None) -> Any:
    """`fori_loop(0, count, body, start)`, unrolled where that is faster.

    Args:
      count: iterations; body, start: see `jax.lax.fori_loop`.
      copies: passes of the network in all iterations (default `count`).
    """
    if count == 1:  # XLA keeps a loop of one iteration, whatever `unroll` says
        return body(0, start)
    body = jax.jit(body)  # traced once for both of the loops
    unrolled, loop = [
        lambda carry, unroll=unroll: jax.lax.fori_loop(0, count, body, carry, unroll=unroll) for unroll in (True, False)
    ]
    return by_platform(count if copies is None else copies, unrolled, loop, start)
