"""Compares ConvNorm of random geometries with dense matrices in float64.

    python -m benchmarks.geometries [--count=5000] [--seed=0]

Each draw is a layer without BatchNorm: 1 to 3 dimensions, kernel, stride, dilation, groups, padding, circular or not,
transposed or not, sizes, dtype and method. Its output and its gradients with respect to image, kernel, channel-wise
kernel and bias are compared with those of `Dense`, which is written from the definitions in NumPy and shares no code
with the layer. Errors are relative to the largest entry of each array, or to a thousandth of its terms' absolute sum if
that is larger, because some geometries cancel to exactly zero, and a rounded sum does not. In each kernel every
frequency has at least 1 % of the taps' energy, because the division by less would magnify rounding errors. The tests
use a few of the draws.
"""

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.functional import Settings, apply, initial_state

# By dtype; all results are compared with float64.
TOLERANCES = {'float32': 1e-4, 'bfloat16': 6e-2}


@dataclasses.dataclass(frozen=True)
class Draw:
    """A geometry; see `ConvNorm`. `padding` is 'SAME', 'VALID', 'CIRCULAR' or pairs."""

    transposed: bool
    batch: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    features_in: int
    features: int
    padding: str | tuple[tuple[int, int], ...]
    dtype: str
    method: str | None
    seed: int


def draw(choose: Callable[[int], int]) -> Draw | None:
    """Draws a random geometry; None if its output would be empty.

    Args:
      choose: count -> a random int from 0 to count - 1.
    """
    one_of = lambda *values: values[choose(len(values))]
    rank = one_of(1, 2, 2, 2, 3)
    ints = lambda low, high: tuple(low + choose(high + 1 - low) for _ in range(rank))
    size, kernel, strides = ints(2, {1: 12, 2: 7, 3: 4}[rank]), ints(1, 3), ints(1, 3)
    dilation, groups = ints(1, 2), one_of(1, 1, 2, 3)
    transposed = one_of(False, False, True)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    pairs = tuple((choose(k), choose(k)) for k in spans)
    padding = pairs if transposed else one_of(pairs, one_of('SAME', 'VALID', 'CIRCULAR'))
    methods = [None, 'reference'] + ['spatial'] * (rank < 3) + ['frequency'] * (rank < 3 and groups == 1)
    found = Draw(
        transposed=transposed,
        batch=one_of(1, 2, 9),
        size=size,
        kernel=kernel,
        strides=strides,
        dilation=dilation,
        groups=groups,
        features_in=groups * (1 + choose(3)),
        features=groups * (1 + choose(3)),
        padding=padding,
        dtype=one_of(*['float32'] * 5, 'bfloat16'),
        method=one_of(*methods),
        seed=choose(2**31),
    )
    return found if all(count > 0 for count in map(len, kept_places(found))) else None


