"""The mathematics of ConvNorm (arXiv 2103.00673): pure functions of arrays.

ConvNorm divides every output channel of a convolution by the square root of its
power spectrum. With `y` the full linear convolution, of size (H+k-1, W+k-1),

    output[o] = irfft2(V[o] * rfft2(y[o])),   V[o] = (sum_i |fft2(kernel[i, o])|^2)^(-1/2).

`V` is real and even, V(w) = V(-w), so no complex number is needed: with the discrete
Hartley transform, whose matrix C[w, n] = (cos + sin)(2 pi w n / N) / sqrt(N) is real,
symmetric and its own inverse, the filter is C diag(V) C. On the grids of a ConvNet
(6 to 34) this is a pair of small matrix products, and the crop and the stride that
follow are rows left out of the second matrix: what is thrown away is never computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Up to this many grid points one dense product over the flattened grid is cheaper
# than two separable ones (2-core CPU, batch 32, forward, ms, dense / separable:
# 6x6 0.9 / 1.9, 10x10 3.1 / 2.4, 18x18 5.4 / 3.8).
DENSE_GRID_POINTS = 64

# The spectrum is floored at this share of the filter's energy (its mean value over
# the grid), so that a spectral null can not amplify rounding errors without bound.
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


@functools.lru_cache(maxsize=256)
def _hartley_matrix(n):
    """Orthonormal discrete Hartley matrix, float64 [n, n]."""
    angle = 2 * np.pi * (np.outer(np.arange(n), np.arange(n)) % n) / n
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(n)


@functools.lru_cache(maxsize=256)
def _hartley_columns(grid, taps):
    """Columns of the orthonormal 2-D Hartley matrix, float64 [N, len(taps)].

    N = Hf * Wf counts the flattened grid; taps are the wanted points, (row, column) pairs.
    """
    height, width = grid
    rows, columns = np.divmod(np.arange(height * width), width)
    tap_rows, tap_columns = np.array(taps).T
    phase = (np.outer(rows, tap_rows) % height) / height + (np.outer(columns, tap_columns) % width) / width
    return (np.cos(2 * np.pi * phase) + np.sin(2 * np.pi * phase)) / np.sqrt(height * width)


def _points(height, width):
    return tuple((row, column) for row in range(height) for column in range(width))


def reverse_frequencies(x, axes):
    """x(-w) of a spectrum x(w) on the full grid: index 0 stays, the rest is mirrored."""
    return jnp.roll(jnp.flip(x, axes), 1, axes)


def power_spectrum(kernel, grid):
    """Power spectrum of every output channel, summed over the input channels.

    A sum of squares of the taps' Hartley transforms: never negative, and accurate where
    the spectrum is small. The cheaper quadratic form of the taps' Gram matrix
    (Wiener-Khinchin) is not: with three low-pass input channels its error in float32
    was 1.5 % where the spectrum was 2e-6 of its peak, against 7e-6 here.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      grid: (Hf, Wf), at least the kernel's size.

    Returns:
      float32 [Hf, Wf, cout]: sum_i |fft2(kernel[..., i, o], grid)|^2 on the full grid.
    """
    kh, kw, cin, cout = kernel.shape
    height, width = grid
    points = height * width
    transform = jnp.asarray(_hartley_columns(tuple(grid), _points(kh, kw)) * np.sqrt(points), jnp.float32)

    def energy_of(kernels):  # [kh * kw, channels, cout] -> [points, cout]
        response = jnp.dot(transform, kernels.reshape(kh * kw, -1), precision=_EXACT)
        return jnp.square(response).reshape(points, -1, cout).sum(axis=1)

    kernels = kernel.astype(jnp.float32).reshape(kh * kw, cin, cout)
    parts = _parts(cin, points * cout)
    if parts == 1:
        energy = energy_of(kernels)
    else:
        blocks = kernels.reshape(kh * kw, parts, cin // parts, cout).swapaxes(0, 1)
        energy, _ = jax.lax.scan(
            lambda total, block: (total + energy_of(block), None), jnp.zeros((points, cout), jnp.float32), blocks
        )
    energy = energy.reshape(height, width, cout)
    return 0.5 * (energy + reverse_frequencies(energy, (0, 1)))


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
    largest = jnp.abs(kernel).max(axis=(0, 1, 2))
    dead = largest < np.finfo(np.float32).tiny
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
      float32 [Hf, Wf, cout], or [1, 1, cout] for a 1x1 kernel.
    """
    kernel = jax.lax.stop_gradient(kernel).astype(jnp.float32)
    size, dead = filter_sizes(kernel)
    kernel = kernel / size
    flat = kernel.shape[:2] == (1, 1)
    power = jnp.square(kernel).sum(axis=2) if flat else power_fn(kernel, grid)
    floor = jnp.where(dead, 1.0, RELATIVE_FLOOR * power.mean(axis=(0, 1)))  # the filter's energy, by Parseval
    return jnp.where(dead, 1.0, jax.lax.rsqrt(jnp.maximum(power, floor)) / size)


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


