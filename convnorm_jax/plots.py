"""Pictures of a run as PNG files: learning curves, attacked images, spectra of layers.

Each function writes one file (200 dpi; a temporary file, then a rename, so that a reader never
sees half a picture), creates its folder, and returns its path. Nothing here touches pyplot or the
matplotlib backend of the program around it.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullLocator

# Okabe and Ito's colours, told apart with any kind of colour blindness.
BLUE, VERMILLION, GREY = '#0072B2', '#D55E00', '#6B6B6B'
_WHEN = {'before': VERMILLION, 'after': BLUE}
MAX_COLUMNS = 8
MAX_LAYERS = 6

_STYLE = {
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


def learning_curves(rows: Sequence[Mapping], path: str | os.PathLike, title: str | None = None) -> pathlib.Path:
    """Loss (nats) and accuracy (%) of training and validation against the epoch.

    Args:
      rows: as read from metrics.csv, in order: numbers or text under `epoch` (or else `step`),
        `train_loss`, `train_accuracy`, `validation_loss`, `validation_accuracy` and
        `learning_rate`; accuracies in [0, 1]. A key that is missing, None or '' leaves a gap.
      path: the PNG to write.
      title: text above the panels.

    The best epoch is that of the highest validation accuracy (or else the lowest validation loss).
    Where a constant learning rate falls, both panels have a vertical line.

    Raises:
      ValueError: no row with an epoch or a step.
    """
    axis_name, position = _positions(rows)
    best = _best_row(rows)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(7.2, 3.0, title)
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
        return _write(figure, path)


def attack_grid(
    clean: np.ndarray,
    attacked: Mapping[str, np.ndarray] | np.ndarray,
    labels: np.ndarray,
    clean_predictions: np.ndarray,
    attacked_predictions: Mapping[str, np.ndarray] | np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike,
    *,
    epsilon: float,
    title: str | None = None,
) -> pathlib.Path:
    """The first eight images: clean, then per attack the attacked one and its perturbation.

    Args:
      clean: float [N, H, W, C] in [0, 1], C of 1 or 3.
      attacked: the same images under each attack, by its name; or one array for a lone attack.
      labels: int [N], the true classes, above each column.
      clean_predictions: int [N].
      attacked_predictions: int [N] under each name of `attacked`; or one array.
      class_names: name of each class.
      path: the PNG to write.
      epsilon: above 0, in pixel units of [0, 1]; perturbations of +-epsilon fill the grey range.
      title: text above the grid.

    Raises:
      ValueError: epsilon not above 0; attacks without predictions; images of unequal shapes.
    """
    attacked = _by_name(attacked)
    attacked_predictions = _by_name(attacked_predictions)
    _check_grid(clean, attacked, attacked_predictions, epsilon)
    clean = np.asarray(clean, np.float32)
    noise_name = f'perturbation\n±{_epsilon_text(epsilon)} shown as\nblack to white'
    picture_rows = [('clean', clean, clean_predictions)]
    for name, images in attacked.items():
        noise = 0.5 + (np.asarray(images, np.float32) - clean) / (2 * epsilon)
        picture_rows.append((name, images, attacked_predictions[name]))
        picture_rows.append((noise_name, noise, None))
    columns = min(len(clean), MAX_COLUMNS)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(1.1 + 0.95 * columns, 0.3 + 1.14 * len(picture_rows), title)
        grid = figure.subplots(len(picture_rows), columns, squeeze=False)
        for axes_row, (name, images, predictions) in zip(grid, picture_rows, strict=True):
            _draw_pictures(axes_row, name, images, predictions, labels, class_names)
        _draw_header(grid[0], labels, class_names)
        return _write(figure, path)


def layer_spectra(spectra: Sequence, path: str | os.PathLike, title: str | None = None) -> pathlib.Path:
    """Power spectrum and singular values of up to six layers, before and after normalization.

    Left: power gain of the output channels against radial frequency (cycles per sample): median
    and 5-95 % band over all channels and all frequencies of a ring. Right: sorted singular
    values against rank / count; those below 1e-3 of the largest fall out of the picture.

    Args:
      spectra: like `evaluation.spectral.LayerSpectrum`; of more than six, six evenly chosen.
      path: the PNG to write.
      title: text above the panels.

    Raises:
      ValueError: no spectrum.
    """
    if not spectra:
        raise ValueError('spectra=[]: expected at least one layer')
    places = np.linspace(0, len(spectra) - 1, min(len(spectra), MAX_LAYERS)).round()
    chosen = [spectra[int(place)] for place in places]
    with matplotlib.rc_context(_STYLE):
        figure = _figure(7.2, 0.9 + 1.65 * len(chosen), title)
        grid = figure.subplots(len(chosen), 2, squeeze=False)
        for (power_axes, value_axes), spectrum in zip(grid, chosen, strict=True):
            _draw_power(power_axes, spectrum)
            _draw_singular_values(value_axes, spectrum)
        grid[-1, 0].set_xlabel('radial frequency (cycles per sample)')
        grid[-1, 1].set_xlabel('normalised index (rank / count)')
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc='outside lower center', ncols=len(names))
        return _write(figure, path)


def _figure(width, height, title):
    """A figure of its own (inches), outside pyplot, laid out so that no text is clipped."""
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure


def _write(figure, path):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        figure.savefig(temporary, format='png', dpi=200)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _column(rows, key):
    """One float per row, NaN for what is missing or empty."""
    values = (row.get(key) for row in rows)
    return np.array([math.nan if value in (None, '') else float(value) for value in values])


def _positions(rows):
    for name in ('epoch', 'step'):
        values = _column(rows, name)
        if np.isfinite(values).any():
            return name, values
    raise ValueError(f'rows={len(rows)} in number: expected one with an epoch or a step')


def _best_row(rows):
    """Index of the best row on the validation set; None without one."""
    for key, sign in (('validation_accuracy', 1), ('validation_loss', -1)):
        values = sign * _column(rows, key)
        if np.isfinite(values).any():
            return int(np.nanargmax(values))
    return None


def _draw_curve(axes, position, values, name, colour):
    # Rows of another kind (training rows between two validations) must not cut the line.
    known = np.isfinite(position) & np.isfinite(values)
    if known.any():
        # A few points read better when each is seen; a lone one shows no other way.
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
    """A faint line where a constant learning rate falls; none for one that always falls."""
    known = np.isfinite(position) & np.isfinite(rate)
    position, rate = position[known], rate[known]
    label = 'learning rate drops'
    for index in range(1, len(rate)):
        constant = index == 1 or np.isclose(rate[index - 1], rate[index - 2], rtol=0.01)
        if constant and rate[index] < 0.7 * rate[index - 1]:
            axes.axvline(position[index], color=GREY, alpha=0.5, lw=0.9, ls='--', label=label)
            label = None


def _by_name(value):
    return dict(value) if isinstance(value, Mapping) else {'attacked': value}


def _check_grid(clean, attacked, predictions, epsilon):
    if not epsilon > 0:
        raise ValueError(f'epsilon={epsilon}: expected above 0, in pixel units of [0, 1]')
    if set(attacked) != set(predictions):
        raise ValueError(f'attacked_predictions={sorted(predictions)}: expected those of {sorted(attacked)}')
    for name, images in attacked.items():
        if np.shape(images) != np.shape(clean):
            shapes = f'{np.shape(images)}: expected {np.shape(clean)}'
            raise ValueError(f'attacked[{name!r}].shape={shapes}')


def _epsilon_text(epsilon):
    levels = epsilon * 255
    return f'{levels:.0f}/255' if abs(levels - round(levels)) < 1e-3 else f'{epsilon:.3g}'


def _draw_header(axes_row, labels, class_names):
    for axes, label in zip(axes_row, labels, strict=False):
        axes.set_title(class_names[int(label)], fontsize=_name_size(class_names), color=GREY, pad=5)
    where = {'xycoords': 'axes fraction', 'textcoords': 'offset points'}
    axes_row[0].annotate('true class', (0, 1), (-8, 5), ha='right', color=GREY, **where)


def _name_size(class_names):
    """Font size (points) at which the longest name fits the width of a picture."""
    return min(9.0, 110 / max(len(name) + 2 for name in class_names))


def _draw_pictures(axes_row, name, images, predictions, labels, class_names):
    axes_row[0].set_ylabel(name, rotation=0, ha='right', va='center', labelpad=8)
    for index, axes in enumerate(axes_row):
        image = np.clip(np.asarray(images[index], np.float32), 0, 1)
        if image.shape[-1] == 1:
            image = image[..., 0]
        axes.imshow(image, cmap='gray', vmin=0, vmax=1, interpolation='nearest')
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if predictions is not None:
            right = int(predictions[index]) == int(labels[index])
            text = f'{"✓" if right else "✗"} {class_names[int(predictions[index])]}'
            colour = BLUE if right else VERMILLION
            axes.set_xlabel(text, fontsize=_name_size(class_names), color=colour, labelpad=2)


def _draw_power(axes, spectrum):
    powers = (spectrum.power_before, spectrum.power_after)
    for power, (when, colour) in zip(powers, _WHEN.items(), strict=True):
        radius, low, median, high = _radial_quantiles(power, spectrum.size)
        band, line = f'{when}, 5–95 %', f'{when}, median'
        axes.fill_between(radius, low, high, color=colour, alpha=0.22, lw=0, label=band)
        axes.plot(radius, median, color=colour, marker='o', ms=2.5, label=line)
    axes.axhline(1, color=GREY, lw=0.8, ls=':', label='gain 1')
    # The largest radius is that of the corner, sqrt(1/2): one axis for grids of every size.
    axes.set_xlim(-0.02, 0.73)
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
    # A few directions that a layer loses altogether would squeeze all the others into a line.
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
    """Radii of the rings, and the 5, 50 and 95 % quantiles of the power in each, channels pooled.

    A column of the half grid that stands for two of the full grid counts twice.
    """
    rows, columns = np.meshgrid(np.fft.fftfreq(size[0]), np.fft.rfftfreq(size[1]), indexing='ij')
    radius = np.hypot(rows, columns)
    width = 1 / min(size)
    rings = np.round(radius / width).astype(int)
    twice = (columns > 0) & (columns < 0.5)
    result = []
    for ring in np.unique(rings):
        inside = rings == ring
        pooled = np.concatenate([power[inside].ravel(), power[inside & twice].ravel()])
        result.append((radius[inside].mean(), *np.quantile(pooled, (0.05, 0.5, 0.95))))
    radii, *quantiles = np.array(result).T
    # A dead filter has no power at all, which a log axis cannot show.
    return radii, *(np.where(values > 0, values, np.nan) for values in quantiles)