def kept_places(d: Draw) -> list[range | list[int]]:
    """The indices of the full convolution that are kept on each axis, by the definition of a padded convolution."""
    found = []
    for axis, (n, k, s, dilation) in enumerate(zip(d.size, d.kernel, d.strides, d.dilation)):
        span = (k - 1) * dilation + 1
        if d.transposed:
            before, after = d.padding[axis]
            found.append(range(before, (n - 1) * s + span - after))
        elif d.padding == 'CIRCULAR':
            found.append([(start - (span - 1) // 2 + span - 1) % n for start in range(0, n, s)])
        else:
            before, after = _pads(d.padding, axis, n, span, s)
            found.append([start - before + span - 1 for start in range(0, n + before + after - span + 1, s)])
    return found


def _pads(padding, axis, n, span, stride):
    if padding == 'VALID':
        return 0, 0
    if padding == 'SAME':
        total = max((-(-n // stride) - 1) * stride + span - n, 0)
        return total // 2, total - total // 2
    return padding[axis]


class Dense:
    """The layer of a draw as matrices, in float64: `output`, and `gradients` for a cotangent."""

    def __init__(self, d: Draw, x, kernel, affine, bias):
        rank, self.groups = len(d.size), d.groups
        spans = [(k - 1) * g + 1 for k, g in zip(d.kernel, d.dilation)]
        spread = d.strides if d.transposed else (1,) * rank
        circular = d.padding == 'CIRCULAR'
        grid = d.size if circular else tuple((n - 1) * s + k for n, s, k in zip(d.size, spread, spans))
        pixels, taps, places = (list(itertools.product(*map(range, size))) for size in (d.size, d.kernel, grid))
        number = {place: i for i, place in enumerate(places)}
        where = lambda t: [u * g if d.transposed else (k - 1 - u) * g for u, k, g in zip(t, d.kernel, d.dilation)]
        # full[n, p, t]: whether input p and tap t contribute to output n
        self.full = np.zeros((len(places), len(pixels), len(taps)))
        for p, t in itertools.product(range(len(pixels)), range(len(taps))):
            place = tuple(i * s + o for i, s, o in zip(pixels[p], spread, where(taps[t])))
            self.full[number[tuple(a % n for a, n in zip(place, grid)) if circular else place], p, t] = 1
        wave = np.array([[sum(w * a / n for w, a, n in zip(u, v, grid)) for v in places] for u in places])
        fourier = np.exp(-2j * np.pi * wave)
        power = power_spectrum(kernel, grid, d.dilation).reshape(len(places), d.features)
        v = power**-0.5
        rows = [number[place] for place in itertools.product(*kept_places(d))]
        inverse = fourier.conj().T[rows] / len(places)
        self.filter = np.einsum('qw,wo,wn->qno', inverse, v, fourier).real
        self.filter_terms = np.broadcast_to(v.mean(axis=0), self.filter.shape)
        out_size = tuple(map(len, kept_places(d)))
        outputs = list(itertools.product(*map(range, out_size)))
        index = {place: i for i, place in enumerate(outputs)}
        self.shift = np.zeros((len(outputs), len(outputs), len(taps)))
        for q, t in itertools.product(range(len(outputs)), range(len(taps))):
            place = tuple(a + u - (k - 1) // 2 for a, u, k in zip(outputs[q], taps[t], d.kernel))
            if circular:
                place = tuple(a % n for a, n in zip(place, out_size))
            if place in index:
                self.shift[q, index[place], t] += 1
        self.x = x.reshape(d.batch, len(pixels), d.groups, -1)
        self.kernel = kernel.reshape(len(taps), -1, d.groups, d.features // d.groups)
        self.affine, self.shape = affine.reshape(len(taps), d.features), (d.batch, *out_size, d.features)
        self.bias = bias
        self.given = [a.shape for a in (x, kernel, affine, bias)]

    def terms(self):
        """The same sums, of absolute values."""
        found = copy.copy(self)
        found.x, found.kernel, found.affine, found.bias = map(np.abs, (self.x, self.kernel, self.affine, self.bias))
        found.filter = self.filter_terms
        return found

    def filtered(self):
        """[batch, pixels, features]: the convolution, divided by the root of its power spectrum."""
        y = np.einsum('npt,bpgi,tigo->bngo', self.full, self.x, self.kernel, optimize=True)
        return np.einsum('qno,bno->bqo', self.filter, y.reshape(*y.shape[:2], -1))

    def output(self):
        y = np.einsum('qrt,bro,to->bqo', self.shift, self.filtered(), self.affine, optimize=True)
        return (y + self.bias).reshape(self.shape)

    def gradients(self, cotangent):
        """With respect to x, kernel (the preconditioner is a constant), channel-wise kernel and bias."""
        c = cotangent.reshape(self.shape[0], -1, self.shape[-1])
        by_affine = np.einsum('qrt,bro,bqo->to', self.shift, self.filtered(), c, optimize=True)
        by_z = np.einsum('qrt,to,bqo->bro', self.shift, self.affine, c, optimize=True)
        by_y = np.einsum('qno,bqo->bno', self.filter, by_z)
        by_y = by_y.reshape(*by_y.shape[:2], self.groups, -1)
        by_x = np.einsum('npt,bngo,tigo->bpgi', self.full, by_y, self.kernel, optimize=True)
        by_kernel = np.einsum('npt,bpgi,bngo->tigo', self.full, self.x, by_y, optimize=True)
        found = by_x, by_kernel, by_affine, c.sum(axis=(0, 1))
        return [a.reshape(shape) for a, shape in zip(found, self.given)]


def power_spectrum(kernel, grid, dilation):
    """[*grid, features]: sum_i |sum_t kernel[t, i, o] e^{-2 pi i w t / n}|^2, by its definition."""
    *size, _, features = kernel.shape
    taps, places = (list(itertools.product(*map(range, n))) for n in (size, grid))
    wave = np.array([[sum(w * a * g / n for w, a, g, n in zip(u, t, dilation, grid)) for t in taps] for u in places])
    responses = np.einsum('wt,tio->wio', np.exp(-2j * np.pi * wave), kernel.reshape(len(taps), -1, features))
    return (np.abs(responses) ** 2).sum(axis=1).reshape(*grid, features)


def _without_nulls(kernel, d):
    """The kernel with a larger first tap, so that every frequency has at least 1 % of the taps' energy."""
    spread = d.strides if d.transposed else (1,) * len(d.size)
    spans = [(k - 1) * g + 1 for k, g in zip(d.kernel, d.dilation)]
    circular = d.padding == 'CIRCULAR'
    grid = d.size if circular else tuple((n - 1) * s + k for n, s, k in zip(d.size, spread, spans))
    axes = tuple(range(len(grid)))
    while True:
        power = power_spectrum(kernel, grid, d.dilation)
        weak = power.min(axes) < 0.01 * np.square(kernel).sum(axis=(*axes, -2))
        if not weak.any():
            return kernel
        kernel[(0,) * len(grid)] += weak


def errors(d: Draw) -> dict[str, float]:
    """{array: largest error, relative} of a draw: output and the four gradients."""
    rng = np.random.default_rng(d.seed)
    random = lambda *shape: rng.standard_normal(shape)
    kernel = _without_nulls(random(*d.kernel, d.features_in // d.groups, d.features), d)
    x, affine = random(d.batch, *d.size, d.features_in), random(*d.kernel, 1, d.features)
    bias = random(d.features)
    dtype = jnp.dtype(d.dtype)
    rounded = lambda a: a.astype(dtype).astype(np.float64)
    x, kernel, affine, bias = map(rounded, (x, kernel, affine, bias))
    dense = Dense(d, x, kernel, affine, bias)
    cotangent = rounded(random(*dense.shape))
    settings = Settings(
        features=d.features,
        kernel_size=d.kernel,
        strides=d.strides,
        padding=d.padding,
        kernel_dilation=d.dilation,
        feature_group_count=d.groups,
        transposed=d.transposed,
        use_batch_norm=False,
        method=d.method,
        dtype=dtype,
    )
    names = ('kernel', 'affine_kernel', 'affine_bias')

    def output(x, *values):
        state = initial_state(settings, values[0], d.size)
        return apply(settings, dict(zip(names, values)), state, x, use_running_average=False)[0]

    @jax.jit
    def with_gradients(cotangent, *given):
        y, back = jax.vjp(output, *given)
        return y, *back(cotangent)

    given = [x.astype(dtype), *(a.astype(np.float32) for a in (kernel, affine, bias))]
    found = with_gradients(cotangent.astype(dtype), *given)
    expected = [dense.output(), *dense.gradients(cotangent)]
    terms = dense.terms()
    terms = [terms.output(), *terms.gradients(np.abs(cotangent))]
    return {name: _error(*arrays) for name, *arrays in zip(('output', 'x', *names), found, expected, terms)}


def _error(found, expected, terms):
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = max(np.abs(expected).max(), 1e-3 * terms.max())
    return float(np.abs(found - expected).max() / (scale or 1))


def main():
    """Prints the largest errors, and each draw beyond its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--count', type=int, default=5000)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    rng, largest, bad = np.random.default_rng(options.seed), {}, 0
    jax.config.update('jax_disable_most_optimizations', True)  # each draw compiles a program that runs once
    draws = filter(None, (draw(lambda count: int(rng.integers(count))) for _ in itertools.count()))
    for number, one in enumerate(itertools.islice(draws, options.count), 1):
        for name, error in errors(one).items():
            largest[one.dtype, name] = max(error, largest.get((one.dtype, name), 0))
            if not error < TOLERANCES[one.dtype]:
                bad += 1
                print(f'{name} {error:.1e} {one}', flush=True)
        if number % 50 == 0:
            jax.clear_caches()
            print(f'{number} draws, {bad} errors', flush=True)
    for (dtype, name), error in sorted(largest.items()):
        print(f'{dtype:9} {name:14} {error:.1e}')
    print(f'{options.count} draws, {bad} errors beyond {TOLERANCES}')
    raise SystemExit(bool(bad))


if __name__ == '__main__':
    main()
