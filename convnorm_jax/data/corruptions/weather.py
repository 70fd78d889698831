"""Snow, frost, fog, brightness.

Each function for `corrupt` maps images uint8 [N, H, W, C], a severity of 1 to 5 and N NumPy generators to
uint8 images of the same shape.
"""

import numpy as np

from convnorm_jax.data.corruptions import blur, crystals, pixels
from convnorm_jax.data.corruptions.pixels import Rngs


def snow(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Adds smeared flakes, and the same flakes turned by 180 degrees, to a whitened image.

    Flakes are normal noise, enlarged, and set to zero below a threshold. They fall at an angle uniform
    in [-135, -45] degrees.
    """
    mean, sigma, zoom, threshold, radius, blur_sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    size = images.shape[1:3]
    noise = np.stack([rng.standard_normal((*size, 1), np.float32) for rng in rngs])
    angles = [rng.uniform(-135, -45) for rng in rngs]
    rows, columns = (pixels.zoom_matrix(n, zoom * pixels.length_scale(*size)) for n in size)
    flakes = pixels.apply_separable(np.float32(mean) + np.float32(sigma) * noise, rows, columns)
    flakes = np.where(flakes < threshold, np.float32(0), flakes)
    layer = pixels.to_float(blur.smear(pixels.to_uint8(flakes), radius, blur_sigma, angles))
    x = pixels.to_float(images)
    whitened = np.maximum(x, pixels.gray(x) * np.float32(1.5) + np.float32(0.5))
    out = np.float32(kept) * x + np.float32(1 - kept) * whitened
    return pixels.to_uint8(out + layer + layer[:, ::-1, ::-1])


def frost(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Computes a x + b plate, with a random crop of one of this package's own plates (`crystals.plates`).

    Not comparable to CIFAR-10-C: a and b are the authors', the frost is not.
    """
    kept, strength = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    height, width = images.shape[1:3]
    plates = crystals.plates(height, width)
    crops = []
    for rng in rngs:
        plate = plates[rng.integers(len(plates))]
        top, left = rng.integers(0, (plate.shape[0] - height, plate.shape[1] - width))
        crops.append(plate[top : top + height, left : left + width])
    layer = pixels.to_float(np.stack(crops))
    if images.shape[3] == 1:
        layer = pixels.gray(layer)
    return pixels.to_uint8(np.float32(kept) * pixels.to_float(images) + np.float32(strength) * layer)


def fog(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Computes (x + a plasma) max(x) / (max(x) + a), with `plasma_fractal`."""
    strength, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    height, width = images.shape[1:3]
    size = 1 << (max(height, width) - 1).bit_length()
    clouds = plasma_fractal(rngs, size, decay)[:, :height, :width, None].astype(np.float32)
    x = pixels.to_float(images)
    brightest = x.max((1, 2, 3), keepdims=True)
    amount = np.float32(strength)
    return pixels.to_uint8((x + amount * clouds) * (brightest / (brightest + amount)))


def plasma_fractal(rngs: Rngs, size: int, decay: float) -> np.ndarray:
    """Draws clouds by the diamond-square algorithm, periodic, from 0 to 1: float64 [N, size, size].

    At each step the middles of the squares, then those of the diamonds, become the mean of their four
    corners plus a number uniform in [-a, a]; a falls by decay^2 as the squares halve.

    Args:
        rngs: N NumPy generators, one for each map.
        size: a power of two.
        decay: the authors' wibbledecay; a larger one gives smoother clouds.
    """
    wobble = np.stack([rng.uniform(-1, 1, size * size - 1) for rng in rngs])
    used = 0
    heights = np.zeros((len(rngs), size, size))
    step, amplitude = size, 100.0**2
    while step >= 2:
        half, across = step // 2, size // step
        new = []
        for _ in range(3):
            draw = wobble[:, used : used + across * across].reshape(-1, across, across)
            new.append(amplitude * draw)
            used += across * across
        corners = heights[:, ::step, ::step]
        sums = corners + np.roll(corners, -1, 1)
        middles = (sums + np.roll(sums, -1, 2)) / 4 + new[0]
        heights[:, half::step, half::step] = middles
        heights[:, ::step, half::step] = (
            middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 2)
        ) / 4 + new[1]
        heights[:, half::step, ::step] = (
            middles + np.roll(middles, 1, 2) + corners + np.roll(corners, -1, 1)
        ) / 4 + new[2]
        step, amplitude = half, amplitude / decay**2
    heights -= heights.min((1, 2), keepdims=True)
    return heights / heights.max((1, 2), keepdims=True)


def brightness(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Raises the value of HSV by c, up to 1; hue and saturation stay.

    The value is the largest channel, and the others are proportional to it at constant hue and
    saturation. So all are multiplied by new value / old value; black becomes grey.
    """
    del rngs
    x = pixels.to_float(images)
    value = x.max(3, keepdims=True)
    raised = np.minimum(value + np.float32((0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]), 1)
    return pixels.to_uint8(np.where(value > 0, x * (raised / np.maximum(value, np.float32(1e-6))), raised))
