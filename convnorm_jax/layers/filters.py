r"""The filter crop(irfft2(V * rfft2(y))) as products with constant matrices, for GPUs and TPUs.

V is real and even, so no complex number is needed. Cropping and striding drop rows of the last matrix, so dropped
outputs are never computed. The channels stay the last axis and the batch the first, so nothing is transposed.

- On a small grid two matrices transform the flattened grid. The matrix of the discrete Hartley transform is real,
  symmetric and its own inverse, so the filter is :math:`C\,\mathrm{diag}(V)\,C` with
  :math:`C_{\omega n} = (\cos + \sin)(2\pi\omega n / N) / \sqrt N`.
- On a larger grid there are four matrices: rows to half of their frequencies (real and imaginary parts), columns, and
  back.

Products are in the dtype of y and accumulate in float32 at least. The gradient is JAX's own, because the transpose of
the filter has the same form.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.layers.dtypes import at_least_float32
from convnorm_jax.layers.platforms import by_platform

# Up to this many points one matrix transforms the whole grid. Compared with two matrices it moves half of the bytes and
# takes more operations. benchmarks/README.md, "accelerator", has the measurements.
DENSE_POINTS = 400
DENSE_POINTS_FLOAT32 = 100

# Products of float32 stay float32; the default is TF32 on a GPU and bfloat16 on a TPU.
_EXACT = jax.lax.Precision.HIGHEST


def filter_and_crop(y: jax.Array, v: jax.Array, kept: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Returns irfft2(V * rfft2(y)) at the kept rows and columns.

    Args:
      y: [B, Hf, Wf, C], periodic on its own grid, any float dtype.
      v: [Hf, Wf, C], float32 or float64, even: v(w) = v(-w).
      kept: (rows, columns), tuples of int, see `spectral.crop_indices`.

    Returns:
      [B, len(rows), len(columns), C], the dtype of y.
    """
    _, height, width, channels = y.shape
    limit = DENSE_POINTS if y.dtype.itemsize < 4 else DENSE_POINTS_FLOAT32
    form = _dense if height * width <= limit else _separable
    return form(y, v, kept, (height, width, channels))


def _dense(y, v, kept, size):
    height, width, channels = size
    rows, columns = kept
    transform = hartley_columns((height, width), points(height, width))
    inverse = transform[np.add.outer(np.array(rows) * width, columns).reshape(-1)]
    spectrum = _product(transform, y.reshape(-1, height * width, channels), 1)
    spectrum = spectrum * v.reshape(1, -1, channels).astype(y.dtype)
    return _product(inverse, spectrum, 1).reshape(-1, len(rows), len(columns), channels)


def _separable(y, v, kept, size):
    height, width, channels = size
    by_row, by_column, back_column, back_row = _separable_matrices(height, width, *kept)
    half, columns = height // 2 + 1, len(kept[1])
    spectrum = _product(by_row, y, 1).reshape(-1, half, 2 * width, channels)
    spectrum = _product(by_column, spectrum, 2)
    factor = jnp.concatenate([v[:half], v[:half]], axis=1)  # of the real and of the imaginary part
    spectrum = spectrum * factor[None].astype(y.dtype)
    out = _product(back_column, spectrum, 2).reshape(-1, 2 * half, columns, channels)
    return _product(back_row, out, 1)


def _product(matrix, x, axis):
    """Applies `matrix` along an axis of x; accumulates in float32 at least, returns the dtype of x."""
    matrix, forms = jnp.asarray(matrix, x.dtype), (functools.partial(form, axis) for form in (_batched, _free))
    batched, free = forms
    return by_platform(matrix, x, cpu=batched, tpu=free, accelerator=batched)


def _batched(axis, matrix, x):
    # With the matrix broadcast over the batch, cuBLAS reads it with a stride of 0, and nothing is transposed.
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    matrix = jnp.broadcast_to(matrix, (*before, *matrix.shape))
    return _narrow(jnp.matmul, matrix, x.reshape(*before, x.shape[axis], math.prod(after))).reshape(
        *before, matrix.shape[-2], *after
    )


def _free(axis, matrix, x):
    # On a TPU XLA chooses layouts with the batch inside, which a batch of products would rule out.
    return jnp.moveaxis(_narrow(functools.partial(jnp.tensordot, axes=(1, axis)), matrix, x), 0, axis)


