"""Robustness in pictures: accuracy against epsilon, by attack, by corruption; queries of black-box attacks.

Accuracies are given in [0, 1] and drawn in %. Figures are as wide as a column of a paper (3.5 inches),
and lines differ in marker and dashes, too, so that they are told apart in grey print.
"""

import math
import numbers
import os
import pathlib
import statistics
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILLION, new_figure, write

_WIDTH = 3.5  # inches
_DOTS = 105  # about so many to the side of a picture, at 200 an inch
# Five markers and dashes to six colours: where a colour comes back they are others.
_LOOKS = {
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
    """Robust accuracy (%) against the radius of the attack's ball, a line for each name.

    Args:
      curves: by name (in the legend), points (epsilon in 1/255, accuracy in [0, 1]) in any order.
      path: the PNG to write.
      title: text above the picture.
      epsilon: in 1/255; a vertical line where the net was trained or is evaluated.

    Raises:
      ValueError: no curve or a curve without points, a point that is no pair, an epsilon below 0, above 255, in
        units of [0, 1] (recognized by all of a curve being below 0.1) or twice in a curve, an accuracy outside [0, 1].
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
    """Accuracy (%) on clean pictures and after each attack: horizontal bars with the figure beside each.

    Thin bars are 95 % Wilson intervals: what other examples of the same kind would give.

    Args:
      rows: (name, accuracy in [0, 1], number of examples), drawn from the top: clean first, then the attacks.
      path: the PNG to write.
      title: text above the picture.

    Raises:
      ValueError: no row, an accuracy outside [0, 1], or a number of examples that is none.
    """
    if not rows:
        raise UserError(f'rows={rows!r}: expected at least one (name, accuracy, examples)')
    names, accuracies, examples = zip(*rows, strict=True)
    intervals = np.array(list(map(wilson_interval, accuracies, examples)))
    alike = len(set(examples)) == 1
    if not alike:
        names = [f'{name} (n = {count:,})' for name, count in zip(names, examples, strict=True)]
    places, values = np.arange(len(rows)), 100 * np.array(accuracies, float)
    with matplotlib.rc_context({**STYLE, 'axes.grid.axis': 'x', 'ytick.major.size': 0}):
        figure = _figure(0.7 + 0.23 * len(rows), title)
        axes = figure.subplots()
        axes.barh(places, values, height=0.7, color=[GREY, *[SKY] * (len(rows) - 1)])
        reach = np.abs(100 * intervals.T - values)
        axes.errorbar(values, places, xerr=reach, fmt='none', ecolor='black', elinewidth=0.8, capsize=2, capthick=0.8)
        for place, value, (_, high) in zip(places, values, intervals, strict=True):
            style = {'va': 'center_baseline', 'bbox': {'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5}}
            axes.text(100 * high + 2, place, f'{value:.1f}', **style)
        axes.set_yticks(places, names)
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.45, -0.55))
        axes.xaxis.set_major_locator(MultipleLocator(20))
        axes.set_xlabel(f'accuracy (%) on {examples[0]:,} examples' if alike else 'accuracy (%)')
        return write(figure, path)


def wilson_interval(accuracy: float, examples: int) -> tuple[float, float]:
    """The 95 % interval (low, high) of a share found in a sample (Wilson 1927, JASA 22, 209-212).

    Unlike +-1.96 standard errors it stays within [0, 1], and is more than a point at 0 and 1.

    Args:
      accuracy: the share, in [0, 1].
      examples: size of the sample, at least 1.

    Raises:
      ValueError: an accuracy outside [0, 1], or a size that is no integer of at least 1.
    """
    accuracy = float(_shares('accuracy', accuracy))
    if not isinstance(examples, numbers.Integral) or examples < 1:
        raise UserError(f'examples={examples!r}: expected an integer of at least 1')
    doubt = _QUANTILE**2 / int(examples)
    centre = accuracy + doubt / 2
    reach = math.sqrt(doubt * (accuracy * (1 - accuracy) + doubt / 4))
    return max(0.0, (centre - reach) / (1 + doubt)), min(1.0, (centre + reach) / (1 + doubt))


def corruption_table(
    table: Mapping[str, Mapping[int, float]], path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """Accuracy (%) by corruption and severity as a heat map with the figures in its cells, and means.

    The last column is the mean over the severities, the last row that over the corruptions; their corner is
    the mean of all. Dark is high, the shades span 0 to 100 % so that pictures of two nets compare.

    Args:
      table: {corruption: {severity: accuracy in [0, 1]}}, the same severities in each.
      path: the PNG to write.
      title: text above the picture.

    Raises:
      ValueError: an empty table, severities that differ between corruptions, an accuracy outside [0, 1].
    """
    cells, severities = _with_means(table)
    rows, columns = cells.shape
    with matplotlib.rc_context({**STYLE, 'axes.grid': False}):
        figure = _figure(0.5 + 0.22 * rows, title)
        axes = figure.subplots()
        # No shade so dark that black figures would not be read in it.
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
    clean: np.ndarray, pictures: Mapping[str, Sequence[np.ndarray]], path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """One picture under each corruption (rows) at severities 1 to 5; the clean one first in each row.

    Args:
      clean: uint8 [H, W, C], C of 1 or 3.
      pictures: {corruption: the picture at severities 1 to 5, each as `clean`}.
      path: the PNG to write.
      title: text above the grid.

    Raises:
      ValueError: no corruption, other than five pictures of one, another shape or dtype.
    """
    _check_pictures(clean, pictures)
    height, width = np.shape(clean)[:2]
    mosaic, tops, lefts = _mosaic([[clean, *row] for row in pictures.values()])
    with matplotlib.rc_context({**STYLE, 'axes.grid': False}):
        figure = _figure(len(pictures), title)
        axes = figure.subplots()
        axes.imshow(mosaic, aspect='auto', interpolation='antialiased')
        for corner in ((left - 0.5, top - 0.5) for top in tops for left in lefts):
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=GREY, lw=0.4, clip_on=False))
        headings = ['clean', 'severity 1', 2, 3, 4, 5]
        _name_cells(axes, lefts + (width - 1) / 2, headings, tops + (height - 1) / 2, pictures)
        # A pixel is a whole number of dots wide, or else pixels would differ in size.
        dots = _DOTS / max(height, width)
        figure.dpi = 200
        figure.draw_without_rendering()
        missing = np.array(mosaic.shape[1::-1]) * (round(dots) or dots) - axes.get_window_extent().size
        figure.set_size_inches(figure.get_size_inches() + missing / figure.dpi)
        return write(figure, path)


def query_curve(
    results: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike, title: str | None = None
) -> pathlib.Path:
    """Share of examples (%) that black-box attacks have fooled within a number of queries, a line an attack.

    An example with 0 queries was misclassified before the attack and is left out, as in `attacks.simba_summary`.
    A line ends at the most queries that any of its examples used.

    Args:
      results: {attack: (queries used, int [N]; whether fooled in the end, bool [N])}.
      path: the PNG to write.
      title: text above the picture.

    Raises:
      ValueError: no attack, arrays of other shapes or dtypes, queries below 0, or none above it.
    """
    lines = {name: _share_fooled(name, result) for name, result in results.items()}
    if not lines:
        raise UserError('results={}: expected at least one attack')
    with matplotlib.rc_context(STYLE):
        figure, axes = _line_figure(title)
        for index, (name, (queries, shares)) in enumerate(lines.items()):
            # Some thousand steps: markers at even distances in print, no two lines' at the same ones.
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


def _figure(height, title):
    """A figure as wide as a column, higher by its title, which is broken into lines that fit."""
    lines = textwrap.wrap(title or '', 38)
    return new_figure(_WIDTH, height + 0.19 * len(lines), '\n'.join(lines))


def _line_figure(title):
    """A figure and its axes of 0 to 100 %."""
    figure = _figure(2.2, title)
    axes = figure.subplots()
    axes.set_prop_cycle(**_LOOKS)
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_locator(MultipleLocator(20))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}%')
    return figure, axes


def _legend_below(figure, axes):
    """A legend in as many columns as the figure is wide, which grows by the legend's height."""
    handles, names = axes.get_legend_handles_labels()
    for columns in range(len(names), 0, -1):
        legend = figure.legend(handles, names, loc='outside lower center', ncols=columns, handlelength=2.8)
        size = legend.get_window_extent().size
        if size[0] <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size[1] / figure.dpi)


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
    cells = [100 * _shares(f'table[{name!r}]', [row[key] for key in severities]) for name, row in table.items()]
    cells = np.vstack([*cells, np.mean(cells, axis=0)])
    return np.column_stack([cells, cells.mean(axis=1)]), severities


