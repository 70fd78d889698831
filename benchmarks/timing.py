"""Times programs in turn, measures the machine's rates, and prints tables, for the other benchmarks."""

import functools
import math
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import machine
from convnorm_jax.files import write_json

# On a GPU a layer is shorter than the dispatch of a call: time as many calls at once as fill these seconds.
_SECONDS_AT_ONCE = 0.02


def interleaved(programs, repeats):
    """Times programs in turn within each repeat, so that a machine that slows down slows all of them.

    Args:
      programs: {name: function without arguments that returns JAX arrays, or anything that is ready when it returns}.
      repeats: int.

    Returns:
      {name: [seconds of a call, for each repeat]}, without the first calls, which compile.
    """
    calls = {name: _calls_at_once(run) for name, run in programs.items()}
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            seconds[name].append(_seconds(run, calls[name]))
    return seconds


def medians_ms(seconds):
    """{name: median in milliseconds} of a result of `interleaved`."""
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _calls_at_once(run):
    jax.block_until_ready(run())
    if jax.default_backend() == 'cpu':  # on the CPU, calls that do not wait could run at the same time
        return 1
    return max(1, math.ceil(_SECONDS_AT_ONCE / _seconds(run, 1)))


def _seconds(run, calls):
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def machine_rates(dtype, repeats=5):
    """Measures the device's peak rates: the least time of a few calls, and the better of two sizes of a product.

    Args:
      dtype: of the factors of the product, which uses JAX's default precision.

    Returns:
      {'product': operations a second of one large dense matrix product, 'copy': bytes a second, read and
      written together, of one pass in place over an array that fits in no cache}.
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
    """Milliseconds of these operations or bytes at the machine's rates, whichever is longer."""
    return 1e3 * max(operations / rates['product'], size / rates['copy'])


def say_rates(rates):
    """Prints one line for each dtype of {dtype: `machine_rates`}."""
    for dtype, rate in rates.items():
        print(f'{dtype}: dense product {rate["product"] / 1e9:.0f} GFLOP/s, copy {rate["copy"] / 1e9:.1f} GB/s')


def print_table(rows):
    """Prints a `table`."""
    print(*table(rows), sep='\n', flush=True)


def table(rows):
    """Formats rows {column: text, number or None} of the same columns as Markdown; digits by a number's size."""
    head = ['| ' + ' | '.join(rows[0]) + ' |', '|---' + '|---:' * (len(rows[0]) - 1) + '|']
    return head + ['| ' + ' | '.join(map(_cell, row.values())) + ' |' for row in rows]


def _cell(value):
    if value is None:
        return ''
    if not isinstance(value, float):
        return str(value)
    return f'{value:.0f}' if value >= 100 else f'{value:.1f}' if value >= 10 else f'{value:.2f}'


def ratio(value, base):
    """value / base, or None if one of them is None."""
    return value / base if value is not None and base else None


def save(options, rates, rows, *packages):
    """Writes the results and the machine to --output.

    Args:
      options: of the command line; `output` is a path or None.
      rates: see `say_rates`.
      rows: a list of dicts.
      *packages: whose versions to write, in addition to JAX and Flax.
    """
    if not options.output:
        return
    versions = {'python': sys.version.split()[0], **machine.versions('jax', 'jaxlib', 'flax', 'numpy', *packages)}
    facts = {'machine': machine.description(), 'versions': versions, 'rates': rates}
    write_json(options.output, {'options': vars(options), **facts, 'rows': rows})


def names(text):
    """Splits a list of an option's names at its commas."""
    return [name for name in text.split(',') if name]


def numbers(text):
    """Splits a list of an option's numbers at its commas."""
    return [int(number) for number in names(text)]
