"""What all figures share: style, colours, a figure without pyplot, and its PNG file."""

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sized
from typing import Any

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convnorm_jax.errors import UserError
from convnorm_jax.files import write_atomically, written

# Okabe and Ito's colours, which are distinct under every kind of colour blindness.
BLUE, VERMILLION, GREY = '#0072B2', '#D55E00', '#6B6B6B'
GREEN, ORANGE, PURPLE, SKY = '#009E73', '#E69F00', '#CC79A7', '#56B4E9'

_COLUMN_WIDTH = 3.5  # inches

# Pass it to `matplotlib.rc_context` around all drawing and writing. Any: matplotlib types every key by name.
STYLE: Any = {
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
    """Makes a figure without pyplot, with a layout that clips no text.

    Args:
      width: inches.
      height: inches.
      title: text above the figure.
    """
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure


def column_figure(height: float, title: str | None) -> Figure:
    """Makes a figure as wide as a column of a paper, with the title broken into lines that fit.

    Args:
      height: inches, without the title.
      title: text above the figure.
    """
    lines = textwrap.wrap(title or '', 38)
    return new_figure(_COLUMN_WIDTH, height + 0.19 * len(lines), '\n'.join(lines))


def check_panels(panels: Mapping[str, Sized], word: str) -> None:
    """Raises UserError for no panel, or for one that is empty; `word` says what it lacks."""
    for name, panel in panels.items():
        if not panel:
            raise UserError(f'panels[{name!r}]={panel!r}: expected at least one {word}')
    if not panels:
        raise UserError('panels={}: expected at least one')


def write(figure: Figure, path: str | os.PathLike) -> pathlib.Path:
    """Writes a figure as a PNG of 200 dpi and returns its path.

    Makes the folder. The file is written under a temporary name and renamed, so a reader never sees half of it.
    """
    path = pathlib.Path(path)
    if jax.process_index():
        return path  # one process of a run writes
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format='png', dpi=200))
    return path
