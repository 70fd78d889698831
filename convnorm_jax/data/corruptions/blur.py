"""Blurs.

Each function for `corrupt` maps images uint8 [N, H, W, C], a severity of 1 to 5 and N NumPy generators to
uint8 images of the same shape.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from convnorm_jax.data.corruptions import pixels
from convnorm_jax.data.corruptions.pixels import Rngs


def defocus_blur(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Convolves with `disk_kernel`; the border is mirrored."""
    del rngs
    radius, smoothing = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    kernel = disk_kernel(radius, smoothing, pixels.length_scale(*images.shape[1:3]))
    blurred = [cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REFLECT_101) for x in pixels.to_float(images)]
    return pixels.to_uint8(np.stack(blurred).reshape(images.shape))


def disk_kernel(radius: float, smoothing: float, scale: float) -> np.ndarray:
    """A disk smoothed by a Gaussian: float32 [K, K], K odd, sums to 1.

    Args:
        radius: in pixels of a 32x32 image; the disk holds the pixels whose centres lie within it.
            A radius below 1 is one pixel on a 32x32 image; it stays a single point at any scale.
        smoothing: standard deviation of the Gaussian in the same pixels; its window is 3x3.
        scale: `length_scale` of the image: multiplies radius, smoothing and window.
    """
    reach = max(1, round(scale))
    radius = radius * scale if radius >= 1 else 0
    half = math.floor(radius) + reach
    steps = np.arange(-half, half + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.float32)
    window = cv2.getGaussianKernel(2 * reach + 1, smoothing * scale, cv2.CV_32F)
    return cv2.sepFilter2D(disk / disk.sum(), -1, window, window, borderType=cv2.BORDER_CONSTANT)


def glass_blur(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Blurs by a Gaussian, replaces each pixel by one from a random place up and left of it, blurs again.

    The authors mean to swap neighbours, but their swap of NumPy views copies: pixel (h, w) becomes
    pixel (h + dy, w + dx), dy and dx from -d to d - 1. They go from the last pixel to the first, so no
    place is read after it is written. Each pass is therefore a gather from the image before
    it. This is what CIFAR-10-C holds and what is done here, for d > 1 on larger images too.
    The outermost pixels stay.
    """
    sigma, passes = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    (height, width), scale = images.shape[1:3], pixels.length_scale(*images.shape[1:3])
    reach = max(1, round(scale))
    blurred = pixels.to_uint8(_gaussian(pixels.to_float(images), sigma * scale))
    inner = np.s_[:, reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    rows, columns = np.mgrid[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    shifts = np.stack([rng.integers(-reach, reach, (passes, 2, *rows.shape), np.int32) for rng in rngs])
    image = np.arange(len(images))[:, None, None]
    for step in range(passes):
        blurred[inner] = blurred[image, rows + shifts[:, step, 0], columns + shifts[:, step, 1]]
    return pixels.to_uint8(_gaussian(pixels.to_float(blurred), sigma * scale))


def motion_blur(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Smears the image by a one-sided Gaussian along a line at an angle uniform in [-45, 45] degrees."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    angles = [rng.uniform(-45, 45) for rng in rngs]
    return smear(images, radius, sigma, angles)


def smear(images: np.ndarray, radius: float, sigma: float, angles: Sequence[float]) -> np.ndarray:
    """Blurs as ImageMagick's motion blur does: the border pixels continue outside the image; rounds to levels.

    Args:
        images: uint8 [N, H, W, C].
        radius: in pixels of a 32x32 image, see `motion_kernel`.
        sigma: in pixels of a 32x32 image, see `motion_kernel`.
        angles: N angles in degrees.

    Returns:
        uint8 [N, H, W, C].
    """
    scale = pixels.length_scale(*images.shape[1:3])
    out = np.empty_like(images)
    for i, angle in enumerate(angles):
        kernel, anchor = motion_kernel(radius * scale, sigma * scale, angle)
        blurred = cv2.filter2D(images[i], -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
        out[i] = blurred.reshape(images.shape[1:])
    return out


def motion_kernel(radius: float, sigma: float, angle: float) -> tuple[np.ndarray, tuple[int, int]]:
    """ImageMagick's kernel of `-motion-blur`: a ray of 2 ceil(radius) + 1 pixels with Gaussian weights.

    Args:
        radius: in pixels.
        sigma: in pixels.
        angle: in degrees; 0 points right, 90 down.

    Returns:
        (kernel, anchor): float32 [h, w] that sums to 1, for a correlation with an image, and the
        (column, row) of the kernel's origin, as OpenCV expects it.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    columns, rows = (
        np.ceil(steps * direction - 0.5).astype(int)
        for direction in (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
    )
    anchor = (-int(columns.min()), -int(rows.min()))
    kernel = np.zeros((rows.max() + anchor[1] + 1, columns.max() + anchor[0] + 1))
    np.add.at(kernel, (rows + anchor[1], columns + anchor[0]), weights / weights.sum())
    return kernel.astype(np.float32), anchor


def zoom_blur(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Mean of the image and its enlargements by 1.00, 1.01, ... up to 1.05 at severity 1 and 1.25 at severity 5."""
    del rngs
    # The authors' np.arange: rounding decides whether its end is one of the factors.
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    height, width = images.shape[1:3]
    planes = pixels.to_float(images).transpose(0, 3, 1, 2).copy()
    total = planes.copy()
    for factor in factors:
        total += pixels.zoom_matrix(height, factor) @ (planes @ pixels.zoom_matrix(width, factor).T)
    total /= len(factors) + 1
    return pixels.to_uint8(total.transpose(0, 2, 3, 1))


def _gaussian(values: np.ndarray, sigma: float) -> np.ndarray:
    height, width = values.shape[1:3]
    rows, columns = (pixels.gaussian_matrix(size, sigma, 'nearest', 4) for size in (height, width))
    return pixels.apply_separable(values, rows, columns)
