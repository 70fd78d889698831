"""Images of a GAN, and the curves of its training."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILLION, new_figure, write
from convnorm_jax.plots.images import Caption, enlargement, mosaic, pixels, text_width, write_sheet

MAX_STEPS = 8  # rows of `sample_progress`
_PROGRESS_COLUMNS = 10
_SIDE_BY_SIDE = 64  # images on each side of `real_and_fake`
_IMAGE = 128  # pixels of the file that a small image is enlarged to: 0.64 inches
_GAP = 6


def sample_grid(
    images: np.ndarray,
    path: str | os.PathLike,
    *,
    columns: int = 10,
    title: str | None = None,
    labels: Sequence | None = None,
) -> pathlib.Path:
    """Draws images in rows, each pixel as a square.

    Args:
      images: [N, H, W, C], floats in [0, 1] or uint8, C of 1 or 3.
      path: the PNG to write.
      columns: images in a row.
      title: text above the grid.
      labels: N names or numbers, written below the images.

    Returns:
      The path.

    Raises:
      ValueError: images of another shape, dtype or range; columns below 1; not N labels.
    """
    images = pixels(images, 'images')
    if columns < 1:
        raise UserError(f'columns={columns}: expected at least 1')
    if labels is not None and len(labels) != len(images):
        raise UserError(f'len(labels)={len(labels)}: expected {len(images)}, one for each image')
    columns, row_gap = min(columns, len(images)), _GAP
    captions: list[Caption] = []
    factor = enlargement(images.shape[1:3], _IMAGE)
    height, width = (factor * side for side in images.shape[1:3])
    if labels is not None:
        names = [str(label) for label in labels]
        size = _fitting(names, width, 8.0)
        row_gap = 40
        for index, name in enumerate(names):
            row, column = divmod(index, columns)
            x, y = column * (width + _GAP) + width / 2, row * (height + row_gap) + height + 24
            captions.append(Caption(x, y, name, size=size))
    sheet = mosaic(images, columns, factor=factor, gaps=(row_gap, _GAP))
    return write_sheet(sheet, captions, path, title)


def sample_progress(
    progress: Sequence[tuple[int, np.ndarray]], path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """Draws the images of the same latents at several steps of the training: a row for each step.

    Args:
      progress: (step, images [N, H, W, C] as in `sample_grid`), of one shape; the first ten
        images are shown. Of more than `MAX_STEPS` steps the first, the last, and others
        evenly between them are shown.
      path: the PNG to write.
      title: text above the rows.

    Returns:
      The path.

    Raises:
      ValueError: no step, or images of another or of unequal shapes, dtype or range.
    """
    if not len(progress):
        raise UserError('progress=[]: expected at least one (step, images)')
    progress = sorted(progress, key=lambda pair: pair[0])
    chosen = np.unique(np.linspace(0, len(progress) - 1, min(len(progress), MAX_STEPS)).round().astype(int))
    rows = [(int(step), pixels(images, f'images at step {step}')) for step, images in (progress[i] for i in chosen)]
    shape = rows[0][1].shape
    for step, images in rows:
        if images.shape != shape:
            raise UserError(f'images at step {step}: shape {images.shape}, expected {shape} as at step {rows[0][0]}')
    columns = min(shape[0], _PROGRESS_COLUMNS)
    factor = enlargement(shape[1:3], _IMAGE)
    height = factor * shape[1]
    sheet = mosaic(np.concatenate([images[:columns] for _, images in rows]), columns, factor=factor, gaps=(_GAP, _GAP))
    captions = [
        Caption(-14, row * (height + _GAP) + height / 2, f'{step:,}'.replace(',', '\u2009'), ha='right', va='center')
        for row, (step, _) in enumerate(rows)
    ]
    captions.append(Caption(-14, -10, 'step', ha='right'))
    return write_sheet(sheet, captions, path, title)


def interpolation_grid(rows: np.ndarray, path: str | os.PathLike, title: str | None = None) -> pathlib.Path:
    """Draws the generator's images on the way from one latent to another: a row for each pair.

    Args:
      rows: [R, N, H, W, C], floats in [0, 1] or uint8, N points from the first latent to the second.
      path: the PNG to write.
      title: text above the rows.

    Returns:
      The path.

    Raises:
      ValueError: another shape, dtype or range.
    """
    rows = pixels(rows, 'rows', rank=5)
    count, columns = rows.shape[:2]
    factor = enlargement(rows.shape[2:4], _IMAGE)
    # A row has no gaps, so that the change is easy to follow.
    strip = rows.reshape(count * columns, *rows.shape[2:])
    sheet = mosaic(strip, columns, factor=factor, gaps=(14, 0))
    width, side = sheet.shape[1], factor * rows.shape[3]
    captions = [Caption(side / 2, -16, '$z_1$', size=10)]
    if columns > 1:
        captions.append(Caption(width - side / 2, -16, '$z_2$', size=10))
    return write_sheet(sheet, captions, path, title)


def real_and_fake(
    real: np.ndarray, fake: np.ndarray, path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """Draws images of the data on the left and as many of the generator on the right, at most 64 of each.

    Args:
      real: [N, H, W, C], as in `sample_grid`.
      fake: [N, H, W, C], as in `sample_grid`, of the same H and W.
      path: the PNG to write.
      title: text above both.

    Returns:
      The path.

    Raises:
      ValueError: another or unequal sizes, another dtype or range.
    """
    sides = pixels(real, 'real'), pixels(fake, 'fake')
    if sides[0].shape[1:3] != sides[1].shape[1:3]:
        shapes = f'{np.shape(fake)}: expected images as large as those of real, {np.shape(real)}'
        raise UserError(f'fake.shape={shapes}')
    count = min(len(sides[0]), len(sides[1]), _SIDE_BY_SIDE)
    columns = math.ceil(math.sqrt(count))
    factor = enlargement(sides[0].shape[1:3], 0.75 * _IMAGE)
    left, right = (mosaic(images[:count], columns, factor=factor, gaps=(4, 4)) for images in sides)
    between = np.full((len(left), 40, 3), 255, np.uint8)
    sheet = np.concatenate([left, between, right], 1)
    centre = left.shape[1] / 2
    captions = [
        Caption(centre, -14, 'real', size=10, colour='black'),
        Caption(sheet.shape[1] - centre, -14, 'generated', size=10, colour='black'),
    ]
    return write_sheet(sheet, captions, path, title)


def _fitting(names, width, largest):
    """Font size (points), at most `largest`, at which the longest name is no wider than `width` pixels."""
    widest = max(text_width(name, largest) for name in names)
    return min(largest, largest * width / widest) if widest else largest


def gan_curves(
    rows: Sequence[Mapping],
    path: str | os.PathLike,
    title: str | None = None,
    score_names: Sequence[str] | Mapping[str, str] = (),
) -> pathlib.Path:
    """Draws losses of both nets, mean logits of real and generated images, and each score, against the step.

    A line of more than 100 points is drawn faintly, with its running median over a twentieth of
    them, and the vertical axis shows its middle 98 %, so that a few spikes do not flatten the rest.

    Args:
      rows: as read from metrics.csv: numbers or text under `step`, `discriminator_loss`,
        `generator_loss`, `real_logit`, `fake_logit` and the names of the scores. A missing entry,
        None or '' is left out, and the line continues across it.
      path: the PNG to write.
      title: text above the panels.
      score_names: columns with scores, one panel for each that has any number; a mapping also gives
        the texts of their axes.

    Returns:
      The path.

    Raises:
      ValueError: no row with a step.
    """
    steps = _column(rows, 'step')
    if not np.isfinite(steps).any():
        raise UserError(f'len(rows)={len(rows)}: expected one with a step')
    scores = dict(score_names) if isinstance(score_names, Mapping) else {name: _words(name) for name in score_names}
    scores = {name: text for name, text in scores.items() if np.isfinite(_column(rows, name)).any()}
    panels: list[tuple[str, dict[str, tuple[str | None, str]]]] = [
        ('loss', {'discriminator_loss': ('discriminator', VERMILLION), 'generator_loss': ('generator', BLUE)}),
        ('mean logit', {'real_logit': ('real', GREEN), 'fake_logit': ('generated', PURPLE)}),
    ]
    for index, (name, text) in enumerate(scores.items()):
        panels.append((text, {name: (None, (ORANGE, SKY, GREY)[index % 3])}))
    columns = 2 if len(panels) in (2, 4) else 3
    height = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.2 if columns == 2 else 9.6, 0.3 + 2.6 * height, title)
        grid = figure.subplots(height, columns, squeeze=False).ravel()
        for axes, (text, lines) in zip(grid, panels, strict=False):
            _draw_lines(axes, steps, rows, lines)
            axes.set_ylabel(text)
            axes.set_xlabel('generator step')
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.xaxis.set_major_formatter(lambda value, _: f'{value / 1000:g}k' if value >= 10_000 else f'{value:g}')
        for axes in grid[len(panels) :]:
            axes.remove()
        return write(figure, path)


def _column(rows, key):
    """One float per row, NaN for a missing or empty entry."""
    values = (row.get(key) for row in rows)
    return np.array([math.nan if value in (None, '') else float(value) for value in values])


def _words(name):
    """'fid_classifier' -> 'FID (classifier)', 'classifier_score' -> 'classifier score'."""
    if name.startswith('fid'):
        return 'FID' + (f' ({name[4:].replace("_", " ")})' if name[4:] else '')
    return name.replace('_', ' ')


def _draw_lines(axes, steps, rows, lines):
    low, high = math.inf, -math.inf
    for name, (label, colour) in lines.items():
        values = _column(rows, name)
        known = np.isfinite(steps) & np.isfinite(values)
        if not known.any():
            continue
        x, y = steps[known], values[known]
        many = len(y) > 100
        if many:
            axes.plot(x, y, color=colour, alpha=0.25, lw=0.7)
            axes.plot(x, _running_median(y, min(len(y) // 40, 250)), color=colour, label=label)
        else:
            axes.plot(x, y, color=colour, label=label, marker='o' if len(y) <= 25 else None, ms=3)
        bottom, top = np.quantile(y, (0.01, 0.99)) if many else (y.min(), y.max())
        low, high = min(low, bottom), max(high, top)
    if low < high:
        room = 0.08 * (high - low)
        axes.set_ylim(low - room, high + room)
    if low < 0 < high:
        axes.axhline(0, color=GREY, lw=0.8, zorder=1)
    if axes.get_legend_handles_labels()[0]:
        # Above the panel, which the lines fill.
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, borderpad=0.1)


def _running_median(values, reach):
    """Median of each value and the `reach` values on either side, or as many as there are at the ends."""
    padded = np.pad(values, reach, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=-1)
