"""Attacked images and the net's predictions for them."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.plots.figure import BLUE, GREY, STYLE, VERMILLION, new_figure, write

MAX_COLUMNS = 8


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
    """Draws the first eight images: the clean ones, then for each attack the attacked ones and their perturbations.

    Args:
      clean: float [N, H, W, C] in [0, 1], C of 1 or 3.
      attacked: the same images under each attack, by its name; or one array for a single attack.
      labels: int [N], the true classes, written above the columns.
      clean_predictions: int [N].
      attacked_predictions: int [N] under each name of `attacked`; or one array.
      class_names: name of each class.
      path: the PNG to write.
      epsilon: above 0, in pixel units of [0, 1]; perturbations of +-epsilon span the grey range.
      title: text above the grid.

    Returns:
      The path.

    Raises:
      ValueError: epsilon not above 0; attacks without predictions; images of unequal shapes.
    """
    attacks, predictions = _by_name(attacked), _by_name(attacked_predictions)
    _check_grid(clean, attacks, predictions, epsilon)
    clean = np.asarray(clean, np.float32)
    noise_name = f'perturbation\n±{_epsilon_text(epsilon)} shown as\nblack to white'
    rows: list[tuple[str, np.ndarray, np.ndarray | None]] = [('clean', clean, clean_predictions)]
    for name, images in attacks.items():
        noise = 0.5 + (np.asarray(images, np.float32) - clean) / (2 * epsilon)
        rows.append((name, images, predictions[name]))
        rows.append((noise_name, noise, None))
    columns = min(len(clean), MAX_COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(1.1 + 0.95 * columns, 0.3 + 1.14 * len(rows), title)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes_row, (name, images, predicted) in zip(grid, rows, strict=True):
            _draw_images(axes_row, name, images, predicted, labels, class_names)
        _draw_header(grid[0], labels, class_names)
        return write(figure, path)


def _by_name(value: Mapping[str, np.ndarray] | np.ndarray) -> dict[str, np.ndarray]:
    return dict(value) if isinstance(value, Mapping) else {'attacked': value}


def _check_grid(clean, attacked, predictions, epsilon):
    if not epsilon > 0:
        raise UserError(f'epsilon={epsilon}: expected above 0, in pixel units of [0, 1]')
    if set(attacked) != set(predictions):
        raise UserError(f'attacked_predictions={sorted(predictions)}: expected those of {sorted(attacked)}')
    for name, images in attacked.items():
        if np.shape(images) != np.shape(clean):
            shapes = f'{np.shape(images)}: expected {np.shape(clean)}'
            raise UserError(f'attacked[{name!r}].shape={shapes}')


def _epsilon_text(epsilon):
    levels = epsilon * 255
    return f'{levels:.0f}/255' if abs(levels - round(levels)) < 1e-3 else f'{epsilon:.3g}'


def _draw_header(axes_row, labels, class_names):
    for axes, label in zip(axes_row, labels, strict=False):
        axes.set_title(class_names[int(label)], fontsize=_name_size(class_names), color=GREY, pad=5)
    where = {'xycoords': 'axes fraction', 'textcoords': 'offset points'}
    axes_row[0].annotate('true class', (0, 1), (-8, 5), ha='right', color=GREY, **where)


def _name_size(class_names):
    """Font size (points) at which the longest name is as wide as an image."""
    return min(9.0, 110 / max(len(name) + 2 for name in class_names))


def _draw_images(axes_row, name, images, predictions, labels, class_names):
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
