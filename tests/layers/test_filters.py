"""layers/filters.py, the filter as products with constant matrices, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.layers import filters, spectral

pytestmark = pytest.mark.usefixtures('quick_compilation')

DENSE, SEPARABLE = 10**9, 0  # values of DENSE_POINTS that force either form


@pytest.fixture(params=[DENSE, SEPARABLE], ids=['dense', 'separable'])
def form(request, monkeypatch):
    """Both forms, whatever the size."""
    for name in ('DENSE_POINTS', 'DENSE_POINTS_FLOAT32'):
        monkeypatch.setattr(filters, name, request.param)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numpy_filter(y, v, kept):
    """irfft2(V * rfft2(y)) in float64, cropped."""
    y, v = np.asarray(y, np.float64), np.asarray(v, np.float64)
    out = np.fft.irfft2(np.fft.rfft2(y, axes=(1, 2)) * v[:, : v.shape[1] // 2 + 1], y.shape[1:3], axes=(1, 2))
    return out[:, kept[0]][:, :, kept[1]]


PADDINGS = {
    (3, 3): [((1, 1), (1, 1)), ((0, 2), (1, 0))],
    (5, 5): [((2, 2), (2, 2)), ((4, 0), (0, 3))],
    (2, 3): [((0, 1), (2, 1))],
}


@pytest.mark.covering(1)
@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize(
    'size,kernel_size,padding',
    [((6, 6), (3, 3), 0), ((5, 8), (3, 3), 1), ((7, 6), (5, 5), 0), ((4, 5), (5, 5), 1), ((5, 4), (2, 3), 0)],
)
def test_filter_and_crop(strides, size, kernel_size, padding):
    grid = spectral.grid_size(size, kernel_size)
    v = spectral.preconditioner(jnp.asarray(random(8, *kernel_size, 2, 3)), grid)
    y = random(9, 2, *grid, 3)
    kept = spectral.crop_indices(grid, kernel_size, PADDINGS[kernel_size][padding], strides)
    out = jax.jit(lambda y, v: filters.filter_and_crop(y, v, kept))(y, v)
    expected = numpy_filter(y, v, kept)
    assert out.shape == expected.shape and out.dtype == jnp.float32
    # Two transforms in float32: about 10 eps = 1e-6 of the largest value before the crop, which V sets.
    scale = np.abs(numpy_filter(y, v, (range(grid[0]), range(grid[1])))).max()
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6 * scale)


@pytest.mark.slow
@pytest.mark.parametrize('size', [(6, 6), (18, 18), (5, 33)])
def test_filter_and_crop_default_path(size):
    grid = spectral.grid_size(size, (3, 3))
    v = spectral.preconditioner(jnp.asarray(random(10, 3, 3, 4, 2)), grid)
    y = random(11, 2, *grid, 2)
    kept = spectral.crop_indices(grid, (3, 3), ((1, 1), (1, 1)), (1, 1))
    expected = numpy_filter(y, v, kept)
    np.testing.assert_allclose(
        filters.filter_and_crop(y, v, kept), expected, rtol=0, atol=3e-6 * np.abs(expected).max()
    )


@pytest.mark.slow
@pytest.mark.usefixtures('form')
def test_gradient_of_filter_and_crop():
    grid = (7, 6)
    v = spectral.preconditioner(jnp.asarray(random(12, 3, 3, 2, 2)), grid)
    kept = spectral.crop_indices(grid, (3, 3), ((1, 0), (1, 1)), (2, 1))
    y, cotangent = random(13, 1, *grid, 2), random(14, 1, len(kept[0]), len(kept[1]), 2)
    gradient = jax.grad(lambda y: (filters.filter_and_crop(y, v, kept) * cotangent).sum())(jnp.asarray(y))
    # The filter is symmetric (V is even): its transpose is itself, on the cotangent at the kept places.
    scattered = np.zeros_like(y)
    scattered[np.ix_([0], kept[0], kept[1], [0, 1])] = cotangent
    expected = numpy_filter(scattered, v, (range(7), range(6)))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.usefixtures('form')
def test_filter_and_crop_in_bfloat16():
    # Bound: 2 % of the output's root mean square, for filters without a spectral null. bfloat16
    # rounds to 2^-9 = 0.2 %; input, two matrices and the spectra between them are rounded, and
    # V weighs the rounding of the spectrum by up to max(V) / rms(V) (about 2 here).
    grid = (10, 9)
    v = spectral.preconditioner(jnp.asarray(random(15, 3, 3, 16, 8)), grid)
    y = jnp.asarray(random(16, 4, *grid, 8), jnp.bfloat16)
    kept = spectral.crop_indices(grid, (3, 3), ((1, 1), (1, 1)), (1, 1))
    out = filters.filter_and_crop(y, v, kept)
    expected = numpy_filter(y, v, kept)
    assert out.dtype == jnp.bfloat16
    error = np.sqrt(np.square(np.asarray(out, np.float64) - expected).mean() / np.square(expected).mean())
    assert 1e-5 < error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('grid', [(6, 7), (12, 13)], ids=['dense', 'separable'])
def test_jit_equals_eager(grid):
    kernel, y = jnp.asarray(random(23, 3, 3, 2, 3)), jnp.asarray(random(24, 2, *grid, 3))
    kept = spectral.crop_indices(grid, (3, 3), ((1, 1), (1, 1)), (2, 2))

    def run(kernel, y):
        return filters.filter_and_crop(y, spectral.preconditioner(kernel, grid), kept)

    eager, jitted = run(kernel, y), jax.jit(run)(kernel, y)
    # Fusion may change the order of float32 sums, nothing else.
    np.testing.assert_allclose(jitted, eager, rtol=0, atol=3e-6 * np.abs(eager).max())
