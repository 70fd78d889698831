"""The mathematics of ConvNorm (arXiv 2103.00673): pure functions of arrays.

ConvNorm divides every output channel of a convolution by the square root of its
power spectrum. With `y` the full linear convolution, of size (H+k-1, W+k-1),

    output[o] = irfft2(V[o] * rfft2(y[o])),   V[o] = (sum_i |fft2(kernel[i, o])|^2)^(-1/2).

`reference` is that, line by line; here are V and the geometry.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.layers import filters
from convnorm_jax.layers.dtypes import at_least_float32

# The spectrum is floored at this share of the filter's energy (its mean value over
# the grid), so that a spectral null cannot amplify rounding errors without bound.
RELATIVE_FLOOR = 1e-10

# Responses of the kernel held at a time, float32 entries (64 MiB): large pictures take
# the input channels in parts.
MOST_ENTRIES = 2**24

# Statistics and transforms stay in true float32 on accelerators too, where the
# default would be TF32 or bfloat16 products.
_EXACT = jax.lax.Precision.HIGHEST


def grid_size(image_size, kernel_size):
    """Size (Hf, Wf) of the full linear convolution: image + kernel - 1 on each axis."""
    return tuple(n + k - 1 for n, k in zip(image_size, kernel_size))


def reverse_frequencies(x, axes):
    """x(-w) of a spectrum x(w) on the full grid: index 0 stays, the rest is mirrored."""
    return jnp.roll(jnp.flip(x, axes), 1, axes)


def power_spectrum(kernel, grid, dilation=None):
    """Power spectrum of every output channel, summed over the input channels.

    A sum of squares of the taps' Hartley transforms: never negative, and accurate where
    the spectrum is small. The cheaper quadratic form of the taps' Gram matrix
    (Wiener-Khinchin) is not: with three low-pass input channels its error in float32
    was 1.5 % where the spectrum was 2e-6 of its peak, against 7e-6 here.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype; or any other number of spatial axes. Of a grouped convolution cin
        counts one group's inputs.
      grid: (Hf, Wf); a tap beyond it is at its place modulo the grid.
      dilation: from one tap to the next on each axis.

    Returns:
      [Hf, Wf, cout], float32 at least: sum_i |fft2(kernel[..., i, o], grid)|^2 on the full grid.
    """
    *kernel_size, cin, cout = kernel.shape
    taps, points = filters.points(*kernel_size, dilation=dilation), math.prod(grid)
    wide = at_least_float32(kernel.dtype)
    transform = jnp.asarray(filters.hartley_columns(tuple(grid), taps) * np.sqrt(points), wide)

    def energy_of(kernels):  # [kh * kw, channels, cout] -> [points, cout]
        response = jnp.dot(transform, kernels.reshape(len(taps), -1), precision=_EXACT)
        return jnp.square(response).reshape(points, -1, cout).sum(axis=1)

    kernels = kernel.astype(wide).reshape(len(taps), cin, cout)
    parts = _parts(cin, points * cout)
    if parts == 1:
        energy = energy_of(kernels)
    else:
        blocks = kernels.reshape(len(taps), parts, cin // parts, cout).swapaxes(0, 1)
        energy, _ = jax.lax.scan(
            lambda total, block: (total + energy_of(block), None), jnp.zeros((points, cout), wide), blocks
        )
    energy = energy.reshape(*grid, cout)
    return 0.5 * (energy + reverse_frequencies(energy, tuple(range(len(grid)))))


def _parts(channels, entries):
    """In how many equal parts to take the channels, so that none has too many entries."""
    return next(
        parts
        for parts in range(1, channels + 1)
        if channels % parts == 0 and (parts == channels or channels // parts * entries <= MOST_ENTRIES)
    )


def filter_sizes(kernel):
    """(size of every output channel's filter, its largest tap; whether it is all zeros), [cout] each.

    The size of a filter of zeros is 1. Squares of an unscaled kernel could leave float32's range.
    """
    largest = jnp.abs(kernel).max(axis=tuple(range(kernel.ndim - 1))).astype(at_least_float32(kernel.dtype))
    dead = largest < float(np.finfo(np.float32).tiny)
    return jnp.where(dead, 1.0, largest), dead


def preconditioner(kernel, grid, power_fn=power_spectrum):
    """ConvNorm's preconditioner V = (power spectrum)^(-1/2) (section 3.2 of the paper).

    A constant to differentiation, as published. A filter of zeros, for which the
    published code gives infinity, has V = 1. A 1x1 kernel has a flat spectrum, returned
    once: [1, 1, cout].

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      grid: (Hf, Wf), see `grid_size`.
      power_fn: (kernel divided by its `filter_sizes`, grid) -> its power spectrum.

    Returns:
      [Hf, Wf, cout], or [1, 1, cout] for a 1x1 kernel, float32 at least.
    """
    kernel = jax.lax.stop_gradient(kernel)
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    size, dead = filter_sizes(kernel)
    kernel = kernel / _as_last(size, kernel)
    power = jnp.square(kernel).sum(axis=-2) if is_pointwise(kernel) else power_fn(kernel, grid)
    axes = tuple(range(power.ndim - 1))
    floor = jnp.where(dead, 1.0, RELATIVE_FLOOR * power.mean(axis=axes))  # the filter's energy, by Parseval
    floor, size, dead = (_as_last(a, power) for a in (floor, size, dead))
    return jnp.where(dead, 1.0, jax.lax.rsqrt(jnp.maximum(power, floor)) / size)


def _as_last(a, like):
    return a.reshape((1,) * (like.ndim - 1) + a.shape)


def is_pointwise(kernel):
    """Whether every spatial axis of a kernel, [..., cin, cout], has one tap: its spectrum is flat."""
    return set(kernel.shape[:-2]) == {1}


def crop_indices(grid, kernel_size, padding, strides):
    """Rows and columns of the full convolution that the layer keeps.

    Args:
      grid: (Hf, Wf), see `grid_size`.
      kernel_size: (kh, kw).
      padding: ((top, bottom), (left, right)), each between 0 and k-1.
      strides: (sh, sw).

    Returns:
      Two tuples of int. Row r of a convolution with padding p is row r*s + (k-1-p) of
      the full one.
    """
    return tuple(
        tuple(range(k - 1 - before, n - (k - 1 - after), s))
        for n, k, (before, after), s in zip(grid, kernel_size, padding, strides)
    )
