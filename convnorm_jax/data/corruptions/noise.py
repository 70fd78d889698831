"""Noise that is independent for each pixel and channel.

Each function maps images uint8 [N, H, W, C], a severity of 1 to 5 and N NumPy generators to uint8 images of the
same shape.
"""

import numpy as np

from convnorm_jax.data.corruptions import pixels
from convnorm_jax.data.corruptions.pixels import Rngs


def gaussian_noise(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Adds Gaussian noise: x + N(0, c^2), x in [0, 1]."""
    sigma = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    noise = np.stack([rng.standard_normal(images.shape[1:], np.float32) for rng in rngs])
    return pixels.to_uint8(pixels.to_float(images) + np.float32(sigma) * noise)


def shot_noise(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Draws Poisson counts: Poisson(c x) / c, x in [0, 1], of mean x and variance x / c."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    counts = [rng.poisson(image * (photons / 255)) for rng, image in zip(rngs, images)]
    return pixels.to_uint8(np.stack(counts).astype(np.float32) / np.float32(photons))


def impulse_noise(images: np.ndarray, severity: int, rngs: Rngs) -> np.ndarray:
    """Sets a share c of all values, half of them to 0 and half to 255 (scikit-image's salt and pepper)."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    chance = np.stack([rng.random(images.shape[1:], np.float32) for rng in rngs])
    out = np.where(chance < share, np.uint8(255), images)
    out[chance < share / 2] = 0
    return out
