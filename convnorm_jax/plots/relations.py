"""One quantity against several others, a point for each method."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.ticker import LogLocator, NullLocator

from convnorm_jax.plots.comparison import COLOURS, look
from convnorm_jax.plots.figure import STYLE, check_panels, new_figure, write


def relation_plot(
    panels: Mapping[str, Mapping[str, tuple[float, float]]],
    path: str | os.PathLike,
    *,
    y_name: str,
    title: str | None = None,
) -> pathlib.Path:
    """Draws a panel for each quantity on the x axis, which is logarithmic, and a point for each method.

    Args:
      panels: {name of the x axis: {method: (x, y)}}; x above 0.
      path: the PNG to write.
      y_name: name and unit of the y axis.
      title: text above the panels.

    Returns:
      The path.

    Raises:
      ValueError: no panel, or a panel without a point.
    """
    check_panels(panels, 'point')
    methods = list(dict.fromkeys(method for points in panels.values() for method in points))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(max(3.6, 2.4 * len(panels)), 2.9, title)
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True).ravel()
        for axes, (name, points) in zip(grid, panels.items(), strict=True):
            for index, method in enumerate(methods):
                if method in points:
                    axes.plot(*points[method], **_point(index), label=method)
            axes.set_xscale('log')
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(name)
        grid[0].set_ylabel(y_name)
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc='outside lower center', ncols=min(len(names), 4))
        return write(figure, path)


def _point(index: int) -> dict[str, Any]:
    """As a line's marker; filled for as many methods as there are colours, then empty."""
    fill = 'full' if index < COLOURS else 'none'
    return {**look(index), 'linestyle': 'none', 'markersize': 6, 'fillstyle': fill, 'markeredgewidth': 1.5}
