"""Sheets of small pictures whose pixels are shown exactly: enlarged by whole factors, never resampled."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.textpath import TextPath

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import GREY, STYLE, VERMILLION, new_figure, write

DPI = 200  # as `figure.write` has it
_POINT = DPI / 72
_MARGIN = 16


@dataclasses.dataclass(frozen=True)
class Caption:
    """A line of text at a place of a mosaic.

    Attributes:
      x, y: pixels right of and below the mosaic's upper left corner; may lie outside.
      text: what to write.
      ha: 'left', 'center' or 'right' of the text lies there.
      va: 'baseline', so that texts with and without descenders line up, or 'center'.
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


def pixels(images, name: str, rank: int = 4) -> np.ndarray:
    """uint8 RGB [..., H, W, 3] of pictures.

    Args:
      images: uint8, or floating in [0, 1] (up to a rounding error); C of 1 or 3.
      name: what a message calls them.
      rank: number of axes, the last three of them H, W, C.

    A pixel that is not finite, as a net that diverged makes them, is vermillion.

    Raises:
      ValueError: another shape, dtype or range, or no picture at all.
    """
    images = np.asarray(images)
    if images.ndim != rank or images.shape[-1] not in (1, 3) or not images.size:
        axes = ', '.join('RNHWC'[-rank:])
        raise UserError(f'{name}.shape={images.shape}: expected [{axes}] with C of 1 or 3, and at least one picture')
    if images.dtype != np.uint8:
        images = _from_floats(images, name)
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def _from_floats(images, name):
    # bfloat16 is no kind of NumPy's own, so integers are told by what they are not.
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
    """The whole factor at which the longer of two sides comes closest to `wanted` pixels; at least 1."""
    return max(1, round(wanted / max(size)))


def mosaic(images: np.ndarray, columns: int, *, factor: int, gaps: tuple[int, int]) -> np.ndarray:
    """Pictures in rows of `columns`, on white.

    Args:
      images: uint8 [N, H, W, 3].
      columns: pictures in a row.
      factor: each pixel becomes a square of this side.
      gaps: pixels of white between rows and between columns.

    Returns:
      uint8 [H', W', 3]; picture i's upper left corner is at
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
    """Width of a line of text in the house's font, in pixels of the file."""
    if not text.strip():
        return 0.0
    with matplotlib.rc_context(STYLE):
        # Letters drawn on whole pixels come out up to 3 % wider than their outlines.
        return 1.03 * TextPath((0, 0), text, size=size).get_extents().width * _POINT


def write_sheet(sheet: np.ndarray, captions: Sequence[Caption], path: str | os.PathLike, title: str | None):
    """Writes a mosaic with captions around it and a title above; returns the path.

    The file is as large as the mosaic, its captions and its title need, with a margin. Every
    pixel of the mosaic is one of the file.

    Args:
      sheet: uint8 [H, W, 3].
      captions: see `Caption`.
      path: the PNG to write.
      title: text above all, or None.
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
        figure = new_figure(*((side + 1e-3) / DPI for side in total))  # as an inch is cut down to pixels
        figure.set_layout_engine('none')
        figure.set_dpi(DPI)
        figure.figimage(sheet, x, total[1] - y - height)
        place = lambda a, b: ((x + a) / total[0], 1 - (y + b) / total[1])
        for c in captions:
            figure.text(*place(c.x, c.y), c.text, ha=c.ha, va=c.va, fontsize=c.size, color=c.colour)
        if title:
            figure.text(*place(width / 2, top), title, ha='center', va='top', fontsize=size)
        return pathlib.Path(write(figure, path))
