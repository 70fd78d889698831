"""Augmentation and normalization of image batches: pure JAX functions, run inside the jitted step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convnorm_jax.errors import UserError

# These run on the host (data.streaming), where each image still has its own size.
STREAMED_AUGMENTATIONS = ('resized_crop', 'resized_crop_flip')
AUGMENTATIONS = ('none', 'crop', 'crop_flip', *STREAMED_AUGMENTATIONS)


def augment(key: jax.Array, images: jax.Array, kind: str, padding: int) -> jax.Array:
    """Applies the augmentation named `kind`.

    >>> images = jnp.zeros((8, 32, 32, 3), jnp.uint8)
    >>> augment(jax.random.key(0), images, 'crop_flip', padding=4).shape
    (8, 32, 32, 3)

    Args:
        key: PRNG key.
        images: [N, H, W, C], any dtype.
        kind: one of `AUGMENTATIONS`. Use 'crop' without the flip for images whose left and right differ (digits).
            Those of `STREAMED_AUGMENTATIONS` have been applied on the host and change nothing here.
        padding: pixels of zeros on each side before the crop; only 'crop' and 'crop_flip' use it.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: unknown kind, negative padding, or images not of rank 4.
    """
    if kind not in AUGMENTATIONS:
        raise UserError(f'kind={kind!r}: expected one of {", ".join(AUGMENTATIONS)}; choose one of them')
    if kind in ('none', *STREAMED_AUGMENTATIONS):
        return images
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, padding)
    return random_flip(flip_key, images) if kind == 'crop_flip' else images


def crop_offsets(key: jax.Array, num_images: int, padding: int) -> jax.Array:
    """Draws the row and column offsets that `random_crop` uses.

    Returns:
        int32 [num_images, 2], uniform in [0, 2 * padding]; an offset of `padding` leaves the image in place.
    """
    return jax.random.randint(key, (num_images, 2), 0, 2 * padding + 1, jnp.int32)


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads with zeros and crops to the original size, at an independent offset for each image.

    The same as torchvision's RandomCrop(size, padding).

    Args:
        key: PRNG key.
        images: [N, H, W, C], any dtype.
        padding: int >= 0, pixels on each side.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: negative or fractional padding, or images not of rank 4.
    """
    _check_images(images)
    if not isinstance(padding, (int, np.integer)) or padding < 0:
        raise UserError(f'padding={padding!r}: expected a whole number of pixels >= 0; give e.g. 4 for 32x32 images')
    size = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    # Slices were the fastest on a CPU, next to a gather, one-hot products and selects.
    return jax.vmap(lambda image, offset: lax.dynamic_slice(image, (*offset, jnp.zeros_like(offset[0])), size))(
        padded, crop_offsets(key, images.shape[0], padding)
    )


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
        key: PRNG key.
        images: [N, H, W, C], any dtype.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: images not of rank 4.
    """
    _check_images(images)
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0],))
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def to_float(images_uint8: jax.Array) -> jax.Array:
    """Converts uint8 pixels of 0 to 255 to float32 in [0, 1], of the same shape.

    Raises:
        ValueError: not uint8 (float pixels would be divided twice).
    """
    if images_uint8.dtype != jnp.uint8:
        raise UserError(
            f'images_uint8.dtype={images_uint8.dtype}: expected uint8 pixels of 0 to 255; '
            'leave out to_float if they are floats already'
        )
    return images_uint8.astype(jnp.float32) / 255


def normalize(images: jax.Array | np.ndarray, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Computes (images - mean) / std for each channel.

    >>> pixels = to_float(jnp.full((1, 2, 2, 3), 255, jnp.uint8))
    >>> normalize(pixels, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).max()
    Array(2., dtype=float32)

    Args:
        images: [..., C], floating, in pixel units of [0, 1].
        mean: C floats, in the same units.
        std: C floats, in the same units.

    Returns:
        An array of the dtype and shape of `images`.

    Raises:
        ValueError: integer images, or not one mean and std for each channel.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f'images.dtype={images.dtype}: expected floats in [0, 1]; call to_float first')
    channels = images.shape[-1]
    if not len(mean) == len(std) == channels:
        raise UserError(
            f'mean={tuple(mean)}, std={tuple(std)}: expected {channels} values each, one for each channel '
            "of images; give the data set's own"
        )
    return jnp.subtract(images, jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def _check_images(images: jax.Array) -> None:
    if images.ndim != 4:
        raise UserError(f'images.shape={images.shape}: expected [N, H, W, C]; add the batch axis that is missing')
