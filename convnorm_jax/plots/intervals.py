"""Differences of two methods with their intervals: a forest plot."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

from convnorm_jax.plots.figure import BLUE, GREY, STYLE, VERMILLION, check_panels, new_figure, write

Interval = tuple[str, float, float, float]
_MOST_COLUMNS = 3


def interval_plot(
    panels: Mapping[str, Sequence[Interval]],
    path: str | os.PathLike,
    *,
    x_name: str,
    lower_is_better: bool = False,
    title: str | None = None,
) -> pathlib.Path:
    """Draws differences with their intervals: a panel for each comparison, a row for each setting.

    An interval that excludes 0 is blue where the first method is better and vermillion where it is worse; the others
    are grey.

    Args:
      panels: {name of the comparison: [(setting, mean, low, high)]}, from top to bottom; low and high may be nan.
      path: the PNG to write.
      x_name: name and unit of the differences.
      lower_is_better: whether a negative difference is an improvement.
      title: text above the panels.

    Returns:
      The path.

    Raises:
      ValueError: no panel, or a panel without a row.
    """
    check_panels(panels, 'row')
    most, columns = max(map(len, panels.values())), min(len(panels), _MOST_COLUMNS)
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(max(3.6, 2.6 * columns), 0.3 + lines * (0.6 + 0.24 * most), title)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
        for axes, (name, rows) in zip(grid, panels.items(), strict=False):
            axes.axvline(0, color='black', linewidth=0.8)
            for place, (_, mean, low, high) in enumerate(rows):
                colour = _colour(low, high, lower_is_better)
                bars = None if math.isnan(low) else [[mean - low], [high - mean]]
                axes.errorbar(
                    [mean], [place], xerr=bars, fmt='o', color=colour, markersize=4, capsize=2.5, elinewidth=1
                )
            axes.set_yticks(range(len(rows)), [setting for setting, *_ in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_title(name)
            axes.grid(axis='y', visible=False)
        for axes in grid[len(panels) - columns : len(panels)]:  # the lowest of each column
            axes.set_xlabel(x_name)
            axes.xaxis.set_tick_params(labelbottom=True)
        for axes in grid[len(panels) :]:
            axes.remove()
        return write(figure, path)


def _colour(low, high, lower_is_better):
    sign = int(low > 0) - int(high < 0)
    if not sign:
        return GREY
    return BLUE if (sign > 0) != lower_is_better else VERMILLION
