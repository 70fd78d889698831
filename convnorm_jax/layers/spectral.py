r"""The mathematics of ConvNorm's preconditioner (arXiv 2103.00673), as pure functions of arrays.

ConvNorm divides every output channel of a convolution by the square root of its power spectrum. With y the full linear
convolution, of size (H+k-1, W+k-1),

.. math::
    z_o = F^{-1}\bigl(V_o\, F y_o\bigr), \qquad V_o(\omega) = \Bigl(\sum_i |F k_{io}(\omega)|^2\Bigr)^{-1/2}.

`reference` computes this line by line. This module computes V.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.layers import filters
from convnorm_jax.layers.dtypes import at_least_float32

# The spectrum is floored at this share of the filter's energy (its mean over the grid), so that a zero of the spectrum
# cannot amplify rounding errors without bound.
RELATIVE_FLOOR = 1e-10

# The largest number of float32 entries in a transform of the kernel (64 MiB). Large images take the input channels in
# parts.
MOST_ENTRIES = 2**24

# Products of float32 stay float32; the default on accelerators is TF32 or bfloat16.
_EXACT = jax.lax.Precision.HIGHEST


def grid_size(image_size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Returns the size (Hf, Wf) of the full linear convolution, image + kernel - 1 on each axis.

    Example:
      >>> grid_size((32, 32), (3, 3))
      (34, 34)
    """
    return tuple(n + k - 1 for n, k in zip(image_size, kernel_size))


def reverse_frequencies(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Returns x(-w) for a spectrum x(w) on the full grid: index 0 stays, the others are mirrored."""
    return jnp.roll(jnp.flip(x, axes), 1, axes)


def power_spectrum(kernel: jax.Array, grid: Sequence[int], dilation: Sequence[int] | None = None) -> jax.Array:
    r"""Returns the power spectrum of every output channel, summed over the input channels.

    .. math::
        P_o(\omega) = \sum_i |F k_{io}(\omega)|^2 = \tfrac12 \bigl(E_o(\omega) + E_o(-\omega)\bigr), \qquad
        E_o(\omega) = \sum_i \Bigl(\sum_t (\cos + \sin)(\omega t)\, k_{io}(t)\Bigr)^2

    A sum of squares of Hartley transforms is never negative, and accurate where the spectrum is small. The cheaper
    quadratic form of the taps' Gram matrix (Wiener-Khinchin) is not; benchmarks/README.md, "The power spectrum", has
    the errors.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype, or with another number of spatial axes. In a grouped convolution cin
        is the number of one group's input channels.
      grid: (Hf, Wf). A tap beyond it counts at its position modulo the grid.
      dilation: distance from one tap to the next on each axis.

    Returns:
      [Hf, Wf, cout], float32 at least.

    Example:
      >>> power_spectrum(jnp.ones((1, 1, 4, 2)), (8, 8)).shape
      (8, 8, 2)
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
    """The number of equal parts in which to take the channels, so that none has too many entries."""
    return next(
        parts
        for parts in range(1, channels + 1)
        if channels % parts == 0 and (parts == channels or channels // parts * entries <= MOST_ENTRIES)
    )


def filter_sizes(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest absolute tap of every output channel's filter, and whether all its taps are zero.

    Filters are divided by this size before they are squared, which could leave the range of float32.

    Args:
      kernel: `[*kernel, cin, cout]`, any float dtype.

    Returns:
      The sizes, [cout], float32 at least, 1 for a filter of zeros; and bool [cout].
    """
    largest = jnp.abs(kernel).max(axis=tuple(range(kernel.ndim - 1))).astype(at_least_float32(kernel.dtype))
    dead = largest < float(np.finfo(np.float32).tiny)
    return jnp.where(dead, 1.0, largest), dead


def preconditioner(
    kernel: jax.Array,
    grid: Sequence[int],
    power_of: Callable[[jax.Array, Sequence[int]], jax.Array] = power_spectrum,
) -> jax.Array:
    r"""Returns ConvNorm's preconditioner V, the inverse square root of the power spectrum (section 3.2 of the paper).

    .. math::
        V_o(\omega) = \Bigl(\sum_i |F k_{io}(\omega)|^2\Bigr)^{-1/2}

    It is a constant to differentiation, as published. The spectrum is at least 1e-10 of its mean. A filter of zeros,
    for which the published code gives infinity, has V = 1. The spectrum of a 1x1 kernel is flat, and V has one value
    for each channel.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      grid: (Hf, Wf), see `grid_size`.
      power_of: `(kernel, grid)` -> the power spectrum; the kernel it is given is divided by its `filter_sizes`.

    Returns:
      [Hf, Wf, cout], or [1, 1, cout] for a 1x1 kernel, float32 at least.

    Example:
      >>> preconditioner(jnp.ones((3, 3, 4, 2)), grid_size((6, 6), (3, 3))).shape
      (8, 8, 2)
    """
    kernel = jax.lax.stop_gradient(kernel)
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    size, dead = filter_sizes(kernel)
    kernel = kernel / _as_last(size, kernel)
    power = jnp.square(kernel).sum(axis=-2) if is_pointwise(kernel) else power_of(kernel, grid)
    axes = tuple(range(power.ndim - 1))
    floor = jnp.where(dead, 1.0, RELATIVE_FLOOR * power.mean(axis=axes))  # the filter's energy, by Parseval
    floor, size, dead = (_as_last(a, power) for a in (floor, size, dead))
    return jnp.where(dead, 1.0, jax.lax.rsqrt(jnp.maximum(power, floor)) / size)


def _as_last(a, like):
    return a.reshape((1,) * (like.ndim - 1) + a.shape)


def is_pointwise(kernel: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Returns whether every spatial axis of a kernel, [..., cin, cout], has one tap, so that its spectrum is flat."""
    return set(kernel.shape[:-2]) == {1}


def crop_indices(
    grid: Sequence[int], kernel_size: Sequence[int], padding: Sequence[Sequence[int]], strides: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Returns the rows and columns of the full convolution that the layer keeps.

    Row r of a convolution with padding p is row r*s + (k-1-p) of the full one.

    Args:
      grid: (Hf, Wf), see `grid_size`.
      kernel_size: (kh, kw).
      padding: ((top, bottom), (left, right)), each between 0 and k-1.
      strides: (sh, sw).

    Returns:
      For each axis a tuple of int.

    Example:
      >>> crop_indices((6, 6), (3, 3), ((1, 1), (0, 0)), (2, 1))
      ((1, 3), (2, 3))
    """
    return tuple(
        tuple(range(k - 1 - before, n - (k - 1 - after), s))
        for n, k, (before, after), s in zip(grid, kernel_size, padding, strides)
    )
