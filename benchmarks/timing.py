"""What the benchmarks of layers, steps and attacks share: times taken in turn, the machine's rates, tables."""

import functools
import math
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import machine
from convnorm_jax.files import write_json

# On a GPU a layer takes less than the clock and the dispatch can tell: as many calls as fill this are timed at once.
_SECONDS_AT_ONCE = 0.02


def interleaved(programs, repeats):
    """Seconds of a call, the programs in turn within each repeat: a machine that slows down slows all of them.

    Args:
      programs: {name: function of nothing -> arrays of JAX, or what is there when it returns}.
      repeats: int.

    Returns:
      {name: [seconds of each repeat]}. The first calls, which compile, are not among them.
    """
    calls = {name: _calls_at_once(run) for name, run in programs.items()}
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            seconds[name].append(_seconds(run, calls[name]))
    return seconds


def medians_ms(seconds):
    """{name: median in milliseconds} of what `interleaved` returns."""
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _calls_at_once(run):
    jax.block_until_ready(run())
    if jax.default_backend() == 'cpu':  # there, calls that wait for nothing could run beside each other
        return 1
    return max(1, math.ceil(_SECONDS_AT_ONCE / _seconds(run, 1)))


def _seconds(run, calls):
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def machine_rates(dtype, repeats=5):
    """What the device does at best: the least time of a few, and the better of two sizes of a product.

    Args:
      dtype: of the factors of the product, which is of JAX's default precision.

    Returns:
      {'product': operations a second of one large dense matrix product, 'copy': bytes a second, those read and
      those written together, of one pass over an array that no cache holds, in place}.
    """
    sizes, entries = ((1024, 2048), 2**26) if jax.default_backend() == 'cpu' else ((4096, 8192), 2**28)
    product = jax.jit(jnp.matmul)
    factors = {n: jnp.full((n, n), 1 / n, dtype) for n in sizes}
    array = [jnp.zeros(entries, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def next_array():
        array.append(add(array.pop()))
        return array[0]

    programs = {n: functools.partial(product, factor, factor) for n, factor in factors.items()}
    seconds = interleaved({**programs, 'copy': next_array}, repeats)
    rate = max(2 * n**3 / min(seconds[n]) for n in sizes)
    return {'product': rate, 'copy': 2 * array[0].nbytes / min(seconds['copy'])}


def floor_ms(operations, size, rates):
    """Milliseconds that so many operations, or so many bytes, take at the machine's rates: the longer of both."""
    return 1e3 * max(operations / rates['product'], size / rates['copy'])


def say_rates(rates):
    """One line a dtype, of {dtype: `machine_rates`}."""
    for dtype, rate in rates.items():
        print(f'{dtype}: dense product {rate["product"] / 1e9:.0f} GFLOP/s, copy {rate["copy"] / 1e9:.1f} GB/s')


def print_table(rows):
    """Prints a `table`."""
    print(*table(rows), sep='\n', flush=True)


def table(rows):
    """Lines of Markdown, of rows {column: text, number or None} of the same columns; precision by a number's size."""
    head = ['| ' + ' | '.join(rows[0]) + ' |', '|---' + '|---:' * (len(rows[0]) - 1) + '|']
    return head + ['| ' + ' | '.join(map(_cell, row.values())) + ' |' for row in rows]


def _cell(value):
    if value is None:
        return ''
    if not isinstance(value, float):
        return str(value)
    return f'{value:.0f}' if value >= 100 else f'{value:.1f}' if value >= 10 else f'{value:.2f}'


def ratio(value, base):
    """value / base, or None where one of them is not there."""
    return value / base if value is not None and base else None


def save(options, rates, rows, *packages):
    """Writes what was found and on what, where --output says.

    Args:
      options: the command line's; `output` is a path or None.
      rates: see `say_rates`. rows: a list of dicts.
      *packages: whose versions count, beside JAX's and Flax's.
    """
    if not options.output:
        return
    versions = {'python': sys.version.split()[0], **machine.versions('jax', 'jaxlib', 'flax', 'numpy', *packages)}
    facts = {'machine': machine.description(), 'versions': versions, 'rates': rates}
    write_json(options.output, {'options': vars(options), **facts, 'rows': rows})


def names(text):
    """A list of an option's names by commas."""
    return [name for name in text.split(',') if name]


def numbers(text):
    """A list of an option's numbers by commas."""
    return [int(number) for number in names(text)]