def _narrow(product, matrix, x):
    wide = at_least_float32(x.dtype)
    return product(matrix, x, precision=_EXACT, preferred_element_type=wide).astype(x.dtype)


def power_spectrum(kernel: jax.Array, grid: tuple[int, ...], dilation: tuple[int, ...] | None = None) -> jax.Array:
    """Returns the power spectrum by one fused reduction over the input channels, which materializes no transform.

    It computes the same as `spectral.power_spectrum`.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype, or with another number of spatial axes.
      grid: (Hf, Wf).
      dilation: distance from one tap to the next on each axis.

    Returns:
      [Hf, Wf, cout], float32 at least.
    """
    *kernel_size, cin, cout = kernel.shape
    axes = tuple(range(len(grid)))
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    columns = hartley_columns(tuple(grid), points(*kernel_size, dilation=dilation)) * np.sqrt(math.prod(grid))
    columns = jnp.asarray(columns, kernel.dtype)
    taps = zip(columns.T, kernel.reshape(-1, cin, cout))
    response = functools.reduce(jax.lax.add, (column[:, None, None] * tap[None] for column, tap in taps))
    energy = jnp.square(response).sum(axis=1).reshape(*grid, cout)
    return 0.5 * (energy + jnp.roll(jnp.flip(energy, axes), 1, axes))  # |K(w)|^2 from both w and -w


def points(*size: int, dilation: Sequence[int] | None = None) -> tuple[tuple[int, ...], ...]:
    """Returns the positions of a grid's points, `dilation` apart, in the order of the flattened grid."""
    axes = (range(0, n * d, d) for n, d in zip(size, dilation or (1,) * len(size)))
    return tuple(itertools.product(*axes))


@functools.lru_cache(maxsize=256)
def hartley_columns(grid: tuple[int, ...], taps: tuple[tuple[int, ...], ...]) -> np.ndarray:
    r"""Returns columns of the orthonormal Hartley matrix of a grid, float64 [N, len(taps)].

    .. math::
        C_{\omega t} = (\cos + \sin)\Bigl(2\pi \sum_a \omega_a t_a / n_a\Bigr) / \sqrt N

    Args:
      grid: its size n, an int for each axis; N is the number of its points.
      taps: the points t of the grid whose columns are returned, an int for each axis.
    """
    count = math.prod(grid)
    places = zip(np.unravel_index(np.arange(count), grid), np.array(taps).T, grid)
    phase = sum((np.outer(frequency, tap) % n) / n for frequency, tap, n in places)
    return (np.cos(2 * np.pi * phase) + np.sin(2 * np.pi * phase)) / np.sqrt(count)


@functools.lru_cache(maxsize=256)
def _separable_matrices(height, width, rows, columns):
    """Float64 matrices [2 half, H], [2 W, 2 W], [2 kept columns, 2 W], [kept rows, 2 half]; half = height // 2 + 1.

    The transform of a row alternates between the real and imaginary parts of its frequencies; the transform of a column
    has all real parts, then all imaginary parts. So the next product always contracts a contiguous axis.
    """
    frequencies = np.arange(height // 2 + 1)
    cosine, sine = _waves(frequencies, np.arange(height), height)
    by_row = np.stack([cosine, -sine], axis=1).reshape(-1, height)
    cosine, sine = _waves(np.arange(width), np.arange(width), width)
    by_column = np.block([[cosine, sine], [-sine, cosine]])
    cosine, sine = (wave / width for wave in _waves(np.array(columns), np.arange(width), width))
    back_column = np.block([[cosine, -sine], [sine, cosine]])
    share = np.where((frequencies == 0) | (2 * frequencies == height), 1, 2) / height
    cosine, sine = (wave * share for wave in _waves(np.array(rows), frequencies, height))
    back_row = np.stack([cosine, -sine], axis=2).reshape(len(rows), -1)
    return by_row, by_column, back_column, back_row


def _waves(a, b, n):
    """Returns cosines and sines of 2 pi a b / n, float64 [len(a), len(b)]."""
    angle = 2 * np.pi * (np.outer(a, b) % n) / n
    return np.cos(angle), np.sin(angle)
