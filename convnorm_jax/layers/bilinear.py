"""The constant matrices A, B and C of the bilinear algorithm y = C ((A k) * (B x)), in float64.

`frequency` derives them and computes with them. They depend on the 2-D geometry of a layer only.
"""

import dataclasses
import functools

import numpy as np

from convnorm_jax.layers.geometry import Geometry

# Up to this many grid points one matrix transforms the whole grid; above, two matrices transform columns, then rows.
# Separable transforms are cheaper, but on small grids they take 15 to 40 % more products over the channels: at the
# edges of the half plane they hold both frequencies of a pair w, -w.
DENSE_GRID_POINTS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The constant matrices of a geometry, float64, for R products of each pair of channels and each image.

    Attributes:
      kernel: A, [R, kh * kw].
      analysis: B, as two matrices for the rows, then the columns, or as one matrix for the flattened image.
      synthesis: C, as two matrices for the columns, then the rows, or as one matrix.
      frequency: int32 [R], the index of each product's frequency on the flattened grid.
      power: int32 [Hf * Wf, 2], for each frequency two rows of A: the mean of the squares of their products with the
        kernel is the kernel's power at this frequency.
    """

    kernel: np.ndarray
    analysis: tuple[np.ndarray, ...]
    synthesis: tuple[np.ndarray, ...]
    frequency: np.ndarray
    power: np.ndarray


def _waves(frequencies, places, n):
    """Returns cosines and sines of 2 pi w x / n, float64 [len(frequencies), len(places)]."""
    angle = 2 * np.pi * (np.outer(frequencies, places) % n) / n
    return np.cos(angle), np.sin(angle)


def _grid_waves(frequencies, places, grid):
    """Returns the same in two dimensions: [len(frequencies), len(rows) * len(columns)]."""
    (row_cos, row_sin), (column_cos, column_sin) = (
        _waves(w, x, n) for w, x, n in zip(np.transpose(frequencies), places, grid)
    )
    outer = lambda a, b: (a[:, :, None] * b[:, None, :]).reshape(len(frequencies), -1)
    cosine = outer(row_cos, column_cos) - outer(row_sin, column_sin)
    return cosine, outer(row_sin, column_cos) + outer(row_cos, column_sin)


def _rows_of_three(a, b, c):
    """Interleaves the rows of three matrices: a[0], b[0], c[0], a[1], ..."""
    return np.stack([a, b, c], axis=1).reshape(-1, a.shape[1])


@functools.lru_cache(maxsize=256)
def plan(geometry: Geometry) -> Plan:
    """Returns the constant matrices of a geometry in 2 dimensions."""
    # The indices are int32, so that the program does not depend on whether 64-bit types are enabled.
    return _dense_plan(geometry) if _is_dense(geometry) else _separable_plan(geometry)


def _is_dense(geometry):
    return geometry.grid[0] * geometry.grid[1] <= DENSE_GRID_POINTS


def _kernel_matrix(geometry, frequencies):
    cosine, sine = _grid_waves(frequencies, geometry.taps, geometry.grid)
    return _rows_of_three(cosine, -sine - cosine, cosine - sine)


def _dense_plan(geometry):
    height, width = geometry.grid
    mirror = lambda u, v: (-u % height, -v % width)
    frequencies = [(u, v) for u in range(height) for v in range(width) if (u, v) <= mirror(u, v)]
    alone = np.array([w == mirror(*w) for w in frequencies])
    # A frequency that is its own mirror has a real response, which takes one product instead of three.
    rows = np.stack([np.ones_like(alone), ~alone, ~alone], axis=1).reshape(-1)
    cosine, sine = _grid_waves(frequencies, geometry.inputs, geometry.grid)
    analysis = _rows_of_three(cosine - sine, cosine, -sine)
    cosine, sine = _grid_waves(frequencies, geometry.kept, geometry.grid)
    share = (np.where(alone, 1, 2) / (height * width))[:, None]
    synthesis = _rows_of_three(share * (cosine - sine), -share * sine, -share * cosine)
    first = np.cumsum(rows)[::3] - 1  # each frequency's first row, among the rows that stay
    place = {w: i for i, w in enumerate(frequencies)}
    number = np.array([place[min((u, v), mirror(u, v))] for u in range(height) for v in range(width)])
    paired = ~alone[number]
    return Plan(
        kernel=_kernel_matrix(geometry, frequencies)[rows],
        analysis=(analysis[rows],),
        synthesis=(synthesis[rows].T,),
        frequency=np.repeat(np.array([u * width + v for u, v in frequencies], np.int32), 3)[rows],
        power=np.stack([first[number] + paired, first[number] + 2 * paired], axis=1).astype(np.int32),
    )


def _separable_plan(geometry):
    height, width = geometry.grid
    half = np.arange(height // 2 + 1)
    frequencies = [(u, v) for u in half for v in range(width)]
    cosine, sine = _waves(half, geometry.inputs[0], height)
    by_row = np.stack([cosine, -sine], axis=1).reshape(2 * len(half), -1)
    cosine, sine = _waves(range(width), geometry.inputs[1], width)
    real, imaginary = np.concatenate([cosine, sine], axis=1), np.concatenate([-sine, cosine], axis=1)
    by_column = _rows_of_three(real + imaginary, real, imaginary)
    cosine, sine = (wave.T / width for wave in _waves(range(width), geometry.kept[1], width))
    real, imaginary = (cosine - sine, -sine, -cosine), (cosine + sine, cosine, -sine)
    columns = np.concatenate([np.stack(part, axis=2).reshape(len(cosine), -1) for part in (real, imaginary)])
    cosine, sine = (wave.T for wave in _waves(half, geometry.kept[0], height))
    share = np.where((half == 0) | (2 * half == height), 1, 2) / height
    rows = np.stack([share * cosine, -share * sine], axis=2).reshape(len(cosine), -1)
    u, v = np.divmod(np.arange(height * width), width)
    number = np.where(u < len(half), u * width + v, (height - u) * width + -v % width)
    return Plan(
        kernel=_kernel_matrix(geometry, frequencies),
        analysis=(by_row, by_column),
        synthesis=(columns, rows),
        frequency=np.repeat(np.array([u * width + v for u, v in frequencies], np.int32), 3),
        power=np.stack([3 * number + 1, 3 * number + 2], axis=1).astype(np.int32),
    )


def products(geometry: Geometry) -> int:
    """Returns R, the number of multiplications for each pair of channels and each image."""
    height, width = geometry.grid
    if _is_dense(geometry):
        return len(plan(geometry).frequency)
    return 3 * (height // 2 + 1) * width  # counted without making the matrices, which are large for large images
