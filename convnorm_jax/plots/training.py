"""Learning curves of a run."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import BLUE, GREY, STYLE, VERMILLION, new_figure, write


def learning_curves(rows: Sequence[Mapping], path: str | os.PathLike, title: str | None = None) -> pathlib.Path:
    """Draws loss (nats) and accuracy (%) of training and validation against the epoch.

    The best epoch is that of the highest validation accuracy (without one, of the lowest validation loss).
    Both panels have a vertical line where a constant learning rate falls.

    Args:
      rows: as read from metrics.csv, in order: numbers or text under `epoch` (without one, `step`),
        `train_loss`, `train_accuracy`, `validation_loss`, `validation_accuracy` and
        `learning_rate`; accuracies in [0, 1]. A key that is missing, None or '' leaves a gap.
      path: the PNG to write.
      title: text above the panels.

    Returns:
      The path.

    Raises:
      ValueError: no row with an epoch or a step.
    """
    axis_name, position = _positions(rows)
    best = _best_row(rows)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.2, 3.0, title)
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        for axes, quantity, factor in ((loss_axes, 'loss', 1), (accuracy_axes, 'accuracy', 100)):
            for split, colour in (('train', VERMILLION), ('validation', BLUE)):
                values = factor * _column(rows, f'{split}_{quantity}')
                _draw_curve(axes, position, values, split, colour)
            _mark_best(axes, position, rows, best, quantity, factor, axis_name)
            _mark_drops(axes, position, _column(rows, 'learning_rate'))
            axes.set_xlabel(axis_name)
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        loss_axes.set_ylabel('loss (nats)')
        accuracy_axes.set_ylabel('accuracy')
        accuracy_axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}%')
        return write(figure, path)


def _column(rows, key):
    """One float per row, NaN for a missing or empty entry."""
    values = (row.get(key) for row in rows)
    return np.array([math.nan if value in (None, '') else float(value) for value in values])


def _positions(rows):
    for name in ('epoch', 'step'):
        values = _column(rows, name)
        if np.isfinite(values).any():
            return name, values
    raise UserError(f'len(rows)={len(rows)}: expected one with an epoch or a step')


def _best_row(rows):
    """Index of the best row on the validation set; None without validation."""
    for key, sign in (('validation_accuracy', 1), ('validation_loss', -1)):
        values = sign * _column(rows, key)
        if np.isfinite(values).any():
            return int(np.nanargmax(values))
    return None


def _draw_curve(axes, position, values, name, colour):
    # Rows without the value (training rows between two validations) must not cut the line.
    known = np.isfinite(position) & np.isfinite(values)
    if known.any():
        # Markers make a few points readable, and a single point visible.
        marker = 'o' if known.sum() <= 25 else None
        axes.plot(position[known], values[known], color=colour, label=name, marker=marker, ms=3)


def _mark_best(axes, position, rows, best, quantity, factor, axis_name):
    if best is None:
        return
    value = factor * _column(rows, f'validation_{quantity}')[best]
    if not np.isfinite(value):
        return
    shown = f'{value:.1f}%' if quantity == 'accuracy' else f'{value:.3g}'
    label = f'best {axis_name} {position[best]:g}: {shown}'
    star = {'color': BLUE, 'ms': 11, 'mec': 'white', 'mew': 0.8, 'zorder': 5}
    axes.plot(position[best], value, '*', label=label, **star)


def _mark_drops(axes, position, rate):
    """Draws a faint line where a constant learning rate falls; none for one that falls all the time."""
    known = np.isfinite(position) & np.isfinite(rate)
    position, rate = position[known], rate[known]
    label = 'learning rate drops'
    for index in range(1, len(rate)):
        constant = index == 1 or np.isclose(rate[index - 1], rate[index - 2], rtol=0.01)
        if constant and rate[index] < 0.7 * rate[index - 1]:
            axes.axvline(position[index], color=GREY, alpha=0.5, lw=0.9, ls='--', label=label)
            label = None
