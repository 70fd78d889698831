"""Augmentation against NumPy, for the offsets actually drawn."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.data import augment

KEY = jax.random.key(3)
pytestmark = pytest.mark.usefixtures('quick_compilation')


def make_images(n=64, size=(8, 6, 3), dtype=np.uint8):
    return np.random.default_rng(0).integers(1, 256, (n, *size)).astype(dtype)  # no zeros: padding shows


def numpy_crop(images, offsets, padding):
    _, height, width, _ = images.shape
    out = np.zeros_like(images)
    for i, (top, left) in enumerate(np.asarray(offsets) - padding):
        for y in range(height):
            for x in range(width):
                if 0 <= y + top < height and 0 <= x + left < width:
                    out[i, y, x] = images[i, y + top, x + left]
    return out


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
@pytest.mark.parametrize('padding', [0, 2, 4])
def test_random_crop(padding, dtype):
    images = make_images(dtype=dtype)
    want = numpy_crop(images, augment.crop_offsets(KEY, len(images), padding), padding)
    eager = augment.random_crop(KEY, jnp.asarray(images), padding)
    jitted = jax.jit(augment.random_crop, static_argnums=2)(KEY, images, padding)
    np.testing.assert_array_equal(eager, want)
    np.testing.assert_array_equal(jitted, want)
    assert eager.dtype == jitted.dtype == dtype


def test_random_crop_with_64_bit_types():
    images = make_images()
    expected = augment.random_crop(KEY, jnp.asarray(images), 2)
    with jax.enable_x64(True):
        for padding in (2, np.int64(2)):
            np.testing.assert_array_equal(augment.random_crop(KEY, jnp.asarray(images), padding), expected)


def test_crop_offsets_are_uniform_and_independent():
    offsets = np.asarray(augment.crop_offsets(KEY, 20_000, 2))
    joint = np.zeros((5, 5))
    np.add.at(joint, (offsets[:, 0], offsets[:, 1]), 1)
    assert np.all(np.abs(joint / 20_000 - 1 / 25) < 0.006)


def test_random_flip():
    images = make_images(2000, (2, 3, 1))
    out = np.asarray(augment.random_flip(KEY, jnp.asarray(images)))
    kept, mirrored = ((out == like).all((1, 2, 3)) for like in (images, images[:, :, ::-1]))
    assert np.all(kept | mirrored)
    assert (~kept).mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(jax.jit(augment.random_flip)(KEY, images), out)
    assert out.dtype == np.uint8


def test_augment_does_what_its_kind_says():
    images = jnp.asarray(make_images(200))
    crop_key, flip_key = jax.random.split(KEY)
    cropped = augment.random_crop(crop_key, images, 2)
    np.testing.assert_array_equal(augment.augment(KEY, images, 'none', 2), images)
    np.testing.assert_array_equal(augment.augment(KEY, images, 'crop', 2), cropped)
    both = augment.augment(KEY, images, 'crop_flip', 2)
    np.testing.assert_array_equal(both, augment.random_flip(flip_key, cropped))
    assert not np.array_equal(both, cropped) and not np.array_equal(cropped, images)
    for kind in augment.AUGMENTATIONS:
        jitted = jax.jit(augment.augment, static_argnums=(2, 3))(KEY, images, kind, 2)
        np.testing.assert_array_equal(jitted, augment.augment(KEY, images, kind, 2))


def test_keys_matter():
    images = jnp.asarray(make_images())
    other = jax.random.key(4)
    first, second = (augment.augment(key, images, 'crop_flip', 2) for key in (KEY, other))
    assert not np.array_equal(first, second)


def test_to_float():
    every = jnp.arange(256, dtype=jnp.uint8)
    got = augment.to_float(every)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.arange(256) / 255, rtol=1e-6)
    assert got[0] == 0 and got[255] == 1


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_normalize(dtype):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    images = np.random.default_rng(0).random((4, 2, 2, 3))
    got = jax.jit(lambda x: augment.normalize(x, mean, std))(jnp.asarray(images, dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got.astype(np.float32), (images - np.array(mean)) / np.array(std), atol=1e-6 if dtype == jnp.float32 else 0.05
    )


IMAGES = jnp.zeros((2, 4, 4, 3), jnp.uint8)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: augment.augment(KEY, IMAGES, 'flip', 4), "kind='flip': expected one of none, crop, crop_flip"),
        (lambda: augment.random_crop(KEY, IMAGES, -1), 'padding=-1: expected a whole number of pixels >= 0'),
        (lambda: augment.random_crop(KEY, IMAGES, 0.5), 'padding=0.5: expected a whole number of pixels >= 0'),
        (lambda: augment.random_crop(KEY, IMAGES[0], 1), 'images.shape=(4, 4, 3): expected [N, H, W, C]'),
        (lambda: augment.random_flip(KEY, IMAGES[0]), 'images.shape=(4, 4, 3): expected [N, H, W, C]'),
        (lambda: augment.to_float(IMAGES.astype(jnp.float32)), 'images_uint8.dtype=float32: expected uint8'),
        (lambda: augment.normalize(IMAGES, (0,) * 3, (1,) * 3), 'images.dtype=uint8: expected floats in [0, 1]'),
        (lambda: augment.normalize(IMAGES / 255, (0.0,), (1.0,)), 'mean=(0.0,), std=(1.0,): expected 3 values each'),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert '\n' not in str(error.value)
