"""Decodes images to uint8 arrays and crops them as torchvision does, on the host with OpenCV."""

import math

import cv2
import numpy as np

from convnorm_jax.errors import UserError

SCALE = (0.08, 1.0)  # share of the image's area that a random crop takes
RATIO = (3 / 4, 4 / 3)  # its width over its height
RESIZE = 256 / 224  # the shorter side before a center crop, divided by the size of the crop
_TRIES = 10


def decode(data: bytes, name: str) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP, BMP or similar file of any colour space to RGB.

    Grey images get three equal channels, CMYK is converted, transparency is dropped. The EXIF orientation
    is ignored, as in torchvision and TFDS.

    Args:
        data: the bytes of the file.
        name: the file's name in an error.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: not an image, or truncated.
    """
    image: np.ndarray | None = None
    if data and not _truncated(data):
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:  # e.g. a header that promises too many pixels
            image = None
    if image is None:
        raise UserError(
            f'{name}: expected an image, but it cannot be decoded ({len(data)} bytes); replace or remove the file'
        )
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def _truncated(data: bytes) -> bool:
    """Whether the end of a JPEG or PNG is missing; decoders would fill the rest with grey and report nothing."""
    if data.startswith(b'\x89PNG\r\n\x1a\n'):
        position = 8
        while data[position + 4 : position + 8] not in (b'IEND', b''):  # chunks; bytes after the last do not matter
            position += 12 + int.from_bytes(data[position : position + 4], 'big')
        return not data[position + 4 : position + 8]
    if not data.startswith(b'\xff\xd8'):
        return False
    position = 2
    while data[position : position + 1] == b'\xff':  # skip the segments: a preview in one has an end marker of its own
        if data[position + 1 : position + 2] == b'\xda':
            return data.rfind(b'\xff\xd9', position) < 0
        position += 2 + int.from_bytes(data[position + 2 : position + 4], 'big')
    return data.rfind(b'\xff\xd9') < 0


def random_crop_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Draws the box of torchvision's RandomResizedCrop: ten tries, then the largest centered box in `RATIO`.

    Args:
        rng: random numbers.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        (top, left, height, width), in pixels.
    """
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Crops the image to `random_crop_box` and resizes it to a square.

    >>> random_resized_crop(np.zeros((48, 64, 3), np.uint8), np.random.default_rng(0), size=16).shape
    (16, 16, 3)

    Args:
        image: uint8 [H, W, 3].
        rng: random numbers.
        size: pixels of a side.

    Returns:
        uint8 [size, size, 3].
    """
    top, left, height, width = random_crop_box(rng, *image.shape[:2])
    return resize(image[top : top + height, left : left + width], size, size)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to size * 256 / 224 and crops the middle square: the usual test crop of ImageNet.

    Args:
        image: uint8 [H, W, 3].
        size: pixels of a side.

    Returns:
        uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    shorter = max(size, int(size * RESIZE))
    if height <= width:
        height, width = shorter, max(shorter, int(shorter * width / height))
    else:
        height, width = max(shorter, int(shorter * height / width)), shorter
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(resize(image, height, width)[top : top + size, left : left + size])


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image: by area means when it shrinks, else by bilinear interpolation."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0] or width < image.shape[1]
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))
