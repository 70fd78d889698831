"""Figures of robustness: accuracy against epsilon and by attack; queries of black-box attacks.

Accuracies are given in [0, 1] and drawn in %. Figures are as wide as a column of a paper (3.5 inches).
Lines differ in marker and dashes as well as colour, so that they are distinct in grey print.
"""

import math
import numbers
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILLION, column_figure, write

# Five markers and dashes for six colours: a colour that repeats has another marker.
_LOOKS: dict[str, Any] = {
    'color': 5 * [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY],
    'marker': 6 * ['o', 's', '^', 'D', 'v'],
    'linestyle': 6 * ['-', (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (9, 2))],
}
_QUANTILE = statistics.NormalDist().inv_cdf(0.975)


def epsilon_curve(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike,
    title: str | None = None,
    epsilon: float | None = None,
) -> pathlib.Path:
    """Draws robust accuracy (%) against the radius of the attack's ball, a line for each name.

    Args:
      curves: by name (in the legend), points (epsilon in 1/255, accuracy in [0, 1]) in any order.
      path: the PNG to write.
      title: text above the figure.
      epsilon: in 1/255; a vertical line at the radius of the training or evaluation.

    Returns:
      The path.

    Raises:
      ValueError: no curve or a curve without points, a point that is not a pair, an epsilon below 0, above 255, in
        units of [0, 1] (recognized when all of a curve are below 0.1) or twice in a curve, an accuracy outside [0, 1].
    """
    lines = _checked_curves(curves)
    if epsilon is not None:
        _check_levels('epsilon', np.array([epsilon], float))
    with matplotlib.rc_context(STYLE):
        figure, axes = _line_figure(title)
        for name, (levels, accuracies) in lines.items():
            axes.plot(levels, 100 * accuracies, ms=4, label=name, clip_on=False, zorder=3)
        if epsilon is not None:
            axes.axvline(epsilon, color='black', lw=0.7, zorder=1)
            axes.text(epsilon, 102, f'ε = {epsilon:g}/255', ha='center', fontsize=8)
        axes.set_xlim(0, max(epsilon or 0, *(levels.max() for levels, _ in lines.values())) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 4, 5, 10]))
        axes.set(xlabel='ε (1/255)', ylabel='robust accuracy')
        _legend_below(figure, axes)
        return write(figure, path)


def attack_bars(
    rows: Sequence[tuple[str, float, int]], path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """Draws accuracy (%) on clean images and under each attack: horizontal bars with their figures.

    Thin bars are 95 % Wilson intervals, which show the uncertainty due to the choice of examples.

    Args:
      rows: (name, accuracy in [0, 1], number of examples), drawn from the top: clean first, then the attacks.
      path: the PNG to write.
      title: text above the figure.

    Returns:
      The path.

    Raises:
      ValueError: no row, an accuracy outside [0, 1], or an invalid number of examples.
    """
    if not rows:
        raise UserError(f'rows={rows!r}: expected at least one (name, accuracy, examples)')
    names: Sequence[str]
    names, accuracies, examples = zip(*rows, strict=True)
    intervals = np.array(list(map(wilson_interval, accuracies, examples)))
    alike = len(set(examples)) == 1
    if not alike:
        names = [f'{name} (n = {count:,})' for name, count in zip(names, examples, strict=True)]
    places, values = np.arange(len(rows)), 100 * np.array(accuracies, float)
    with matplotlib.rc_context({**STYLE, 'axes.grid.axis': 'x', 'ytick.major.size': 0}):
        figure = column_figure(0.7 + 0.23 * len(rows), title)
        axes = figure.subplots()
        axes.barh(places, values, height=0.7, color=[GREY, *[SKY] * (len(rows) - 1)])
        reach = np.abs(100 * intervals.T - values)
        axes.errorbar(values, places, xerr=reach, fmt='none', ecolor='black', elinewidth=0.8, capsize=2, capthick=0.8)
        box = {'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5}
        for place, value, (_, high) in zip(places.tolist(), values, intervals, strict=True):
            axes.text(100 * high + 2, place, f'{value:.1f}', va='center_baseline', bbox=box)
        axes.set_yticks(places, names)
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.45, -0.55))
        axes.xaxis.set_major_locator(MultipleLocator(20))
        axes.set_xlabel(f'accuracy (%) on {examples[0]:,} examples' if alike else 'accuracy (%)')
        return write(figure, path)


def wilson_interval(accuracy: float, examples: int) -> tuple[float, float]:
    r"""The 95 % interval (low, high) of a share found in a sample (Wilson 1927, JASA 22, 209-212).

    .. math::
        \frac{p + \frac{z^2}{2n} \pm z \sqrt{\frac{p (1 - p)}{n} + \frac{z^2}{4 n^2}}}{1 + \frac{z^2}{n}},
        \qquad z = 1.96

    Unlike +-1.96 standard errors it stays within [0, 1], and it has a width at 0 and 1 too.

    >>> tuple(round(end, 3) for end in wilson_interval(0.5, 100))
    (0.404, 0.596)

    Args:
      accuracy: the share p, in [0, 1].
      examples: size n of the sample, at least 1.

    Raises:
      ValueError: an accuracy outside [0, 1], or a size that is not an integer of at least 1.
    """
    accuracy = float(checked_shares('accuracy', accuracy))
    if not isinstance(examples, numbers.Integral) or examples < 1:
        raise UserError(f'examples={examples!r}: expected an integer of at least 1')
    ratio = _QUANTILE**2 / int(examples)
    centre = accuracy + ratio / 2
    reach = math.sqrt(ratio * (accuracy * (1 - accuracy) + ratio / 4))
    return max(0.0, (centre - reach) / (1 + ratio)), min(1.0, (centre + reach) / (1 + ratio))


