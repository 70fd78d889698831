"""What every picture shares: style, colours, a figure outside pyplot, and its PNG file."""

import os
import pathlib

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convnorm_jax.files import write_atomically, written

# Okabe and Ito's colours, told apart with any kind of colour blindness.
BLUE, VERMILLION, GREY = '#0072B2', '#D55E00', '#6B6B6B'
GREEN, ORANGE, PURPLE, SKY = '#009E73', '#E69F00', '#CC79A7', '#56B4E9'

# To be given to `matplotlib.rc_context` around the whole of a drawing, writing included.
STYLE = {
    'font.family': 'DejaVu Sans',
    'font.size': 9,
    'axes.titlesize': 10,
    'figure.titlesize': 11,
    'legend.fontsize': 8,
    'legend.edgecolor': 'none',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#DDDDDD',
    'grid.linewidth': 0.6,
    'lines.linewidth': 1.5,
}


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """A figure of its own (inches), outside pyplot, laid out so that no text is clipped."""
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure


def write(figure: Figure, path: str | os.PathLike) -> pathlib.Path:
    """Writes a figure as a PNG of 200 dpi and returns its path.

    The folder is made; the file appears whole, by a rename, or not at all.
    """
    path = pathlib.Path(path)
    if jax.process_index():
        return path  # of many processes, one writes
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format='png', dpi=200))
    return path
