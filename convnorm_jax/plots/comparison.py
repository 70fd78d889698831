"""Comparison of runs: accuracy against a setting, one line for each method, with error bars."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import BLUE, GREEN, ORANGE, PURPLE, SKY, STYLE, VERMILLION, new_figure, write

# Colour and marker change together, so that lines are distinct in black and white too.
_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
_MARKERS = ('o', 's', '^', 'D', 'v', 'P')
_DASHES = ('-', '--', ':')
COLOURS = len(_COLOURS)
MAX_COLUMNS = 3
_DODGE, _MOST_DODGE = 3.5, 14  # points between the error bars of neighbouring lines, and of the outermost lines

Point = tuple[float, float, float | None]


def accuracy_against(
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    path: str | os.PathLike,
    *,
    x_name: str,
    title: str | None = None,
) -> pathlib.Path:
    """Draws accuracy (%) against a numeric setting: a panel for each measure, a line for each method.

    Error bars are +- one standard deviation. The lines are shifted by a few points of print, so that their
    bars do not cover each other. Settings that span more than a factor of 30
    get a logarithmic axis. Each panel shows at least 4 % of accuracy, so that small differences look small.

    Args:
      panels: by the measure's name (above its panel), then by the method's name (in the legend),
        points (setting, mean, standard deviation or None) in any order; accuracies in %.
      path: the PNG to write.
      x_name: name of the setting.
      title: text above the panels.

    Returns:
      The path.

    Raises:
      ValueError: no panel, or a panel without a point.
    """
    for name, panel in panels.items():
        if not any(panel.values()):
            raise UserError(f'panels[{name!r}]={panel!r}: expected at least one point')
    if not panels:
        raise UserError('panels={}: expected at least one')
    methods = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    columns = 2 if len(panels) == 4 else min(len(panels), MAX_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width = max(3.6, 2.5 * columns)
    named = min(len(methods), max(1, int(9 * width / (6 + max(map(len, methods))))))  # methods in a line of the legend
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width, 0.35 + 2.4 * rows + 0.16 * math.ceil(len(methods) / named), title)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, panel) in zip(grid, panels.items(), strict=False):
            _draw_panel(figure, axes, panel, methods)
            axes.set_title(name)
            axes.set_xlabel(x_name)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes in grid[: len(panels) : columns]:
            axes.set_ylabel('accuracy')
        if len(methods) > 1:
            lines = [Line2D([], [], **look(index)) for index in range(len(methods))]
            figure.legend(lines, methods, loc='outside lower center', ncols=named)
        return write(figure, path)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of a method."""
    return {
        'color': _COLOURS[index % len(_COLOURS)],
        'marker': _MARKERS[index % len(_MARKERS)],
        'linestyle': _DASHES[index // len(_COLOURS) % len(_DASHES)],
        'markersize': 4,
    }


def _draw_panel(figure, axes, panel, methods):
    dodge = min(_DODGE, _MOST_DODGE / max(1, len(methods) - 1)) / 72
    for index, name in enumerate(methods):
        points = sorted(panel.get(name, ()), key=lambda point: point[0])
        if not points:
            continue
        x, mean, deviation = np.array([[math.nan if v is None else v for v in point] for point in points], float).T
        shift = ScaledTranslation((index - (len(methods) - 1) / 2) * dodge, 0, figure.dpi_scale_trans)
        # An error bar of zero length would be drawn as a dash through the marker.
        bars = np.where(deviation > 0, deviation, np.nan)
        axes.errorbar(x, mean, bars, transform=axes.transData + shift, capsize=2.5, elinewidth=1, **look(index))
    _scale_settings(axes, sorted({point[0] for points in panel.values() for point in points}))
    _scale_accuracy(axes, panel)


def _scale_settings(axes, settings):
    low, high = settings[0], settings[-1]
    if low > 0 and high > 30 * low:
        axes.set_xscale('log')
        room = (high / low) ** 0.08
        axes.set_xlim(low / room, high * room)
    else:
        room = 0.08 * (high - low) or 0.5
        axes.set_xlim(low - room, high + room)
    if len(settings) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(settings))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}')


def _scale_accuracy(axes, panel):
    """Shows at least 4 % of accuracy, and little beyond 0 and 100 %."""
    points = [point for points in panel.values() for point in points]
    low = min(mean - (deviation or 0) for _, mean, deviation in points)
    high = max(mean + (deviation or 0) for _, mean, deviation in points)
    missing = max(0, 4 - (high - low)) / 2
    low, high = low - missing, high + missing
    room = 0.06 * (high - low)
    low, high = (0, high - low) if low < 0 else (100 - high + low, 100) if high > 100 else (low, high)
    axes.set_ylim(max(low - room, -room), min(high + room, 100 + room))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}%')
