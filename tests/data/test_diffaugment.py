"""DiffAugment against a NumPy implementation of the paper's formulas, pixel by pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.data import diffaugment as module
from convnorm_jax.data.diffaugment import diffaugment

KEY = jax.random.PRNGKey(11)
pytestmark = pytest.mark.usefixtures('quick_compilation')
SHAPES = [(6, 16, 24, 3), (5, 8, 8, 1), (4, 7, 18, 3), (3, 1, 2, 3)]


def draw(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def numpy_color(image, shift, saturate, stretch):
    image = image + shift
    grey = image.mean(-1, keepdims=True)
    image = grey + saturate * (image - grey)
    return image.mean() + stretch * (image - image.mean())


def numpy_translation(image, rows, columns):
    moved = np.zeros_like(image)
    height, width = image.shape[:2]
    for r in range(height):
        for c in range(width):
            if 0 <= r + rows < height and 0 <= c + columns < width:
                moved[r, c] = image[r + rows, c + columns]
    return moved


def numpy_cutout(image, row, column):
    """As the released code: indices of the rectangle, clamped to the picture, are set to zero."""
    image, (height, width) = image.copy(), image.shape[:2]
    high, wide = height // 2, width // 2
    for r in range(high):
        for c in range(wide):
            image[np.clip(row + r - high // 2, 0, height - 1), np.clip(column + c - wide // 2, 0, width - 1)] = 0
    return image


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_color(shape):
    images, random = draw(shape), np.random.default_rng(1)
    shift, saturate, stretch = (random.uniform(low, high, shape[0]) for low, high in ((-0.5, 0.5), (0, 2), (0.5, 1.5)))
    expected = np.stack([numpy_color(*each) for each in zip(images, shift, saturate, stretch)])
    with jax.enable_x64(True):
        found = module.brightness(jnp.array(images), jnp.array(shift))
        found = module.contrast(module.saturation(found, jnp.array(saturate)), jnp.array(stretch))
        np.testing.assert_allclose(found, expected, atol=1e-14)


def test_saturation_of_one_channel_is_nothing():
    images = jnp.float32(draw((3, 4, 4, 1)))
    np.testing.assert_array_equal(module.saturation(images, jnp.array([0.0, 1.7, 2.0])), images)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_translation(shape):
    images = np.float32(draw(shape))
    rows, columns = module.largest_offsets(shape[1:])
    assert (rows, columns) == (shape[1] // 8, shape[2] // 8)
    for by in {(rows, columns), (-rows, columns), (0, -columns), (rows, 0), (0, 0)}:
        expected = np.stack([numpy_translation(image, *by) for image in images])
        offsets = jnp.tile(jnp.array(by), (shape[0], 1))
        np.testing.assert_array_equal(module.translation(jnp.array(images), offsets), expected)


@pytest.mark.parametrize('dtype', [np.int32, np.int64])
def test_translation_with_64_bit_types(dtype):
    images, by = np.float32(draw((2, 16, 16, 3))), (2, -1)
    expected = np.stack([numpy_translation(image, *by) for image in images])
    with jax.enable_x64(True):
        found = module.translation(jnp.array(images), jnp.tile(jnp.array(by, dtype), (2, 1)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_cutout(shape):
    height, width = shape[1:3]
    rows, columns = height + 1 - height // 2 % 2, width + 1 - width // 2 % 2
    centres = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing='ij'), -1).reshape(-1, 2)
    images = np.resize(np.float32(draw(shape)), (len(centres), *shape[1:]))
    expected = np.stack([numpy_cutout(image, *centre) for image, centre in zip(images, centres)])
    np.testing.assert_array_equal(module.cutout(jnp.array(images), jnp.array(centres)), expected)


@pytest.mark.parametrize('shape', [(400, 16, 24, 3), (400, 7, 18, 1)], ids=str)
def test_drawn_color_is_in_the_papers_ranges(shape):
    # One picture of two values (three in colour) tells all numbers back.
    ramp = np.linspace(-1, 1, shape[3]) * 0.5 if shape[3] > 1 else np.zeros(1)
    rows = np.where(np.arange(shape[1]) % 2, 0.25, -0.25)[:, None, None]
    image = rows + ramp + np.zeros((1, shape[2], 1))
    out = np.asarray(diffaugment(KEY, jnp.float32(np.tile(image, (shape[0], 1, 1, 1))), ('color',)))
    shift = out.mean((1, 2, 3)) - image.mean()
    grey = out.mean(-1)
    stretch = (grey[:, 1, 0] - grey[:, 0, 0]) / 0.5
    for values, low, high in ((shift, -0.5, 0.5), (stretch, 0.5, 1.5)):
        assert_uniform(values, low, high)
    if shape[3] > 1:
        assert_uniform((out[:, 0, 0, 2] - out[:, 0, 0, 0]) / stretch, 0, 2)


def assert_uniform(values, low, high):
    assert values.min() > low - 1e-4 and values.max() < high + 1e-4
    np.testing.assert_allclose(np.quantile((values - low) / (high - low), [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.08)


def test_drawn_translation_and_cutout_cover_their_ranges_evenly():
    shape = (3000, 16, 24, 1)
    spot = np.zeros(shape, np.float32)
    spot[:, 8, 12] = 1
    moved = np.asarray(diffaugment(KEY, jnp.array(spot), ('translation',)))[..., 0]
    _, rows, columns = np.nonzero(moved)
    assert len(rows) == shape[0]
    count = np.zeros((16, 24))
    np.add.at(count, (rows, columns), 1)
    seen = count[6:11, 9:16] / shape[0]
    assert count.sum() == count[6:11, 9:16].sum() and np.abs(seen - 1 / 35).max() < 0.015
    cut = 1 - np.asarray(diffaugment(KEY, jnp.ones(shape), ('cutout',)))[..., 0]
    share = cut.mean(0)
    np.testing.assert_allclose(share, share[::-1, ::-1], atol=0.06)  # no corner more often than its opposite
    assert cut.sum((1, 2)).min() >= 4 * 6 and cut.sum((1, 2)).max() == 8 * 12


def test_each_example_has_its_own_numbers_and_each_name_its_own_key():
    images = jnp.tile(jnp.float32(draw((1, 16, 16, 3))), (4, 1, 1, 1))
    out = diffaugment(KEY, images, module.POLICIES)
    assert all(not np.array_equal(out[0], other) for other in out[1:])
    alone = diffaugment(KEY, images, ('translation',))
    after = diffaugment(KEY, diffaugment(KEY, images, ('cutout',)), ('translation',))
    np.testing.assert_array_equal(diffaugment(KEY, images, ('cutout', 'translation')), after)
    assert not np.array_equal(alone, diffaugment(jax.random.PRNGKey(12), images, ('translation',)))


def test_no_policy_is_the_identity():
    images = jnp.float32(draw((2, 8, 8, 3)))
    assert diffaugment(KEY, images, ()) is images


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_jitted_vmapped_and_eager_agree(dtype):
    images = jnp.asarray(draw((2, 3, 16, 16, 3)), dtype)
    keys = jax.random.split(KEY)
    apply = functools.partial(diffaugment, policy=module.POLICIES)
    eager = [apply(key, each) for key, each in zip(keys, images)]
    assert all(a.dtype == dtype and a.shape == images.shape[1:] for a in eager)
    atol = 1e-6 if dtype == jnp.float32 else 0.05
    found = jax.jit(jax.vmap(apply))(keys, images)
    np.testing.assert_allclose(np.float32(found), np.float32(jnp.stack(eager)), atol=atol)
    np.testing.assert_allclose(np.float32(jax.jit(apply)(keys[0], images[0])), np.float32(eager[0]), atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize('policy', [('color',), ('translation',), ('cutout',), module.POLICIES])
def test_the_gradient_is_the_transposed_of_what_it_does(policy):
    # With its numbers fixed it is affine: f(x) - f(0) = A x, and the gradient of <y, f(x)> is A^T y.
    x, y = jnp.float32(draw((2, 8, 8, 3), 1)), jnp.float32(draw((2, 8, 8, 3), 2))
    by_x = jax.jit(jax.grad(lambda images: (y * diffaugment(KEY, images, policy)).sum()))(x)
    linear = diffaugment(KEY, x, policy) - diffaugment(KEY, jnp.zeros_like(x), policy)
    assert np.abs(by_x).max() > 0.1
    assert (by_x * x).sum() == pytest.approx(float((linear * y).sum()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ('policy', 'images', 'message'),
    [
        (('colour',), jnp.zeros((1, 8, 8, 3)), r"policy=\('colour',\): expected a tuple of some of color, "),
        ('color', jnp.zeros((1, 8, 8, 3)), "policy='color'"),
        (('color', 'color'), jnp.zeros((1, 8, 8, 3)), 'policy='),
        (('color',), jnp.zeros((8, 8, 3)), r'images.shape=\(8, 8, 3\)'),
        (('color',), jnp.zeros((1, 8, 8, 3), jnp.uint8), 'images.dtype=uint8'),
    ],
)
def test_what_is_wrong_is_named(policy, images, message):
    with pytest.raises(ValueError, match=message):
        diffaugment(KEY, images, policy)
