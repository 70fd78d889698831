"""Accuracy under common corruptions as a table, and an image under each of them."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import GREY, STYLE, column_figure, write
from convnorm_jax.plots.robustness import checked_shares

_DOTS = 105  # dots of the file on a side of an image, approximately, at 200 per inch


def corruption_table(
    table: Mapping[str, Mapping[int, float]], path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """Draws accuracy (%) by corruption and severity as a heat map with the figures in its cells, and means.

    The last column is the mean over the severities, the last row the mean over the corruptions, and their corner
    the mean of all. Dark is high; the shades span 0 to 100 %, so that figures of two nets are comparable.

    Args:
      table: {corruption: {severity: accuracy in [0, 1]}}, the same severities in each.
      path: the PNG to write.
      title: text above the figure.

    Returns:
      The path.

    Raises:
      ValueError: an empty table, severities that differ between corruptions, an accuracy outside [0, 1].
    """
    cells, severities = _with_means(table)
    rows, columns = cells.shape
    with matplotlib.rc_context({**STYLE, 'axes.grid': False}):
        figure = column_figure(0.5 + 0.22 * rows, title)
        axes = figure.subplots()
        # vmax limits the darkest shade, so that black figures stay readable.
        axes.imshow(cells, cmap='Blues', vmin=0, vmax=160, aspect='auto', interpolation='nearest')
        for (row, column), value in np.ndenumerate(cells):
            weight = 'bold' if row == rows - 1 or column == columns - 1 else 'normal'
            axes.text(column, row, f'{value:.1f}', ha='center', va='center', fontsize=8, fontweight=weight)
        axes.axhline(rows - 1.5, color='white', lw=4)
        axes.axvline(columns - 1.5, color='white', lw=4)
        _name_cells(axes, range(columns), [*severities, 'mean'], range(rows), [*table, 'mean'])
        axes.set_xlabel('accuracy (%) at severity')
        return write(figure, path)


def corruption_pictures(
    clean: np.ndarray, images: Mapping[str, Sequence[np.ndarray]], path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """Draws one image under each corruption (rows) at severities 1 to 5, with the clean one first in each row.

    Args:
      clean: uint8 [H, W, C], C of 1 or 3.
      images: {corruption: the image at severities 1 to 5, each of the shape of `clean`}.
      path: the PNG to write.
      title: text above the grid.

    Returns:
      The path.

    Raises:
      ValueError: no corruption, not five images of one, another shape or dtype.
    """
    _check_images(clean, images)
    height, width = np.shape(clean)[:2]
    mosaic, tops, lefts = _mosaic([[clean, *row] for row in images.values()])
    with matplotlib.rc_context({**STYLE, 'axes.grid': False}):
        figure = column_figure(len(images), title)
        axes = figure.subplots()
        axes.imshow(mosaic, aspect='auto', interpolation='antialiased')
        for corner in ((left - 0.5, top - 0.5) for top in tops for left in lefts):
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=GREY, lw=0.4, clip_on=False))
        headings = ['clean', 'severity 1', 2, 3, 4, 5]
        _name_cells(axes, lefts + (width - 1) / 2, headings, tops + (height - 1) / 2, images)
        # A pixel is a whole number of dots wide, so that all pixels have the same size.
        dots = _DOTS / max(height, width)
        figure.dpi = 200
        figure.draw_without_rendering()
        missing = np.array(mosaic.shape[1::-1]) * (round(dots) or dots) - axes.get_window_extent().size
        figure.set_size_inches(figure.get_size_inches() + missing / figure.dpi)
        return write(figure, path)


def _name_cells(axes, lefts, headings, tops, names):
    """Headings above the columns and names left of the rows, without lines."""
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position('top')
    axes.set_xticks(lefts, headings)
    axes.set_yticks(tops, [name.replace('_', ' ') for name in names])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _with_means(table):
    """(accuracies in % with a row and a column of means, severities in order)."""
    if not table:
        raise UserError('table={}: expected accuracies of at least one corruption')
    severities = sorted(next(iter(table.values())))
    for name, row in table.items():
        if sorted(row) != severities or not severities:
            raise UserError(f'table[{name!r}] has severities={sorted(row)}: expected the same in each, {severities}')
    cells = [100 * checked_shares(f'table[{name!r}]', [row[key] for key in severities]) for name, row in table.items()]
    cells = np.vstack([*cells, np.mean(cells, axis=0)])
    return np.column_stack([cells, cells.mean(axis=1)]), severities


def _mosaic(grid):
    """(uint8 [.., .., 3] of all images on white, their first rows in it, their first columns)."""
    height, width = np.shape(grid[0][0])[:2]
    gap = max(1, round(0.06 * max(height, width)))
    # A wider gap separates the clean column.
    tops, lefts = np.arange(len(grid)) * (height + gap), np.arange(len(grid[0])) * (width + gap)
    lefts[1:] += 2 * gap
    mosaic = np.full((tops[-1] + height, lefts[-1] + width, 3), 255, np.uint8)
    for top, row in zip(tops, grid, strict=True):
        for left, image in zip(lefts, row, strict=True):
            mosaic[top : top + height, left : left + width] = image
    return mosaic, tops, lefts


def _check_images(clean, images):
    clean = np.asarray(clean)
    if clean.dtype != np.uint8 or clean.ndim != 3 or clean.shape[2] not in (1, 3):
        raise UserError(f'clean={clean.dtype} {clean.shape}: expected uint8 [H, W, C] with C 1 or 3')
    if not images:
        raise UserError('images={}: expected those of at least one corruption')
    for name, row in images.items():
        found = {f'{image.dtype} {image.shape}' for image in map(np.asarray, row)}
        if len(row) != 5 or found != {f'uint8 {clean.shape}'}:
            found = f'{len(row)} of {" and ".join(sorted(found))}'
            raise UserError(f'images[{name!r}]={found}: expected 5, by severity, of uint8 {clean.shape} as clean')
