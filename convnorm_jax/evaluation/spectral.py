r"""Spectra of convolution layers: the gain of each frequency, channel and direction.

A circular stride-1 convolution on a grid (Hf, Wf) multiplies each frequency by a cin x cout matrix.
Its singular values are exactly those of these matrices (Sedghi, Gupta, Long 2019,
arXiv 1805.10408, theorem 6). A grouped one has a matrix for each group, and the singular values of all.
A kernel and its grid may also have 1 or 3 spatial axes; the half grid halves the last one.
ConvNorm (arXiv 2103.00673, section 3) works on the same grid (Hf, Wf) = (H + kh - 1, W + kw - 1), and
multiplies each output channel by a real factor per frequency. These figures are measurements, not
certificates: a zero-padded, cropped or strided layer is not circular.

All arguments and results are NumPy arrays, in float32, or in float64 for a float64 kernel.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from convnorm_jax.errors import UserError

# Entries of the per-frequency matrices held at once: 32 MB in complex64. The SVD copies them.
_CHUNK_ENTRIES = 2**22


@dataclasses.dataclass(frozen=True)
class LayerSpectrum:
    """A layer before and after its normalization, on the half grid of real transforms.

    Attributes:
      name: the layer's name, for a figure or a table.
      size: (Hf, Wf), the grid.
      power_before: float [Hf, Wf//2+1, cout], see `channel_power_spectrum`.
      power_after: float [Hf, Wf//2+1, cout], see `channel_power_spectrum`.
      singular_before: float [Hf*Wf*min(cin, cout)], descending.
      singular_after: float [Hf*Wf*min(cin, cout)], descending.
    """

    name: str
    size: tuple[int, ...]
    power_before: np.ndarray
    power_after: np.ndarray
    singular_before: np.ndarray
    singular_after: np.ndarray


def layer_spectrum(
    name: str, kernel: np.ndarray, size: tuple[int, ...], scale: np.ndarray, groups: int = 1
) -> LayerSpectrum:
    """Spectra of `kernel` alone (before) and with its output channels times `scale` (after).

    Args:
      name: the layer's name.
      kernel: float [kh, kw, cin / groups, cout].
      size: (Hf, Wf), at least (kh, kw).
      scale: real [cout] (BatchNorm: gamma / sqrt(variance)) or [Hf, Wf//2+1, cout] (ConvNorm: V).
      groups: of channels.

    Returns:
      A `LayerSpectrum`.

    Raises:
      ValueError: see `singular_values`.
    """
    power = channel_power_spectrum(kernel, size)
    factor = _checked_scale(scale, size, power.shape[-1], power.dtype)
    return LayerSpectrum(
        name=name,
        size=tuple(size),
        power_before=power,
        power_after=power * factor**2,
        singular_before=singular_values(kernel, size, groups=groups),
        singular_after=singular_values(kernel, size, scale, groups),
    )


def frequency_response(kernel: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    r"""The Fourier transform of the zero-padded kernel, on the half grid.

    .. math::
        \hat a_{io}(u, v) = \sum_{s, t} a_{io}(s, t)\, e^{-2 \pi i (u s / H_f + v t / W_f)}

    A layer's cross-correlation multiplies by the complex conjugate.

    Args:
      kernel: float [kh, kw, cin, cout].
      size: (Hf, Wf), at least (kh, kw).

    Returns:
      complex [Hf, Wf//2+1, cin, cout].

    Raises:
      ValueError: a kernel without three to five axes, or a grid smaller than the kernel.
    """
    kernel = _checked_kernel(kernel, size)
    responses = [response for _, response in _responses(kernel, size)]
    return np.concatenate(responses).reshape(*half_grid(size), *kernel.shape[-2:])


def half_grid(size: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a real transform: the last axis has n // 2 + 1 frequencies."""
    return (*size[:-1], size[-1] // 2 + 1)


def channel_power_spectrum(kernel: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    r"""Power spectrum of each output channel, which ConvNorm normalizes to 1.

    .. math::
        P_o(u, v) = \sum_i |\hat a_{io}(u, v)|^2

    Args:
      kernel: see `frequency_response`.
      size: see `frequency_response`.

    Returns:
      float [Hf, Wf//2+1, cout].

    Raises:
      ValueError: see `frequency_response`.
    """
    kernel = _checked_kernel(kernel, size)
    powers = [(response.real**2 + response.imag**2).sum(axis=1) for _, response in _responses(kernel, size)]
    return np.concatenate(powers).reshape(*half_grid(size), -1)


def singular_values(
    kernel: np.ndarray, size: tuple[int, ...], scale: np.ndarray | None = None, groups: int = 1
) -> np.ndarray:
    """All singular values of the circular stride-1 convolution on a grid, exactly (arXiv 1805.10408, theorem 6).

    >>> identity = np.zeros((3, 3, 1, 1))
    >>> identity[1, 1] = 2
    >>> singular_values(identity, size=(4, 4)).round(6)[:3]
    array([2., 2., 2.])

    Args:
      kernel: float [kh, kw, cin / groups, cout].
      size: (Hf, Wf), at least (kh, kw).
      scale: real factor of each output channel, [cout], or of each frequency too, [Hf, Wf//2+1, cout].
        A phase would not change a singular value: pass the absolute value of a complex factor.
      groups: of channels.

    Returns:
      float [Hf*Wf*min(cin, cout)], descending. The first is the operator norm.

    Raises:
      ValueError: a kernel without three to five axes, a grid smaller than the kernel, a scale of
        another shape, or groups that do not divide cout.
    """
    kernel = _checked_kernel(kernel, size)
    if scale is not None:
        scale = _checked_scale(scale, size, kernel.shape[-1], kernel.dtype)
        scale = np.broadcast_to(scale, (*half_grid(size), kernel.shape[-1]))
        scale = scale.reshape(-1, 1, kernel.shape[-1])
    if groups < 1 or kernel.shape[-1] % groups:
        raise UserError(f'groups={groups}: expected a divisor of the {kernel.shape[-1]} output channels')
    values = []
    for chunk, response in _responses(kernel, size):
        if scale is not None:
            response = response * scale[chunk]
        matrices = response.reshape(*response.shape[:2], groups, -1).swapaxes(1, 2)  # of each group
        values.append(np.linalg.svd(matrices, compute_uv=False).reshape(len(response), -1))
    repeated = np.repeat(np.concatenate(values), _multiplicity(size), axis=0)
    return np.sort(repeated, axis=None)[::-1]


def _responses(kernel: np.ndarray, size: tuple[int, ...]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (frequencies, complex [F, cin, cout]) over the flattened half grid, in chunks.

    Each is a product with the DFT matrix of the few taps, not an FFT of the padded kernel: the
    response of a wide layer on a large image would not fit in memory.
    """
    taps = kernel.reshape(-1, kernel.shape[-2] * kernel.shape[-1])
    phases = _phases(kernel.shape[:-2], size).astype(np.result_type(kernel.dtype, np.complex64))
    step = max(1, _CHUNK_ENTRIES // taps.shape[1])
    for start in range(0, len(phases), step):
        chunk = slice(start, start + step)
        yield chunk, (phases[chunk] @ taps).reshape(-1, *kernel.shape[-2:])


def _phases(kernel_size: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """exp(-2 pi i (u a / Hf + v b / Wf)), complex128 [Hf * (Wf//2+1), kh * kw]."""
    turns = np.zeros((1, 1))
    for frequencies, taps, n in zip(half_grid(size), kernel_size, size):
        axis = np.outer(np.arange(frequencies), np.arange(taps)) / n
        turns = turns[:, None, :, None] + axis[None, :, None, :]
        turns = turns.reshape(turns.shape[0] * frequencies, -1)
    return np.exp(-2j * np.pi * turns)


def _multiplicity(size: tuple[int, ...]) -> np.ndarray:
    """How often each frequency of the flattened half grid occurs in the full grid, int [F].

    The kernel is real, so frequency -w has the conjugate matrix of w and the same singular values.
    Columns 0 and, on an even grid, Wf/2 are their own mirror images.
    """
    *others, last = size
    counts = np.full(last // 2 + 1, 2)
    counts[0] = 1
    if last % 2 == 0:
        counts[-1] = 1
    return np.tile(counts, math.prod(others))


def _checked_kernel(kernel: Any, size: tuple[int, ...]) -> np.ndarray:
    kernel = np.asarray(kernel)
    if kernel.ndim not in (3, 4, 5):
        raise UserError(f'kernel.shape={kernel.shape}: expected [kh, kw, cin, cout], or 1 or 3 spatial axes')
    taps = kernel.shape[:-2]
    if len(size) != len(taps) or any(n < k for n, k in zip(size, taps)):
        axes = {1: '(Wf,)', 2: '(Hf, Wf)', 3: '(Df, Hf, Wf)'}[len(taps)]
        raise UserError(f'size={size} with kernel.shape={kernel.shape}: expected {axes}, at least the kernel')
    return kernel.astype(np.float64 if kernel.dtype == np.float64 else np.float32)


def _checked_scale(scale: Any, size: tuple[int, ...], cout: int, dtype: np.dtype) -> np.ndarray:
    scale = np.asarray(scale)
    choices = ((cout,), (*half_grid(size), cout))
    if scale.shape not in choices:
        raise UserError(f'scale.shape={scale.shape}: expected {choices[0]} or {choices[1]}')
    if np.iscomplexobj(scale):
        raise UserError(f'scale.dtype={scale.dtype}: expected real factors')
    return scale.astype(dtype)
