"""What the corruptions share: units, the scale of lengths, separable resampling, interpolation.

Resampling along an axis is linear, so it is a matrix here: a Gaussian filter, a zoom, a box filter
differ in theirs and are applied by the same two products, to a whole batch.
"""

import math

import numpy as np

# Truncation to uint8 must not lose a level where float32 gives 56.99999 for 57.
_ROUNDING = 1e-4

_LUMA = (0.299, 0.587, 0.114)


def to_float(images):
    """uint8 pixels of 0 to 255 -> float32 in [0, 1], same shape."""
    return images.astype(np.float32) / np.float32(255)


def to_uint8(pixels):
    """float32 pixels -> uint8 of 0 to 255, same shape: clipped to [0, 1] and truncated as the authors do."""
    scaled = np.clip(pixels, 0, 1)
    scaled *= 255
    scaled += _ROUNDING
    return scaled.astype(np.uint8)


def gray(pixels):
    """float32 [..., C] -> luma [..., 1] (ITU-R BT.601, as OpenCV's RGB to grey); itself if C is 1."""
    if pixels.shape[-1] == 1:
        return pixels
    return sum(np.float32(weight) * pixels[..., c : c + 1] for c, weight in enumerate(_LUMA))


def length_scale(height, width):
    """What lengths stated for 32x32 pictures are multiplied by: 1 up to 32 pixels on the short side."""
    return max(1.0, min(height, width) / 32)


def fold(index, size, border):
    """Where indices outside of [0, size) come to lie: int array, same shape.

    Args:
        index: int array.
        size: int >= 2.
        border: as SciPy names them, 'nearest' (aa|abcd|dd), 'reflect' (ba|abcd|dc), 'mirror' (cb|abcd|cb).
    """
    if border == 'nearest':
        return np.clip(index, 0, size - 1)
    period = 2 * size if border == 'reflect' else 2 * size - 2
    index = index % period
    return np.where(index < size, index, period - index - (border == 'reflect'))


def apply_separable(pixels, rows, columns):
    """rows @ picture @ columns.T for each channel of each picture.

    One product a picture and channel, of one shape: a picture's result does not depend on the batch.

    Args:
        pixels: float32 [N, H, W, C].
        rows: float32 [H', H].
        columns: float32 [W', W].

    Returns:
        float32 [N, H', W', C].
    """
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return (rows @ (planes @ columns.T)).transpose(0, 2, 3, 1)


def gaussian_matrix(size, sigma, border, truncate):
    """A Gaussian filter along an axis: float32 [size, size], rows sum to 1.

    Args:
        size: pixels along the axis.
        sigma: standard deviation in pixels, >= 0.
        border: as in `fold`.
        truncate: the window ends after this many sigmas, rounded to whole pixels.
    """
    radius = int(truncate * sigma + 0.5)
    steps = np.arange(-radius, radius + 1)
    # A window of one pixel needs no sigma; with sigma 0 the quotient would be 0 / 0.
    weights = np.exp(-0.5 * (steps / sigma) ** 2) if radius else np.ones(1)
    matrix = np.zeros((size, size))
    for step, weight in zip(steps, weights / weights.sum()):
        np.add.at(matrix, (np.arange(size), fold(np.arange(size) + step, size, border)), weight)
    return matrix.astype(np.float32)


def zoom_matrix(size, factor):
    """Enlarge the middle of an axis, linearly: float32 [size, size], rows sum to 1.

    The authors' `clipped_zoom`: crop ceil(size / factor) pixels, stretch them over
    round(cropped * factor) so that the first and last ones meet, keep the middle `size` of these.

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


def box_matrix(size, new_size):
    """Resize an axis with Pillow's box filter: float32 [new_size, size], rows sum to 1.

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


def interpolate(pixels, rows, columns, border):
    """Bilinear interpolation at places of one's own for each picture.

    Args:
        pixels: float32 [N, H, W, C].
        rows, columns: float [N, H', W'], in pixels; centres are at whole numbers.
        border: as in `fold`.

    Returns:
        float32 [N, H', W', C].
    """
    height, width = pixels.shape[1:3]
    top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    down, right = ((x - low).astype(np.float32)[..., None] for x, low in ((rows, top), (columns, left)))
    ys = [fold(top + step, height, border) for step in (0, 1)]
    xs = [fold(left + step, width, border) for step in (0, 1)]
    picture = np.arange(len(pixels))[:, None, None]
    upper, lower = (pixels[picture, y, xs[0]] * (1 - right) + pixels[picture, y, xs[1]] * right for y in ys)
    return upper * (1 - down) + lower * down
