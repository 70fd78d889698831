"""The fifteen common corruptions at five severities, computed on the host when they are needed.

After Hendrycks and Dietterich 2019 (arXiv 1903.12261) with the constants of CIFAR-10-C (the
authors' `make_cifar_c.py`), in NumPy and OpenCV. Severities 1 to 5 are the authors'. There is no
severity 0: that would be the clean images.

How far the result compares with CIFAR-10-C, for 32x32 colour images:

- The random numbers differ, so no image is identical, but the distribution is the same. Given the
  same random numbers, the authors' code makes the same images, except for a level here and there where
  float32 rounds to the other side of a whole number before truncation.
- frost is not comparable: the authors blend photographs in, this package grows crystals (`crystals.py`).
- elastic_transform interpolates at the exact position; OpenCV before 5 rounds to 1/32 pixel.
- glass_blur does what the authors' code does, not what it says (see `blur.glass_blur`).

The authors ordered the severities by eye and by the errors of nets. The mean squared difference falls with
severity in elastic_transform, and does not always rise in glass_blur, frost and motion_blur.

Other sizes, from 8x8: lengths in pixels (radii, widths, displacements, the size of flakes and
crystals) are multiplied by max(1, min(H, W) / 32). They are not made smaller than on 32x32
images, because the weaker blurs are well below a pixel there already. What the authors define relative to
the image (zoom_blur, pixelate, elastic_transform, the fractal of fog) stays relative, in both
directions, and in whole pixels where theirs is. On 8x8 images severities 1 and 2 of pixelate are therefore
the same, so are 3 and 4, and zoom_blur does nothing at severity 1. JPEG has blocks of 8x8 pixels at any size.

- ``noise``: gaussian_noise, shot_noise, impulse_noise
- ``blur``: defocus_blur, glass_blur, motion_blur, zoom_blur
- ``weather``: snow, frost, fog, brightness
- ``digital``: contrast, elastic_transform, pixelate, jpeg_compression
- ``crystals``: the crystals of frost
- ``pixels``: units, scales and separable resampling, which the others share
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from convnorm_jax.data.corruptions import blur, digital, noise, weather
from convnorm_jax.data.corruptions.pixels import Rngs
from convnorm_jax.errors import UserError

_FUNCTIONS: dict[str, Callable[[np.ndarray, int, Rngs], np.ndarray]] = {
    'gaussian_noise': noise.gaussian_noise,
    'shot_noise': noise.shot_noise,
    'impulse_noise': noise.impulse_noise,
    'defocus_blur': blur.defocus_blur,
    'glass_blur': blur.glass_blur,
    'motion_blur': blur.motion_blur,
    'zoom_blur': blur.zoom_blur,
    'snow': weather.snow,
    'frost': weather.frost,
    'fog': weather.fog,
    'brightness': weather.brightness,
    'contrast': digital.contrast,
    'elastic_transform': digital.elastic_transform,
    'pixelate': digital.pixelate,
    'jpeg_compression': digital.jpeg_compression,
}
CORRUPTIONS = tuple(_FUNCTIONS)
SEVERITIES = (1, 2, 3, 4, 5)

# Values in one chunk: its float32 temporaries stay within about ten MiB, close to the processor's cache.
_CHUNK_VALUES = 1 << 20
_SMALLEST_SIDE = 8


def corrupt(
    images: np.ndarray, name: str, severity: int, seed: int, indices: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Corrupts each image.

    The random numbers of an image depend on (seed, name, severity, its index) alone, and its result on these and
    its pixels. So a subset with the right indices gives the same images as the whole data set.

    >>> images = np.zeros((2, 32, 32, 3), np.uint8)
    >>> corrupt(images, 'gaussian_noise', severity=3, seed=0).shape
    (2, 32, 32, 3)

    Args:
        images: uint8 [N, H, W, C], H and W at least 8, C 1 (grey) or 3 (RGB). Not changed.
        name: one of `CORRUPTIONS`.
        severity: one of `SEVERITIES`.
        seed: int >= 0.
        indices: N ints >= 0, the index of each image in its data set; by default 0 to N - 1.

    Returns:
        uint8 [N, H, W, C].

    Raises:
        ValueError: an invalid name, severity, seed or index, or images of another shape or dtype.
    """
    images = np.asarray(images)
    _check(images, name, severity, seed)
    numbers = _checked_indices(indices, len(images))
    function, number = _FUNCTIONS[name], CORRUPTIONS.index(name)
    out = np.empty_like(images)
    chunk = max(1, _CHUNK_VALUES // max(1, images[:1].size))
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        rngs = [_generator(seed, number, severity, index) for index in numbers[part]]
        out[part] = function(images[part], severity, rngs)
    return out


class MeanAccuracies(TypedDict):
    """The means of `mean_corruption_accuracy`."""

    corruptions: dict[str, float]
    mean: float


def mean_corruption_accuracy(table: Mapping[str, Mapping[int, float]]) -> MeanAccuracies:
    """Means of a table of accuracies: over the severities of each corruption, then over the corruptions.

    The overall mean is one minus the mean corruption error of arXiv 1903.12261 without its division
    by AlexNet's errors, as is usual for CIFAR-10-C. Clean accuracy is not part of it.

    >>> mean_corruption_accuracy({'fog': {1: 0.75, 2: 0.25}, 'snow': {1: 1.0, 2: 0.5}})
    {'corruptions': {'fog': 0.5, 'snow': 0.75}, 'mean': 0.625}

    Args:
        table: {name: {severity: accuracy}} for any of `CORRUPTIONS`, the same severities for each.

    Returns:
        {'corruptions': {name: mean over severities}, 'mean': mean of these}: floats in the
        table's unit, in the table's order.

    Raises:
        ValueError: an empty table, an invalid name or severity, severities that differ
            between corruptions (the means would not be comparable), or an accuracy that is not finite.
    """
    if not table:
        raise UserError('table={}: expected accuracies of at least one corruption')
    first = set(next(iter(table.values())))
    for name, row in table.items():
        if name not in CORRUPTIONS:
            raise UserError(f'table has name={name!r}: expected one of {", ".join(CORRUPTIONS)}')
        if not row or set(row) != first or not first <= set(SEVERITIES):
            raise UserError(
                f'table[{name!r}] has severities={list(row)}: expected the same for every corruption, '
                f'some or all of {SEVERITIES}'
            )
        if not np.all(np.isfinite(list(row.values()))):
            raise UserError(f'table[{name!r}]={row}: expected finite accuracies')
    means = {name: float(np.mean(list(row.values()))) for name, row in table.items()}
    return {'corruptions': means, 'mean': float(np.mean(list(means.values())))}


def _generator(seed: int, number: int, severity: int, index: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, int(severity), int(index))))


