"""Loops over passes of a network, unrolled on a CPU."""

from collections.abc import Callable

import jax

# A program holds at most this many copies of the network (the paper runs PGD-20).
UNROLLED_COPIES = 50


def unrolls(copies: int) -> bool:
    """Whether a loop over `copies` passes of the network is written out in full where it runs on a CPU.

    XLA:CPU runs a convolution inside a while loop 2 to 15 times slower than outside it: 2 times on
    five steps of a ResNet-18, 15 times on twenty of 17 convolutions of 32 channels (2 cores, jax
    0.10.2). Written out they cost compile time (that net: 0.2 s a copy): hence the limit. Other
    backends get the loop, which compiles in a moment.
    """
    return copies <= UNROLLED_COPIES


def by_platform(copies: int, written_out: Callable, loop: Callable, *args):
    """`written_out(*args)` in a program for a CPU, if it `unrolls` so many copies; else `loop(*args)`.

    Decided when the program is lowered for its platform, not where it is traced: `jax.export` to another one is right.
    """
    if not unrolls(copies):
        return loop(*args)
    return jax.lax.platform_dependent(*args, cpu=written_out, default=loop)


def repeat(count: int, body: Callable, start, copies: int | None = None):
    """`fori_loop(0, count, body, start)`, written out where that is faster.

    Args:
      copies: passes of the network in all `count` turns (default `count`).
    """
    if count == 1:  # a loop of one turn stays a loop, whatever `unroll` says
        return body(0, start)
    body = jax.jit(body)  # traced once for both of the loops
    written_out, loop = [
        lambda carry, unroll=unroll: jax.lax.fori_loop(0, count, body, carry, unroll=unroll) for unroll in (True, False)
    ]
    return by_platform(count if copies is None else copies, written_out, loop, start)
