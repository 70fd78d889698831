"""Power spectra and singular values of layers, before and after normalization."""

import math
import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import BLUE, GREY, STYLE, VERMILLION, new_figure, write

_WHEN = {'before': VERMILLION, 'after': BLUE}
MAX_LAYERS = 6


def layer_spectra(spectra: Sequence, path: str | os.PathLike, title: str | None = None) -> pathlib.Path:
    """Draws power spectrum and singular values of up to six layers, before and after normalization.

    Left: power gain of the output channels against radial frequency (cycles per sample): median
    and 5-95 % band over all channels and all frequencies of a ring. Right: sorted singular
    values against rank / count; those below 1e-3 of the largest are not shown.

    Args:
      spectra: like `evaluation.spectral.LayerSpectrum`; of more than six, six are chosen evenly.
      path: the PNG to write.
      title: text above the panels.

    Returns:
      The path.

    Raises:
      ValueError: no spectrum.
    """
    if not spectra:
        raise UserError('spectra=[]: expected at least one layer')
    indices = np.linspace(0, len(spectra) - 1, min(len(spectra), MAX_LAYERS)).round()
    chosen = [spectra[int(index)] for index in indices]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.2, 0.9 + 1.65 * len(chosen), title)
        grid = figure.subplots(len(chosen), 2, squeeze=False)
        for (power_axes, value_axes), spectrum in zip(grid, chosen, strict=True):
            _draw_power(power_axes, spectrum)
            _draw_singular_values(value_axes, spectrum)
        grid[-1, 0].set_xlabel('radial frequency (cycles per sample)')
        grid[-1, 1].set_xlabel('normalized index (rank / count)')
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc='outside lower center', ncols=len(names))
        return write(figure, path)


def _draw_power(axes, spectrum):
    powers = (spectrum.power_before, spectrum.power_after)
    for power, (when, colour) in zip(powers, _WHEN.items(), strict=True):
        radius, low, median, high = _radial_quantiles(power, spectrum.size)
        band, line = f'{when}, 5–95 %', f'{when}, median'
        axes.fill_between(radius, low, high, color=colour, alpha=0.22, lw=0, label=band)
        axes.plot(radius, median, color=colour, marker='o', ms=2.5, label=line)
    axes.axhline(1, color=GREY, lw=0.8, ls=':', label='gain 1')
    # The largest radius is that of the corner, sqrt(1/2) in 2-D: grids of every size share one axis.
    axes.set_xlim(-0.02, max(0.73, 0.02 + 0.5 * math.sqrt(len(spectrum.size))))
    axes.xaxis.set_major_locator(MultipleLocator(0.1))
    _log_scale(axes, *axes.dataLim.intervaly)
    axes.set_ylabel('power gain')
    axes.set_title(spectrum.name, loc='left', fontweight='bold')


def _draw_singular_values(axes, spectrum):
    singular = (spectrum.singular_before, spectrum.singular_after)
    for values, (when, colour) in zip(singular, _WHEN.items(), strict=True):
        index = np.unique(np.linspace(0, len(values) - 1, 2000).astype(int))
        axes.plot((index + 1) / len(values), values[index], color=colour, label=when)
    axes.axhline(1, color=GREY, lw=0.8, ls=':')
    # Directions that a layer maps to almost zero would squeeze all the others into a line.
    largest = max(1.0, *(float(values[0]) for values in singular))
    smallest = min(float(values[-1]) for values in singular)
    _log_scale(axes, max(smallest, 1e-3 * largest), largest)
    axes.set_ylabel('singular value')


def _log_scale(axes, low, high):
    """A log axis around [low, high] and 1, with plain numbers at its ticks."""
    low, high = min(low, 0.5), max(high, 2.0)
    decades = math.log10(high / low)
    axes.set_yscale('log')
    axes.set_ylim(low / 10 ** (0.05 * decades), high * 10 ** (0.05 * decades))
    subdivisions = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subdivisions))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')


def _radial_quantiles(power, size):
    """Radii of the rings, and the 5, 50 and 95 % quantiles of the power in each, over all channels.

    A column of the half grid that represents two of the full grid counts twice.
    """
    *others, last = size
    axes = np.meshgrid(*map(np.fft.fftfreq, others), np.fft.rfftfreq(last), indexing='ij')
    radius, columns = np.sqrt(sum(np.square(axis) for axis in axes)), axes[-1]
    width = 1 / min(size)
    rings = np.round(radius / width).astype(int)
    twice = (columns > 0) & (columns < 0.5)
    result = []
    for ring in np.unique(rings):
        inside = rings == ring
        pooled = np.concatenate([power[inside].ravel(), power[inside & twice].ravel()])
        result.append((radius[inside].mean(), *np.quantile(pooled, (0.05, 0.5, 0.95))))
    radii, *quantiles = np.array(result).T
    # A dead filter has no power, which a log axis cannot show.
    return radii, *(np.where(values > 0, values, np.nan) for values in quantiles)
