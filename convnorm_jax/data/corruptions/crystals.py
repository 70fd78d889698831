"""Frost from crystals that are grown from fixed seeds, in place of the authors' photographs.

The authors blend in photographs of frosted windows, whose licence does not allow them to be shipped here.
Accuracies under this corruption are therefore not comparable to CIFAR-10-C's. Each plate has about the mean
colour and contrast of one of the authors' photographs at their scale, so that the corruption is about as strong;
its pattern, straight branches at 60 degrees on a haze, is new.
"""

import cmath
import functools
import itertools
import math

import cv2
import numpy as np

from convnorm_jax.data.corruptions import pixels

# Mean red, green and blue, and the standard deviation of all three, of each plate, in levels of 255.
_TONES = ((80, 150, 165, 20), (200, 205, 214, 22), (200, 205, 214, 22), (138, 153, 166, 30), (112, 123, 135, 43))

_PLATE = 128  # side of a plate for 32x32 images, in pixels
_CRYSTALS_PER_PIXEL = 30 / _PLATE**2
_BRANCHINGS = (0.12, 0.28, 0.44, 0.6, 0.76)  # along a branch
_OVERSAMPLING = 4
_LINE_BITS = 4  # OpenCV draws lines to 1/16 pixel


def plates(height: int, width: int) -> np.ndarray:
    """The five plates for images of a size; the same at every call and for every seed.

    Args:
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        uint8 [5, S, S, 3], S at least twice the image's longer side. Read-only.
    """
    scale = pixels.length_scale(height, width)
    return _grow(max(round(_PLATE * scale), 2 * max(height, width)), scale)


@functools.lru_cache(maxsize=4)
def _grow(side: int, scale: float) -> np.ndarray:
    grown = np.stack([_plate(number, side, scale) for number in range(len(_TONES))])
    grown.flags.writeable = False
    return grown


def _plate(number: int, side: int, scale: float) -> np.ndarray:
    rng = np.random.default_rng(number)
    fine = side * _OVERSAMPLING
    canvas = np.zeros((fine, fine), np.uint8)
    for _ in range(round(_CRYSTALS_PER_PIXEL * (side / scale) ** 2)):
        start, angle = complex(*rng.uniform(0, fine, 2)), rng.uniform(0, 2 * math.pi)
        for turn in range(6 if rng.random() < 0.5 else 1):
            length = scale * _OVERSAMPLING * rng.uniform(12, 40)
            _draw_branch(canvas, rng, start, cmath.rect(length, angle + turn * math.pi / 3), depth=2)
    crystals = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    haze = cv2.GaussianBlur(rng.standard_normal((side, side)).astype(np.float32), (0, 0), 4 * scale)
    pattern = crystals / crystals.std() + 0.5 * haze / haze.std()
    pattern = (pattern - pattern.mean()) / pattern.std()
    *colour, spread = _TONES[number]
    return np.clip(np.array(colour) + spread * pattern[:, :, None], 0, 255).astype(np.uint8)


def _draw_branch(canvas: np.ndarray, rng: np.random.Generator, start: complex, along: complex, depth: int) -> None:
    """A straight branch with shorter ones at 60 degrees on both sides; positions are complex numbers."""
    first, last = ((round(end.real * 2**_LINE_BITS), round(end.imag * 2**_LINE_BITS)) for end in (start, start + along))
    cv2.line(canvas, first, last, int(rng.integers(90, 255)), 1 + depth, cv2.LINE_AA, _LINE_BITS)
    if depth == 0:
        return
    shares = rng.uniform(0.3, 0.6, 2 * len(_BRANCHINGS))
    for share, (place, side) in zip(shares, itertools.product(_BRANCHINGS, (-1, 1))):
        branch = cmath.rect(share * (1 - place), side * math.pi / 3) * along
        _draw_branch(canvas, rng, start + place * along, branch, depth - 1)