def _mosaic(grid):
    """(uint8 [.., .., 3] of all pictures on white, their first rows in it, their first columns)."""
    height, width = np.shape(grid[0][0])[:2]
    gap = max(1, round(0.06 * max(height, width)))
    # The clean column stands apart.
    tops, lefts = np.arange(len(grid)) * (height + gap), np.arange(len(grid[0])) * (width + gap)
    lefts[1:] += 2 * gap
    mosaic = np.full((tops[-1] + height, lefts[-1] + width, 3), 255, np.uint8)
    for top, row in zip(tops, grid, strict=True):
        for left, picture in zip(lefts, row, strict=True):
            mosaic[top : top + height, left : left + width] = picture
    return mosaic, tops, lefts


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
        lines[name] = levels, _shares(f'curves[{name!r}]', accuracies)
    return lines


def _check_levels(name, levels):
    if not np.all((levels >= 0) & (levels <= 255)) or 0 < levels.max() < 0.1:
        raise UserError(f'{name}={levels.tolist()}: expected 0 to 255, in 1/255 (8, not 8/255)')


def _shares(name, shares):
    shares = np.asarray(shares, float)
    for share in shares.ravel():
        if not 0 <= share <= 1:
            raise UserError(f'{name}={share:g}: expected an accuracy in [0, 1], not in %')
    return shares


def _check_pictures(clean, pictures):
    clean = np.asarray(clean)
    if clean.dtype != np.uint8 or clean.ndim != 3 or clean.shape[2] not in (1, 3):
        raise UserError(f'clean={clean.dtype} {clean.shape}: expected uint8 [H, W, C] with C 1 or 3')
    if not pictures:
        raise UserError('pictures={}: expected those of at least one corruption')
    for name, row in pictures.items():
        found = {f'{picture.dtype} {picture.shape}' for picture in map(np.asarray, row)}
        if len(row) != 5 or found != {f'uint8 {clean.shape}'}:
            found = f'{len(row)} of {" and ".join(sorted(found))}'
            raise UserError(f'pictures[{name!r}]={found}: expected 5, by severity, of uint8 {clean.shape} as clean')