def _checked_indices(indices: Any, count: int) -> np.ndarray:
    checked = np.arange(count) if indices is None else np.asarray(indices)
    if checked.shape != (count,) or (count and (checked.dtype.kind not in 'iu' or checked.min() < 0)):
        raise UserError(
            f'indices={indices!r}: expected {count} whole numbers >= 0, one for each image, or None for 0 to N - 1'
        )
    return checked


def _check(images: np.ndarray, name: str, severity: int, seed: int) -> None:
    if name not in CORRUPTIONS:
        raise UserError(f'name={name!r}: expected one of {", ".join(CORRUPTIONS)}')
    if not hasattr(severity, '__index__') or severity not in SEVERITIES:
        raise UserError(f'severity={severity!r}: expected one of {SEVERITIES}; for 0 use the clean images')
    if not hasattr(seed, '__index__') or operator.index(seed) < 0:
        raise UserError(f'seed={seed!r}: expected a whole number >= 0')
    if images.dtype != np.uint8:
        raise UserError(f'images.dtype={images.dtype}: expected uint8 pixels of 0 to 255')
    if images.ndim != 4 or images.shape[3] not in (1, 3) or min(images.shape[1:3]) < _SMALLEST_SIDE:
        raise UserError(
            f'images.shape={images.shape}: expected [N, H, W, C] with H and W at least {_SMALLEST_SIDE} and C 1 or 3'
        )