def full_convolution(x, kernel, precision=None):
    """Cross-correlation with zero padding k-1 on each side, [B, H+kh-1, W+kw-1, cout].

    Half of the padding is by hand, half by the convolution, which then is an ordinary
    'SAME' one. XLA:CPU differentiates only that well (32x32, 64 channels, batch 32,
    forward and both gradients, ms: all by the convolution 899, all by hand 80, so 38, a
    plain convolution 35).
    """
    inside = [(k - 1) // 2 for k in kernel.shape[:2]]
    by_hand = [(k - 1 - p,) * 2 for k, p in zip(kernel.shape[:2], inside)]
    return jax.lax.conv_general_dilated(
        jnp.pad(x, ((0, 0), *by_hand, (0, 0))),
        kernel,
        (1, 1),
        [(p, p) for p in inside],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision,
    )


def filter_and_crop(y, v, kept):
    """irfft2(V * rfft2(y)) at the kept rows and columns, by Hartley transforms.

    Args:
      y: [B, Hf, Wf, C], periodic on its own grid, any float dtype.
      v: float32 [Hf, Wf, C], even: v(w) = v(-w).
      kept: (rows, columns), tuples of int, see `crop_indices`.

    Returns:
      [B, len(rows), len(columns), C], the dtype of y. Products accumulate in float32
      whatever that dtype is.
    """
    if y.shape[1] * y.shape[2] <= DENSE_GRID_POINTS:
        return _filter_dense(y, v, kept)
    return _filter_separable(y, v, kept)


def _product(equation, matrix, x, dtype):
    return jnp.einsum(
        equation,
        jnp.asarray(matrix, dtype),
        x.astype(dtype),
        precision=_EXACT,
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )


def _filter_dense(y, v, kept):
    batch, height, width, channels = y.shape
    rows, columns = kept
    forward = _hartley_columns((height, width), _points(height, width))
    inverse = forward[np.add.outer(np.array(rows) * width, columns).reshape(-1)]
    # [w, batch, channel] in between: both products are then plain matrix products.
    spectrum = _product('wn,bnc->wbc', forward, y.reshape(batch, height * width, channels), y.dtype)
    spectrum = spectrum * v.reshape(height * width, 1, channels)
    out = _product('mw,wbc->bmc', inverse, spectrum, y.dtype)
    return out.reshape(batch, len(rows), len(columns), channels).astype(y.dtype)


def _filter_separable(y, v, kept):
    _, height, width, _ = y.shape
    rows, columns = kept
    by_row, by_column = _hartley_matrix(height), _hartley_matrix(width)
    spectrum = _product('wn,bmnc->bmwc', by_column, y, y.dtype)
    spectrum = _product('vm,bmwc->bvwc', by_row, spectrum, y.dtype)
    # V is even in both frequencies together, not in each: its part odd in each couples
    # w with -w (cas(a)cas(b) filtered is v_even cas(a)cas(b) - v_odd cas(-a)cas(-b)).
    mirrored = reverse_frequencies(v, 1)
    v_even, v_odd = 0.5 * (v + mirrored), 0.5 * (v - mirrored)
    spectrum = v_even * spectrum - v_odd * reverse_frequencies(spectrum, (1, 2))
    out = _product('mv,bvwc->bmwc', by_row[np.array(rows)], spectrum, y.dtype)
    return _product('nw,bmwc->bmnc', by_column[np.array(columns)], out, y.dtype).astype(y.dtype)


@jax.custom_vjp
def channelwise_convolution(x, kernel):
    """Every channel convolved with its own filter at stride 1, output as large as x.

    Zero padding ((k-1)//2, k//2). k*k shifted multiply-adds, which XLA fuses into one
    pass; on the CPU `feature_group_count` was slower. The gradient is written by hand: it
    is a convolution again, and XLA:CPU's own version of it made the whole layer 1.3 to 2.4
    times slower. Reverse mode only, to any order:
    `jax.jacrev(jax.grad(f))` instead of `jax.hessian(f)`.

    Args:
      x: [B, H, W, C]. kernel: [kh, kw, C].

    Returns:
      [B, H, W, C], the dtype of x.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)  # k*k terms would each be rounded
    taps = kernel.astype(wide).reshape(-1, kernel.shape[-1])
    # `jax.lax`, here and below: jax.numpy's operators take five times as long to trace.
    products = [
        jax.lax.mul(jax.lax.convert_element_type(part, wide), jax.lax.broadcast_in_dim(tap, x.shape, (3,)))
        for part, tap in zip(_shifted(x, kernel.shape[:2]), taps)
    ]
    return functools.reduce(jax.lax.add, products).astype(x.dtype)


def _shifted(x, kernel_size):
    """The k*k views of x that the taps of a channel-wise convolution multiply, in their order."""
    (kh, kw), (batch, height, width, channels) = kernel_size, x.shape
    edges = [(0, 0, 0), ((kh - 1) // 2, kh // 2, 0), ((kw - 1) // 2, kw // 2, 0), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
    return [
        jax.lax.slice(x, (0, a, b, 0), (batch, a + height, b + width, channels)) for a in range(kh) for b in range(kw)
    ]


def _channelwise_forward(x, kernel):
    return channelwise_convolution(x, kernel), (x, kernel)


def _channelwise_backward(saved, cotangent):
    x, kernel = saved
    # Barriers: or XLA:CPU computes the cotangent anew for each tap that reads it.
    cotangent = jax.lax.optimization_barrier(cotangent)
    by_x = jax.lax.optimization_barrier(_channelwise_transpose(cotangent, kernel))
    return by_x, _tap_products(x, cotangent, kernel.shape[:2]).astype(kernel.dtype)


def _channelwise_transpose(y, kernel):
    """The adjoint of x -> channelwise_convolution(x, kernel): the same with the flipped filter."""
    # An even filter reaches further right than left, its flipped one must reach further left.
    even = [(0, 1 - k % 2) for k in kernel.shape[:2]]
    return channelwise_convolution(y, jnp.pad(kernel[::-1, ::-1], (*even, (0, 0))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tap_products(x, y, kernel_size):
    """Sums over batch and picture of y times each shifted x: [kh, kw, C], the gradient by the kernel."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = y.astype(wide)
    products = [jax.lax.mul(jax.lax.convert_element_type(part, wide), y) for part in _shifted(x, kernel_size)]
    zeros = [jnp.zeros((), wide)] * len(products)
    # One pass for all taps; first over the rows only, which keeps float32's sums short. Not over the batch:
    # a batch that is cut over devices would be gathered for it (XLA has no all-reduce of nine sums at once).
    sums = jax.lax.reduce(products, zeros, lambda a, b: [jax.lax.add(p, q) for p, q in zip(a, b)], (2,))
    return jnp.stack(jax.lax.optimization_barrier(sums)).sum((1, 2)).reshape(*kernel_size, -1)


def _tap_products_forward(x, y, kernel_size):
    return _tap_products(x, y, kernel_size), (x, y)


def _tap_products_backward(kernel_size, saved, cotangent):
    x, y = saved
    return _channelwise_transpose(y, cotangent), channelwise_convolution(x, cotangent).astype(y.dtype)


channelwise_convolution.defvjp(_channelwise_forward, _channelwise_backward)
_tap_products.defvjp(_tap_products_forward, _tap_products_backward)
