"""DiffAugment: differentiable augmentation of all that a discriminator sees (arXiv 2006.10738).

Ranges and order are those of the paper's released code. The transforms are pure functions of the
pictures and of one parameter for each example; only `diffaugment` draws.
"""

import jax
import jax.numpy as jnp
from jax import lax

from convnorm_jax.errors import UserError

POLICIES = ('color', 'translation', 'cutout')


def diffaugment(key, images, policy):
    """Transforms each example with its own random numbers.

    - color: brightness by -0.5 ... 0.5, then saturation by 0 ... 2, then contrast by 0.5 ... 1.5.
    - translation: by up to an eighth of each side, filled up with zeros.
    - cutout: zeros in a rectangle of half the height and half the width, centred anywhere.

    A name's random numbers depend on the key and the name alone, not on the rest of the policy.

    Args:
      key: PRNG key.
      images: floating [B, H, W, C] in [-1, 1], so that 0 is grey; the result can leave [-1, 1].
      policy: names from `POLICIES`, applied in their order; () returns the images.

    Returns:
      The shape and dtype of images.

    Raises:
      ValueError: an unknown or repeated name, or images not floating of rank 4.
    """
    _check(images, policy)
    keys = dict(zip(POLICIES, jax.random.split(key, len(POLICIES)), strict=True))
    for name in policy:
        images = _AUGMENTATIONS[name](keys[name], images)
    return images


def _check(images, policy):
    if isinstance(policy, str) or any(name not in POLICIES for name in policy) or len(set(policy)) < len(policy):
        raise UserError(f'policy={policy!r}: expected a tuple of some of {", ".join(POLICIES)}, each at most once')
    if images.ndim != 4:
        raise UserError(f'images.shape={images.shape}: expected [B, H, W, C]')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f'images.dtype={images.dtype}: expected floats in [-1, 1]')


def brightness(images, shift):
    """images + shift; shift float [B]."""
    return images + _per_example(shift, images)


def saturation(images, factor):
    """Each pixel's distance from the mean of its channels times factor; float [B]. One channel stays as it is."""
    if images.shape[-1] == 1:
        return images
    mean = images.mean(-1, keepdims=True)
    return (images - mean) * _per_example(factor, images) + mean


def contrast(images, factor):
    """Each value's distance from the mean of its picture, over all channels, times factor; float [B]."""
    mean = images.mean((1, 2, 3), keepdims=True)
    return (images - mean) * _per_example(factor, images) + mean


def translation(images, offsets):
    """Picture i at (row, column) is its old value at (row, column) + offsets[i]; zero outside.

    Args:
      images: [B, H, W, C].
      offsets: int [B, 2], at most an eighth of each side up or down: `largest_offsets`.
    """
    size = images.shape[1:]
    rows, columns = largest_offsets(size)
    padded = jnp.pad(images, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    # As in `augment.random_crop`. With its gradient, 64 x 32x32x3 on a 2-core CPU, ms: this 0.4, one-hot products 1.1.
    # Indices of one dtype, whatever that of the offsets: with x64 a Python int would be an int64.
    starts = [offsets[:, 0] + rows, offsets[:, 1] + columns, jnp.zeros_like(offsets[:, 0])]
    return jax.vmap(lambda image, *start: lax.dynamic_slice(image, start, size))(padded, *starts)


def largest_offsets(size):
    """(rows, columns) that a picture of size (H, W, ...) is moved by at most: whole eighths."""
    return size[0] // 8, size[1] // 8


def cutout(images, centres):
    """Zeros in a rectangle of H // 2 rows and W // 2 columns, the part of it inside the picture.

    Args:
      images: [B, H, W, C].
      centres: int [B, 2], the middle of the rectangle; of an even side, the first row or column after it.
    """
    inside = []
    for axis, n in enumerate(images.shape[1:3]):
        place, first = jnp.arange(n), centres[:, axis, None] - n // 2 // 2
        inside.append((first <= place) & (place < first + n // 2))
    hole = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(hole, 0, images)


def _per_example(values, images):
    return values.astype(images.dtype)[:, None, None, None]


def _draw_color(key, images):
    low, high = jnp.array([-0.5, 0.0, 0.5]), jnp.array([0.5, 2.0, 1.5])
    shift, saturate, stretch = jax.random.uniform(key, (len(images), 3), minval=low, maxval=high).T
    return contrast(saturation(brightness(images, shift), saturate), stretch)


def _draw_translation(key, images):
    largest = jnp.array(largest_offsets(images.shape[1:]))
    return translation(images, jax.random.randint(key, (len(images), 2), -largest, largest + 1))


def _draw_cutout(key, images):
    # One more place for an even rectangle, so that both edges of the picture are covered equally often.
    places = jnp.array([n + 1 - n // 2 % 2 for n in images.shape[1:3]])
    return cutout(images, jax.random.randint(key, (len(images), 2), 0, places))


_AUGMENTATIONS = {'color': _draw_color, 'translation': _draw_translation, 'cutout': _draw_cutout}