def query_curve(
    results: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """Draws the share of examples (%) that black-box attacks fooled within a number of queries, a line for each attack.

    An example with 0 queries was misclassified before the attack and is left out, as in `attacks.simba_summary`.
    A line ends at the largest number of queries of its examples.

    Args:
      results: {attack: (queries used, int [N]; whether fooled in the end, bool [N])}.
      path: the PNG to write.
      title: text above the figure.

    Returns:
      The path.

    Raises:
      ValueError: no attack, arrays of other shapes or dtypes, queries below 0, or none above it.
    """
    lines = {name: _share_fooled(name, result) for name, result in results.items()}
    if not lines:
        raise UserError('results={}: expected at least one attack')
    with matplotlib.rc_context(STYLE):
        figure, axes = _line_figure(title)
        for index, (name, (queries, shares)) in enumerate(lines.items()):
            # A line has thousands of steps: draw markers at even distances, shifted from line to line.
            every = (0.05 + 0.17 * index / len(lines), 0.17)
            options = {'drawstyle': 'steps-post', 'markevery': every, 'ms': 4, 'clip_on': False, 'zorder': 3}
            axes.plot(queries, 100 * shares, label=name, **options)
        axes.set_xscale('log')
        axes.set_xlim(1, max(10, *(queries.max() for queries, _ in lines.values())))
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
        axes.set(xlabel='queries', ylabel='examples fooled')
        _legend_below(figure, axes)
        return write(figure, path)


def _line_figure(title):
    """A figure and its axes of 0 to 100 %."""
    figure = column_figure(2.2, title)
    axes = figure.subplots()
    axes.set_prop_cycle(**_LOOKS)
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_locator(MultipleLocator(20))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}%')
    return figure, axes


def _legend_below(figure, axes):
    """Adds a legend in as many columns as fit, and makes the figure taller by the legend's height."""
    handles, names = axes.get_legend_handles_labels()
    for columns in range(len(names), 0, -1):
        legend = figure.legend(handles, names, loc='outside lower center', ncols=columns, handlelength=2.8)
        size = legend.get_window_extent().size
        if size[0] <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size[1] / figure.dpi)


def _share_fooled(name, result):
    """(numbers of queries at which the share changes, from 1 to the most used; the share within so many)."""
    queries, success = map(np.asarray, result)
    if queries.ndim != 1 or queries.shape != success.shape or queries.dtype.kind not in 'iu' or success.dtype != bool:
        found = f'{queries.dtype} {queries.shape}, {success.dtype} {success.shape}'
        raise UserError(f'results[{name!r}]={found}: expected int [N], bool [N]')
    if queries.max(initial=0) < 1 or queries.min() < 0:
        span = f'{queries.min(initial=0)} to {queries.max(initial=0)}'
        raise UserError(f'results[{name!r}] queries={span}: expected 0 or more, and one at least above 0')
    fooled = np.sort(queries[success & (queries > 0)])
    places = np.unique([1, *fooled, queries.max()])
    return places, np.searchsorted(fooled, places, side='right') / (queries > 0).sum()


def _checked_curves(curves):
    """{name: (epsilons in order, accuracies)}."""
    if not curves:
        raise UserError('curves={}: expected at least one')
    lines = {}
    for name, points in curves.items():
        if {np.shape(point) for point in points} != {(2,)}:
            raise UserError(f'curves[{name!r}]={points}: expected points (epsilon, accuracy)')
        levels, accuracies = np.array(sorted(map(tuple, points)), float).T
        _check_levels(f'curves[{name!r}] epsilon', levels)
        if (np.diff(levels) == 0).any():
            raise UserError(f'curves[{name!r}] epsilon={levels.tolist()}: expected each once')
        lines[name] = levels, checked_shares(f'curves[{name!r}]', accuracies)
    return lines


def _check_levels(name, levels):
    if not np.all((levels >= 0) & (levels <= 255)) or 0 < levels.max() < 0.1:
        raise UserError(f'{name}={levels.tolist()}: expected 0 to 255, in 1/255 (8, not 8/255)')


def checked_shares(name: str, shares: Any) -> np.ndarray:
    """The shares as a float array; raises ValueError if one is outside [0, 1]."""
    shares = np.asarray(shares, float)
    for share in shares.ravel():
        if not 0 <= share <= 1:
            raise UserError(f'{name}={share:g}: expected an accuracy in [0, 1], not in %')
    return shares
