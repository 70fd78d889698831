"""Spectra of convolution layers: how evenly a layer treats frequencies, channels and directions.

A circular stride-1 convolution on a grid (Hf, Wf) is a product with one cin x cout matrix per
frequency, so its singular values are those of these matrices, exactly (Sedghi, Gupta, Long 2019,
arXiv 1805.10408, theorem 6). ConvNorm (arXiv 2103.00673, section 3) works on that same grid
(Hf, Wf) = (H + kh - 1, W + kw - 1), and multiplies each output channel by a real factor per
frequency. These figures are measurements, not certificates: a zero-padded, cropped or strided
layer is not circular.

Everything here is NumPy in, NumPy out, in float32, or float64 for a float64 kernel.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from convnorm_jax.errors import UserError

# Entries of the per-frequency matrices held at once: 32 MB in complex64. The SVD copies them.
_CHUNK_ENTRIES = 2**22


@dataclasses.dataclass(frozen=True)
class LayerSpectrum:
    """A layer before and after its normalization, on the half grid of real transforms.

    Attributes:
      name: the layer's name, for a picture or a table.
      size: (Hf, Wf), the grid.
      power_before, power_after: float [Hf, Wf//2+1, cout], see `channel_power_spectrum`.
      singular_before, singular_after: float [Hf*Wf*min(cin, cout)], descending.
    """

    name: str
    size: tuple[int, int]
    power_before: np.ndarray
    power_after: np.ndarray
    singular_before: np.ndarray
    singular_after: np.ndarray


def layer_spectrum(name: str, kernel: np.ndarray, size: tuple[int, int], scale: np.ndarray) -> LayerSpectrum:
    """Spectra of `kernel` alone (before) and with its output channels times `scale` (after).

    Args:
      name: the layer's name.
      kernel: float [kh, kw, cin, cout].
      size: (Hf, Wf), at least (kh, kw).
      scale: real [cout] (BatchNorm: gamma / sqrt(variance)) or [Hf, Wf//2+1, cout] (ConvNorm: V).

    Raises:
      ValueError: as `singular_values`.
    """
    power = channel_power_spectrum(kernel, size)
    factor = _checked_scale(scale, size, power.shape[-1], power.dtype)
    return LayerSpectrum(
        name=name,
        size=tuple(size),
        power_before=power,
        power_after=power * factor**2,
        singular_before=singular_values(kernel, size),
        singular_after=singular_values(kernel, size, scale),
    )


def frequency_response(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """rfft2 of the zero-padded kernel. A layer's cross-correlation multiplies by its conjugate.

    Args:
      kernel: float [kh, kw, cin, cout].
      size: (Hf, Wf), at least (kh, kw).

    Returns:
      complex [Hf, Wf//2+1, cin, cout].

    Raises:
      ValueError: a kernel without four axes, or a grid smaller than the kernel.
    """
    kernel = _checked_kernel(kernel, size)
    responses = [response for _, response in _responses(kernel, size)]
    return np.concatenate(responses).reshape(size[0], size[1] // 2 + 1, *kernel.shape[2:])


def channel_power_spectrum(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sum over input channels of |frequency response|^2: what ConvNorm brings to 1.

    Args and raises as `frequency_response`.

    Returns:
      float [Hf, Wf//2+1, cout].
    """
    kernel = _checked_kernel(kernel, size)
    powers = [(response.real**2 + response.imag**2).sum(axis=1) for _, response in _responses(kernel, size)]
    return np.concatenate(powers).reshape(size[0], size[1] // 2 + 1, -1)


def singular_values(kernel: np.ndarray, size: tuple[int, int], scale: np.ndarray | None = None) -> np.ndarray:
    """All singular values of the circular stride-1 convolution on a grid, exactly.

    Args:
      kernel: float [kh, kw, cin, cout].
      size: (Hf, Wf), at least (kh, kw).
      scale: real factor of each output channel, [cout] or, per frequency, [Hf, Wf//2+1, cout]
        (a phase would not change a singular value: of a complex factor, pass the absolute value).

    Returns:
      float [Hf*Wf*min(cin, cout)], descending. The first is the operator norm.

    Raises:
      ValueError: a kernel without four axes, a grid smaller than the kernel, or a scale of
        another shape.
    """
    kernel = _checked_kernel(kernel, size)
    if scale is not None:
        scale = _checked_scale(scale, size, kernel.shape[-1], kernel.dtype)
        scale = np.broadcast_to(scale, (size[0], size[1] // 2 + 1, kernel.shape[-1]))
        scale = scale.reshape(-1, 1, kernel.shape[-1])
    values = []
    for chunk, response in _responses(kernel, size):
        if scale is not None:
            response = response * scale[chunk]
        values.append(np.linalg.svd(response, compute_uv=False))
    repeated = np.repeat(np.concatenate(values), _multiplicity(size), axis=0)
    return np.sort(repeated, axis=None)[::-1]


def _responses(kernel, size) -> Iterator[tuple[slice, np.ndarray]]:
    """(frequencies, complex [F, cin, cout]) over the flattened half grid, a few at a time.

    A product with the DFT matrix of the few taps, not an FFT of the padded kernel: the whole
    response of a wide layer on a large picture would not fit in memory.
    """
    taps = kernel.reshape(-1, kernel.shape[2] * kernel.shape[3])
    phases = _phases(kernel.shape[:2], size).astype(np.result_type(kernel.dtype, np.complex64))
    step = max(1, _CHUNK_ENTRIES // taps.shape[1])
    for start in range(0, len(phases), step):
        chunk = slice(start, start + step)
        yield chunk, (phases[chunk] @ taps).reshape(-1, *kernel.shape[2:])


def _phases(kernel_size, size):
    """exp(-2 pi i (u a / Hf + v b / Wf)), complex128 [Hf * (Wf//2+1), kh * kw]."""
    rows = np.outer(np.arange(size[0]), np.arange(kernel_size[0])) / size[0]
    columns = np.outer(np.arange(size[1] // 2 + 1), np.arange(kernel_size[1])) / size[1]
    turns = rows[:, None, :, None] + columns[None, :, None, :]
    return np.exp(-2j * np.pi * turns).reshape(-1, kernel_size[0] * kernel_size[1])


def _multiplicity(size):
    """How often each frequency of the flattened half grid occurs in the full grid, int [F].

    The kernel is real, so frequency -w has the conjugate matrix of w and the same singular values.
    Columns 0 and, on an even grid, Wf/2 are their own mirror images.
    """
    counts = np.full(size[1] // 2 + 1, 2)
    counts[0] = 1
    if size[1] % 2 == 0:
        counts[-1] = 1
    return np.tile(counts, size[0])


def _checked_kernel(kernel, size):
    kernel = np.asarray(kernel)
    if kernel.ndim != 4:
        raise UserError(f'kernel.shape={kernel.shape}: expected [kh, kw, cin, cout]')
    if len(size) != 2 or size[0] < kernel.shape[0] or size[1] < kernel.shape[1]:
        raise UserError(f'size={size}: expected (Hf, Wf), at least the kernel, {kernel.shape[:2]}')
    return kernel.astype(np.float64 if kernel.dtype == np.float64 else np.float32)


def _checked_scale(scale, size, cout, dtype):
    scale = np.asarray(scale)
    choices = ((cout,), (size[0], size[1] // 2 + 1, cout))
    if scale.shape not in choices:
        raise UserError(f'scale.shape={scale.shape}: expected {choices[0]} or {choices[1]}')
    if np.iscomplexobj(scale):
        raise UserError(f'scale.dtype={scale.dtype}: expected real factors')
    return scale.astype(dtype)
