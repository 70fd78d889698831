"""Sheets of small images whose pixels are shown exactly: enlarged by whole factors, never resampled."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.textpath import TextPath

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import GREY, STYLE, VERMILLION, new_figure, write

DPI = 200  # of `figure.write`
_POINT = DPI / 72
_MARGIN = 16


@dataclasses.dataclass(frozen=True)
class Caption:
    """A line of text at a place of a mosaic.

    Attributes:
      x: pixels right of the mosaic's upper left corner; may lie outside.
      y: pixels below the mosaic's upper left corner; may lie outside.
      text: the text.
      ha: the part of the text at x: 'left', 'center' or 'right'.
      va: the part of the text at y: 'baseline', so that texts with and without descenders line up, or 'center'.
      size: points.
      colour: matplotlib's.
    """

    x: float
    y: float
    text: str
    ha: str = 'center'
    va: str = 'baseline'
    size: float = 9.0
    colour: str = GREY


def pixels(images: Any, name: str, rank: int = 4) -> np.ndarray:
    """Converts images to uint8 RGB [..., H, W, 3].

    A pixel that is not finite, from a net that diverged, becomes vermillion.

    Args:
      images: uint8, or floating in [0, 1] (up to a rounding error); C of 1 or 3.
      name: of the images in an error.
      rank: number of axes, the last three of them H, W, C.

    Raises:
      ValueError: another shape, dtype or range, or no image.
    """
    images = np.asarray(images)
    if images.ndim != rank or images.shape[-1] not in (1, 3) or not images.size:
        axes = ', '.join('RNHWC'[-rank:])
        raise UserError(f'{name}.shape={images.shape}: expected [{axes}] with C of 1 or 3, and at least one image')
    if images.dtype != np.uint8:
        images = _from_floats(images, name)
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def _from_floats(images, name):
    # NumPy has no kind of its own for bfloat16, so the test excludes what is not a float.
    if images.dtype.kind in 'iubcOSU':
        raise UserError(f'{name}.dtype={images.dtype}: expected uint8, or floats in [0, 1]')
    images = images.astype(np.float32)
    broken = ~np.isfinite(images).all(-1)
    images = np.where(broken[..., None], 0, images)
    low, high = images.min(), images.max()
    if low < -0.01 or high > 1.01:
        raise UserError(f'{name}={low:.3g} ... {high:.3g}: expected floats in [0, 1]; give (images + 1) / 2 for tanh')
    rounded = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
    if not broken.any():
        return rounded
    rounded = np.array(np.broadcast_to(rounded, (*rounded.shape[:-1], 3)))
    rounded[broken] = np.round(255 * np.array(to_rgb(VERMILLION)))
    return rounded


def enlargement(size: Sequence[int], wanted: float) -> int:
    """The whole factor at which the longer of two sides is closest to `wanted` pixels; at least 1."""
    return max(1, round(wanted / max(size)))


def mosaic(images: np.ndarray, columns: int, *, factor: int, gaps: tuple[int, int]) -> np.ndarray:
    """Arranges images in rows of `columns`, on white.

    >>> mosaic(np.zeros((5, 8, 8, 3), np.uint8), columns=3, factor=2, gaps=(4, 4)).shape
    (36, 56, 3)

    Args:
      images: uint8 [N, H, W, 3].
      columns: images in a row.
      factor: each pixel becomes a square of this side.
      gaps: pixels of white between rows and between columns.

    Returns:
      uint8 [H', W', 3]; image i's upper left corner is at
      (i // columns * (factor * H + gaps[0]), i % columns * (factor * W + gaps[1])).
    """
    images = images.repeat(factor, 1).repeat(factor, 2)
    count, height, width = images.shape[:3]
    rows = -(-count // columns)
    down, right = height + gaps[0], width + gaps[1]
    sheet = np.full((rows * down - gaps[0], columns * right - gaps[1], 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * down, index % columns * right
        sheet[top : top + height, left : left + width] = image
    return sheet


def text_width(text: str, size: float) -> float:
    """Width of a line of text of a size in points, in pixels of the file."""
    if not text.strip():
        return 0.0
    with matplotlib.rc_context(STYLE):
        # Letters are drawn on whole pixels, which makes them up to 3 % wider than their outlines.
        return 1.03 * TextPath((0, 0), text, size=size).get_extents().width * _POINT


def write_sheet(
    sheet: np.ndarray, captions: Sequence[Caption], path: str | os.PathLike, title: str | None
) -> pathlib.Path:
    """Writes a mosaic with captions around it and a title above; returns the path.

    The file has the size of the mosaic, its captions and its title, with a margin. Each
    pixel of the mosaic is one pixel of the file.

    Args:
      sheet: uint8 [H, W, 3].
      captions: see `Caption`.
      path: the PNG to write.
      title: text above everything, or None.
    """
    height, width = sheet.shape[:2]
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    for caption in captions:
        above, below = {'baseline': (0.8, 0.25), 'center': (0.6, 0.6)}[caption.va]
        wide, high = text_width(caption.text, caption.size), caption.size * _POINT
        x = caption.x - {'left': 0, 'center': 0.5, 'right': 1}[caption.ha] * wide
        left, right = min(left, x), max(right, x + wide)
        top, bottom = min(top, caption.y - above * high), max(bottom, caption.y + below * high)
    size = STYLE['figure.titlesize']
    if title:
        widest = max(text_width(line, size) for line in title.split('\n'))
        overhang = (widest - width) / 2
        left, right = min(left, -overhang), max(right, width + overhang)
        top -= 1.3 * size * _POINT * (title.count('\n') + 1)
    # Whole pixels, or the mosaic would be resampled.
    x, y = (int(np.ceil(_MARGIN - side)) for side in (left, top))
    total = int(np.ceil(x + right + _MARGIN)), int(np.ceil(y + bottom + _MARGIN))
    with matplotlib.rc_context(STYLE):
        figure = new_figure((total[0] + 1e-3) / DPI, (total[1] + 1e-3) / DPI)  # matplotlib truncates to pixels
        figure.set_layout_engine('none')
        figure.set_dpi(DPI)
        figure.figimage(sheet, x, total[1] - y - height)
        place = lambda a, b: ((x + a) / total[0], 1 - (y + b) / total[1])
        for c in captions:
            figure.text(*place(c.x, c.y), c.text, ha=c.ha, va=c.va, fontsize=c.size, color=c.colour)
        if title:
            figure.text(*place(width / 2, top), title, ha='center', va='top', fontsize=size)
        return pathlib.Path(write(figure, path))
