"""Singular values and operator norms of the layers of several nets, next to each other."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILLION, new_figure, write

_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY)
_MARKERS = 'oDs^vPX'
MAX_RUNS = len(_COLOURS)
NOTE = 'measured, not certified'
_STAGES = (
    ('conv', 'convolution with its effective kernel'),
    ('layer', 'whole layer at evaluation: convolution and normalization'),
)
# Values below this share of the largest value of a panel are not shown.
_SHOWN = 1e-3
_QUANTILES = (0, 0.05, 0.5, 0.95, 1)


def layer_operators(
    runs: Mapping[str, Sequence],
    path: str | os.PathLike,
    title: str | None = None,
    bounds: Mapping[str, float | None] | None = None,
) -> pathlib.Path:
    """Draws the quantiles of the circular singular values and the operator norm of each layer and run.

    The upper panel is of the convolutions with their effective kernels, the lower one of the whole layers
    (empty if a layer is not linear). A bar is the 5-95 % band, with a notch at the median; a
    thin line goes from the smallest to the largest value; the marker is the operator norm by power
    iteration. The axes are logarithmic and start at half the lowest bar.

    Args:
      runs: the layers of each run by its label, like `evaluation.operators.LayerOperator`. Layers of the
        same name are drawn together, in the order of the first run that has them. At most 7 runs.
      path: the PNG to write.
      title: text above the panels.
      bounds: product bounds by label of run, for the legend.

    Returns:
      The path.

    Raises:
      ValueError: no run, a run without layers, or too many runs.
    """
    if not 1 <= len(runs) <= MAX_RUNS or not all(runs.values()):
        raise UserError(f'runs={list(runs)}: expected 1 to {MAX_RUNS} runs, each with layers')
    names = list(dict.fromkeys(layer.name for layers in runs.values() for layer in layers))
    width = min(14.0, max(7.2, 1.0 + 0.06 * len(names) * (len(runs) + 1.5)))
    # Points of width for each glyph.
    room = 72 * (width - 1.0) / len(names) * 0.8 / len(runs)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width, 4.9 + 0.17 * max(len(runs), 4), f'{title} ({NOTE})' if title else NOTE)
        panels = figure.subplots(2, 1, sharex=True)
        for axes, (stage, text) in zip(panels, _STAGES, strict=True):
            for place, layers in enumerate(runs.values()):
                _draw_run(axes, stage, names, layers, place, len(runs), min(4.5, 0.8 * room))
            _finish(axes, names, text)
        _label_layers(panels[-1], names, width)
        _legend(figure, runs, bounds or {})
        return write(figure, path)


def _draw_run(axes, stage, names, layers, place, count, size):
    colour, offset, bar = _COLOURS[place], 0.8 * ((place + 0.5) / count - 0.5), min(0.5 / count, 0.16)
    marker = {'marker': _MARKERS[place], 'ms': size, 'mfc': colour, 'mec': 'black', 'mew': 0.6, 'zorder': 4}
    for layer in layers:
        values, norm = getattr(layer, f'{stage}_circular'), getattr(layer, f'{stage}_norm')
        if norm is None:
            continue
        x = names.index(layer.name) + offset
        # A log axis has no zero.
        low, five, median, most, high = np.maximum(np.quantile(values, _QUANTILES), 1e-30)
        axes.plot([x, x], [low, high], color=colour, lw=0.9, zorder=2, solid_capstyle='butt')
        axes.bar(x, most - five, bar, bottom=five, color=colour, alpha=0.55, lw=0, zorder=2)
        axes.plot([x - bar / 2, x + bar / 2], [median] * 2, color='black', lw=1.1, zorder=3, solid_capstyle='butt')
        axes.plot(x, max(norm, 1e-30), **marker)


def _finish(axes, names, text):
    high = max([2.0, *(float(np.max(line.get_ydata())) for line in axes.lines)])
    # Directions that a layer maps to almost zero would squeeze all the others.
    low = max(_SHOWN * high, min([0.5, *(bar.get_y() / 2 for bar in axes.patches)]))
    axes.axhline(1, color=GREY, lw=0.9, ls='--', zorder=1)
    room = (high / low) ** 0.05
    axes.set_yscale('log')
    axes.set_ylim(low / room, high * room)
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    axes.set_ylabel('singular value')
    axes.set_title(text, loc='left', fontweight='bold')
    axes.grid(False, axis='x')
    axes.tick_params(axis='x', length=0)
    for index in range(0, len(names), 2):  # shading groups the glyphs of a layer
        axes.axvspan(index - 0.5, index + 0.5, color='#F3F3F3', lw=0, zorder=0)


def _label_layers(axes, names, width):
    room = 72 * 0.9 * width / len(names)  # points for each name
    flat = 5.5 * max(map(len, names)) < room
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(range(len(names)), names, rotation=0 if flat else 90 if room < 22 else 35)
    if not flat and room >= 22:
        for label in axes.get_xticklabels():
            label.set(ha='right', rotation_mode='anchor')


def _legend(figure, runs, bounds):
    """A legend with the runs in the left column and the glyphs in the right one."""
    styles = {'lw': 5, 'ms': 5, 'mec': 'black', 'mew': 0.6}
    left = [
        Line2D([], [], color=colour, marker=marker, label=_with_bound(label, bounds.get(label)), **styles)
        for label, colour, marker in zip(runs, _COLOURS, _MARKERS)
    ]
    right = [
        Line2D([], [], color='black', marker='o', ms=4.5, lw=0, mfc='none', label='operator norm, by power iteration'),
        Patch(color=GREY, alpha=0.55, lw=0, label='circular singular values, 5–95 %'),
        Line2D([], [], color=GREY, lw=0.9, label='from the smallest to the largest'),
        Line2D([], [], color='black', lw=1.1, label='median'),
    ]
    for short, other in ((left, right), (right, left)):
        short += [Line2D([], [], lw=0, label=' ')] * (len(other) - len(short))
    figure.legend(handles=left + right, loc='outside lower center', ncols=2, columnspacing=4)


def _with_bound(label, bound):
    if bound is None or not 0 < bound < math.inf:
        return label
    power = math.floor(math.log10(bound))
    digits = f'{bound:.2g}' if -2 <= power <= 2 else rf'${bound / 10**power:.1f} \times 10^{{{power}}}$'
    return f'{label}, product of norms {digits}'
