"""Units, the scale of lengths, separable resampling and interpolation, which the corruptions share.

Resampling along an axis is linear, so it is a matrix here. A Gaussian filter, a zoom and a box filter
differ in their matrices only; the same two products apply them to a whole batch.
"""

import math
from collections.abc import Sequence

import numpy as np

Rngs = Sequence[np.random.Generator]  # one for each image

# Truncation to uint8 must not lose a level where float32 gives 56.99999 for 57.
_ROUNDING = 1e-4

_LUMA = (0.299, 0.587, 0.114)


def to_float(images: np.ndarray) -> np.ndarray:
    """Converts uint8 pixels of 0 to 255 to float32 in [0, 1], of the same shape."""
    return images.astype(np.float32) / np.float32(255)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Converts float32 pixels to uint8 of 0 to 255: clipped to [0, 1] and truncated as the authors do."""
    scaled = np.clip(pixels, 0, 1)
    scaled *= 255
    scaled += _ROUNDING
    return scaled.astype(np.uint8)


def gray(pixels: np.ndarray) -> np.ndarray:
    """The luma [..., 1] of float32 [..., C] (ITU-R BT.601, as OpenCV's RGB to grey); unchanged if C is 1."""
    if pixels.shape[-1] == 1:
        return pixels
    red, green, blue = (np.float32(weight) * pixels[..., c : c + 1] for c, weight in enumerate(_LUMA))
    return red + green + blue


def length_scale(height: int, width: int) -> float:
    """Factor of the lengths stated for 32x32 images: 1 up to 32 pixels on the short side."""
    return max(1.0, min(height, width) / 32)


def fold(index: np.ndarray, size: int, border: str) -> np.ndarray:
    """Maps indices outside [0, size) into it, as a border mode says: int array, same shape.

    Args:
        index: int array.
        size: int >= 2.
        border: SciPy's name: 'nearest' (aa|abcd|dd), 'reflect' (ba|abcd|dc), 'mirror' (cb|abcd|cb).
    """
    if border == 'nearest':
        return np.clip(index, 0, size - 1)
    period = 2 * size if border == 'reflect' else 2 * size - 2
    index = index % period
    return np.where(index < size, index, period - index - (border == 'reflect'))


def apply_separable(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Computes rows @ image @ columns.T for each channel of each image.

    There is one product of one shape for each image and channel, so that the result does not depend on the batch.

    Args:
        pixels: float32 [N, H, W, C].
        rows: float32 [H', H].
        columns: float32 [W', W].

    Returns:
        float32 [N, H', W', C].
    """
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return (rows @ (planes @ columns.T)).transpose(0, 2, 3, 1)


def gaussian_matrix(size: int, sigma: float, border: str, truncate: float) -> np.ndarray:
    """The matrix of a Gaussian filter along an axis: float32 [size, size], rows sum to 1.

    Args:
        size: pixels along the axis.
        sigma: standard deviation in pixels, >= 0.
        border: see `fold`.
        truncate: the window ends after this many sigmas, rounded to whole pixels.
    """
    radius = int(truncate * sigma + 0.5)
    steps = np.arange(-radius, radius + 1)
    # Sigma 0 gives a window of one pixel, where the quotient would be 0 / 0.
    weights = np.exp(-0.5 * (steps / sigma) ** 2) if radius else np.ones(1)
    matrix = np.zeros((size, size))
    for step, weight in zip(steps, weights / weights.sum()):
        np.add.at(matrix, (np.arange(size), fold(np.arange(size) + step, size, border)), weight)
    return matrix.astype(np.float32)


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """The matrix that enlarges the middle of an axis linearly: float32 [size, size], rows sum to 1.

    The authors' `clipped_zoom`: crops ceil(size / factor) pixels, stretches them over
    round(cropped * factor) so that the first and the last pixels coincide, and keeps the middle `size` of these.

    Args:
        size: pixels along the axis, at least 2.
        factor: >= 1.
    """
    cropped = math.ceil(size / factor)
    stretched = round(cropped * factor)
    first = (stretched - size) // 2
    place = np.arange(first, first + size) * ((cropped - 1) / (stretched - 1))
    low = np.minimum(place.astype(int), cropped - 2)
    matrix = np.zeros((size, size))
    offset = (size - cropped) // 2
    matrix[np.arange(size), offset + low] = 1 - (place - low)
    matrix[np.arange(size), offset + low + 1] = place - low
    return matrix.astype(np.float32)


def box_matrix(size: int, new_size: int) -> np.ndarray:
    """The matrix of Pillow's box filter that resizes an axis: float32 [new_size, size], rows sum to 1.

    A new pixel is the mean of the old ones whose centres it covers, or the nearest one if it covers none.
    """
    # Pillow's expressions in Pillow's order: their rounding decides what is a tie.
    ratio = size / new_size
    reach = max(ratio, 1.0)
    centres = ((np.arange(new_size) + 0.5) * ratio)[:, None]
    index = np.arange(size)
    distance = (index - centres + 0.5) * (1 / reach)
    window = (index >= np.floor(centres - 0.5 * reach + 0.5)) & (index < np.floor(centres + 0.5 * reach + 0.5))
    covered = window & (distance > -0.5) & (distance <= 0.5)
    return (covered / covered.sum(1, keepdims=True)).astype(np.float32)


def interpolate(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray, border: str) -> np.ndarray:
    """Interpolates each image bilinearly at positions of its own.

    Args:
        pixels: float32 [N, H, W, C].
        rows: float [N, H', W'], in pixels; centres are at whole numbers.
        columns: float [N, H', W'], in pixels; centres are at whole numbers.
        border: see `fold`.

    Returns:
        float32 [N, H', W', C].
    """
    height, width = pixels.shape[1:3]
    top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    down, right = ((x - low).astype(np.float32)[..., None] for x, low in ((rows, top), (columns, left)))
    ys = [fold(top + step, height, border) for step in (0, 1)]
    xs = [fold(left + step, width, border) for step in (0, 1)]
    image = np.arange(len(pixels))[:, None, None]
    upper, lower = (pixels[image, y, xs[0]] * (1 - right) + pixels[image, y, xs[1]] * right for y in ys)
    return upper * (1 - down) + lower * down
