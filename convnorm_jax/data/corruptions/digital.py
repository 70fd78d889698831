"""Contrast, elastic transform, pixelation, JPEG.

Each function for `corrupt` maps images uint8 [N, H, W, C], a severity of 1 to 5 and N NumPy generators to
uint8 images of the same shape.
"""

import cv2
import numpy as np

from convnorm_jax.data.corruptions import pixels
from convnorm_jax.data.corruptions.pixels import Rngs


def contrast(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Reduces the contrast: mean + c (x - mean), where the mean is that of the image's channel."""
    del rngs
    kept = np.float32((0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1])
    # The sum of integers is exact, so the result does not depend on the batch.
    total = images.sum((1, 2), np.int64, keepdims=True)
    means = (total / (255 * images.shape[1] * images.shape[2])).astype(np.float32)
    return pixels.to_uint8((pixels.to_float(images) - means) * kept + means)


def elastic_transform(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Applies a random affine map, then a smooth random displacement of each pixel.

    The affine map moves three points of the image by up to c in each direction. The displacement is
    uniform noise in [-1, 1] after a Gaussian filter of sigma s, times a. a, s and c are shares of
    the image's short side.
    """
    a, s, c = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[severity - 1]
    height, width = images.shape[1:3]
    side = min(height, width)
    moves = np.stack([rng.uniform(-c * side, c * side, (3, 2)) for rng in rngs])
    noise = np.stack([rng.uniform(-1, 1, (height, width, 2)) for rng in rngs]).astype(np.float32)
    moved = pixels.interpolate(pixels.to_float(images), *_affine_places(moves, height, width), 'mirror')
    filters = (pixels.gaussian_matrix(size, s * side, 'reflect', 3) for size in (height, width))
    shifts = np.float32(a * side) * pixels.apply_separable(noise, *filters)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    return pixels.to_uint8(pixels.interpolate(moved, rows + shifts[..., 1], columns + shifts[..., 0], 'reflect'))


def _affine_places(moves: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Position in the old image of each pixel of the moved one: rows and columns, float64 [N, H, W]."""
    centre, arm = np.array([width // 2, height // 2]), min(height, width) // 3
    before = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    after = np.concatenate([before + moves, np.ones((len(moves), 3, 1))], 2)
    maps = np.linalg.solve(after, np.broadcast_to(before.astype(float), moves.shape))
    rows, columns = np.mgrid[:height, :width]
    x, y = (
        maps[:, 0, axis, None, None] * columns + maps[:, 1, axis, None, None] * rows + maps[:, 2, axis, None, None]
        for axis in (0, 1)
    )
    return y, x


def pixelate(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Resizes to int(c H) by int(c W) pixels with Pillow's box filter, and back to H by W with the same."""
    del rngs
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = images.shape[1:3]
    small = [int(share * size) for size in (height, width)]
    values = images.astype(np.float32)
    # Pillow resizes one axis after the other and rounds to whole levels in between.
    for rows, columns in (
        (np.eye(height, dtype=np.float32), pixels.box_matrix(width, small[1])),
        (pixels.box_matrix(height, small[0]), np.eye(small[1], dtype=np.float32)),
    ):
        values = np.floor(pixels.apply_separable(values, rows, columns) + np.float32(0.5))
    rows, columns = (pixels.box_matrix(new, old).argmax(1) for new, old in zip(small, (height, width)))
    return values.astype(np.uint8)[:, rows[:, None], columns]


def jpeg_compression(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Encodes by libjpeg's baseline JPEG of quality c, colour at half the resolution (4:2:0), and decodes."""
    del rngs
    quality = (80, 65, 58, 50, 40)[severity - 1]
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality]
    out = np.empty_like(images)
    for i, image in enumerate(images):
        # OpenCV's order is blue, green, red; reversing the one channel of a grey image changes nothing.
        _, code = cv2.imencode('.jpg', image[:, :, ::-1], settings)
        out[i] = np.asarray(cv2.imdecode(code, cv2.IMREAD_UNCHANGED)).reshape(image.shape)[:, :, ::-1]
    return out
