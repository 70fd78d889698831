"""DiffAugment: differentiable augmentation of everything that a discriminator sees (arXiv 2006.10738).

Ranges and order are those of the paper's released code. The transforms are pure functions of the
images and of one parameter for each example; only `diffaugment` draws random numbers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from convnorm_jax.errors import UserError

POLICIES = ('color', 'translation', 'cutout')


def diffaugment(key: jax.Array, images: jax.Array, policy: Sequence[str]) -> jax.Array:
    """Transforms each example with random numbers of its own (Zhao et al. 2020, arXiv 2006.10738).

    - color: changes the brightness by -0.5 to 0.5, then the saturation by a factor of 0 to 2, then the contrast
      by a factor of 0.5 to 1.5.
    - translation: moves the image by up to an eighth of each side and fills with zeros.
    - cutout: zeros a rectangle of half the height and half the width, centred anywhere.

    The random numbers of a transform depend on the key and its name alone, not on the rest of the policy.

    >>> images = jnp.zeros((4, 32, 32, 3))
    >>> diffaugment(jax.random.key(0), images, ('color', 'translation', 'cutout')).shape
    (4, 32, 32, 3)

    Args:
      key: PRNG key.
      images: floating [B, H, W, C] in [-1, 1], so that 0 is grey; the result can leave [-1, 1].
      policy: names from `POLICIES`, applied in the order given; () returns the images unchanged.

    Returns:
      An array of the shape and dtype of `images`.

    Raises:
      ValueError: an unknown or repeated name, or images not floating of rank 4.
    """
    _check(images, policy)
    keys = dict(zip(POLICIES, jax.random.split(key, len(POLICIES)), strict=True))
    for name in policy:
        images = _AUGMENTATIONS[name](keys[name], images)
    return images


def _check(images: jax.Array, policy: Sequence[str]) -> None:
    if isinstance(policy, str) or any(name not in POLICIES for name in policy) or len(set(policy)) < len(policy):
        raise UserError(f'policy={policy!r}: expected a tuple of some of {", ".join(POLICIES)}, each at most once')
    if images.ndim != 4:
        raise UserError(f'images.shape={images.shape}: expected [B, H, W, C]')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f'images.dtype={images.dtype}: expected floats in [-1, 1]')


def brightness(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Adds `shift`, float [B], to the images."""
    return images + _per_example(shift, images)


def saturation(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies each pixel's distance from the mean of its channels by `factor`, float [B].

    Images of one channel stay as they are.
    """
    if images.shape[-1] == 1:
        return images
    mean = images.mean(-1, keepdims=True)
    return (images - mean) * _per_example(factor, images) + mean


def contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies each value's distance from the mean of its image, over all channels, by `factor`, float [B]."""
    mean = images.mean((1, 2, 3), keepdims=True)
    return (images - mean) * _per_example(factor, images) + mean


def translation(images: jax.Array, offsets: jax.Array) -> jax.Array:
    """Moves each image: the result at (row, column) is the old value at (row, column) + offsets[i], zero outside.

    Args:
      images: [B, H, W, C].
      offsets: int [B, 2], in absolute value at most an eighth of each side: `largest_offsets`.

    Returns:
      An array of the shape and dtype of `images`.
    """
    size = images.shape[1:]
    rows, columns = largest_offsets(size)
    padded = jnp.pad(images, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    # Indices need one dtype: with x64 a Python int would be an int64 next to int32 offsets.
    starts = [offsets[:, 0] + rows, offsets[:, 1] + columns, jnp.zeros_like(offsets[:, 0])]
    return jax.vmap(lambda image, *start: lax.dynamic_slice(image, start, size))(padded, *starts)


def largest_offsets(size: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) by which an image of size (H, W, ...) is moved at most: whole eighths."""
    return size[0] // 8, size[1] // 8


def cutout(images: jax.Array, centres: jax.Array) -> jax.Array:
    """Zeros the part of a rectangle of H // 2 rows and W // 2 columns that lies inside the image.

    Args:
      images: [B, H, W, C].
      centres: int [B, 2], the middle of the rectangle; if a side is even, the first row or column after the middle.

    Returns:
      An array of the shape and dtype of `images`.
    """
    inside = []
    for axis, n in enumerate(images.shape[1:3]):
        place, first = jnp.arange(n), centres[:, axis, None] - n // 2 // 2
        inside.append((first <= place) & (place < first + n // 2))
    hole = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(hole, 0, images)


def _per_example(values: jax.Array, images: jax.Array) -> jax.Array:
    return values.astype(images.dtype)[:, None, None, None]


def _draw_color(key: jax.Array, images: jax.Array) -> jax.Array:
    low, high = jnp.array([-0.5, 0.0, 0.5]), jnp.array([0.5, 2.0, 1.5])
    shift, saturate, stretch = jax.random.uniform(key, (len(images), 3), minval=low, maxval=high).T
    return contrast(saturation(brightness(images, shift), saturate), stretch)


def _draw_translation(key: jax.Array, images: jax.Array) -> jax.Array:
    largest = jnp.array(largest_offsets(images.shape[1:]))
    return translation(images, jax.random.randint(key, (len(images), 2), -largest, largest + 1))


def _draw_cutout(key: jax.Array, images: jax.Array) -> jax.Array:
    # One more place for an even rectangle, so that both edges of the image are covered equally often.
    places = jnp.array([n + 1 - n // 2 % 2 for n in images.shape[1:3]])
    return cutout(images, jax.random.randint(key, (len(images), 2), 0, places))


_AUGMENTATIONS = {'color': _draw_color, 'translation': _draw_translation, 'cutout': _draw_cutout}
