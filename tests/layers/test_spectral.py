"""layers/spectral.py against float64 NumPy."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.layers import convolution, filters, spectral

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numpy_power(kernel, grid):
    """Power spectrum in float64, [Hf, Wf, cout]."""
    return np.square(np.abs(np.fft.fft2(np.asarray(kernel, np.float64), grid, axes=(0, 1)))).sum(axis=2)


def low_pass_kernel(channels):
    """Three nearly equal low-pass filters: the spectrum falls to 1e-6 of its peak and below."""
    binomial = np.outer([1, 2, 1], [1, 2, 1]) / 16
    return np.stack([binomial * c for c in channels], -1)[..., None].astype(np.float32)


@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (5, 5), (2, 3), (1, 4)])
@pytest.mark.parametrize('grid', [(6, 6), (7, 9), (8, 11), (5, 5)])
def test_power_spectrum(kernel_size, grid):
    kernel = random(0, *kernel_size, 3, 4)
    power = spectral.power_spectrum(jnp.asarray(kernel), grid)
    assert power.dtype == jnp.float32
    # A response is a sum of up to 25 float32 products: a few eps = 1.2e-7 of the filter's scale.
    np.testing.assert_allclose(
        power, numpy_power(kernel, grid), rtol=1e-5, atol=1e-6 * np.square(kernel).sum((0, 1, 2)).max()
    )


@pytest.mark.parametrize('grid', [(9, 9), (15, 11), (34, 33)])
def test_power_spectrum_is_accurate_where_small(grid):
    kernel = low_pass_kernel([1.0, 0.9, 1.1])
    expected = numpy_power(kernel, grid)
    power = np.asarray(spectral.power_spectrum(jnp.asarray(kernel), grid))
    seen = expected > 1e-6 * expected.max()
    assert expected[seen].min() < 1e-4 * expected.max()
    # Squares of the taps' transforms err by about eps * sqrt(peak / power) = 1.2e-7 * 1e3; the
    # quadratic form of the Gram matrix errs by eps * peak / power, about a thousand times more.
    np.testing.assert_allclose(power[seen], expected[seen], rtol=5e-4)
    assert np.all(power >= 0)


def test_power_spectrum_is_even():
    power = spectral.power_spectrum(jnp.asarray(random(1, 3, 3, 2, 3)), (7, 8))
    # The mean of w and -w, in one order or the other: equal to the last bit or two.
    np.testing.assert_allclose(spectral.reverse_frequencies(power, (0, 1)), power, rtol=3e-7)


def test_power_spectrum_needs_no_matrix_of_the_whole_grid():
    # A 224x224 picture has a grid of 52,900 points: anything that is quadratic in it (22 GB) can
    # not be built. On 52x52, 2704 points squared are 56 MiB in float64.
    tracemalloc.start()
    try:
        jax.eval_shape(lambda k: spectral.power_spectrum(k, (52, 52)), jnp.zeros((3, 3, 1, 1)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (5, 3)])
def test_preconditioner(kernel_size):
    kernel, grid = random(2, *kernel_size, 4, 3), (9, 8)
    v = spectral.preconditioner(jnp.asarray(kernel), grid)
    expected = numpy_power(kernel, grid) ** -0.5
    if kernel_size == (1, 1):
        assert v.shape == (1, 1, 3)  # flat: stored once
    else:
        assert v.shape == (9, 8, 3)
    # Half the relative error of the power spectrum, see above; four input channels keep it off zero.
    np.testing.assert_allclose(np.broadcast_to(v, expected.shape), expected, rtol=2e-5)


def test_preconditioner_is_a_constant_to_differentiation():
    kernel = jnp.asarray(random(3, 3, 3, 2, 2))
    gradient = jax.grad(lambda k: spectral.preconditioner(k, (6, 6)).sum())(kernel)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('exponent', [-40, -12, 20, 40])
def test_scale_invariance(exponent):
    kernel, scale = random(4, 3, 3, 2, 2), np.float32(2.0) ** exponent
    v = spectral.preconditioner(jnp.asarray(kernel), (8, 7))
    scaled = spectral.preconditioner(jnp.asarray(kernel * scale), (8, 7))
    # Powers of two scale a float exactly; rsqrt of another exponent may differ in the last bit.
    np.testing.assert_allclose(scaled * scale, v, rtol=1e-6)


def difference_kernel():
    """A filter whose spectrum is exactly zero at frequency 0."""
    return np.array([1.0, -1.0], np.float32).reshape(1, 2, 1, 1)


@pytest.mark.parametrize(
    'kernel',
    [
        np.zeros((3, 3, 2, 2), np.float32),
        random(5, 3, 3, 2, 2) * np.float32(1e-18),
        random(5, 3, 3, 2, 2) * np.float32(1e-25),
        random(5, 3, 3, 2, 2) * np.float32(1e-42),  # subnormal
        np.concatenate([random(5, 3, 3, 2, 1), np.zeros((3, 3, 2, 1), np.float32)], -1),
        difference_kernel(),
        difference_kernel() * np.float32(1e-12),
        difference_kernel() * np.float32(1e-15),
        difference_kernel() * np.float32(1e-18),
        low_pass_kernel([1.0, 1.0, 1.0]),
    ],
    ids=['zero', '1e-18', '1e-25', '1e-42', 'one zero', 'null', 'null 1e-12', 'null 1e-15', 'null 1e-18', 'low-pass'],
)
def test_finite_values_and_gradients(kernel):
    kernel = jnp.asarray(kernel)
    x = jnp.asarray(random(6, 2, 6, 6, kernel.shape[2]))
    grid = spectral.grid_size((6, 6), kernel.shape[:2])
    kept = spectral.crop_indices(grid, kernel.shape[:2], ((0, 0), (0, 0)), (1, 1))

    def output(kernel, x):
        v = spectral.preconditioner(kernel, grid)
        return filters.filter_and_crop(convolution.full_convolution(x, kernel), v, kept)

    assert np.all(np.isfinite(spectral.preconditioner(kernel, grid)))
    y, back = jax.vjp(output, kernel, x)
    assert np.all(np.isfinite(y))
    for gradient in back(jnp.ones_like(y)):
        assert np.all(np.isfinite(gradient))


def test_zero_filter_has_unit_preconditioner():
    kernel = np.concatenate([random(7, 3, 3, 2, 1), np.zeros((3, 3, 2, 1), np.float32)], -1)
    v = spectral.preconditioner(jnp.asarray(kernel), (5, 6))
    np.testing.assert_array_equal(v[..., 1], 1)
    alone = spectral.preconditioner(jnp.asarray(kernel[..., :1]), (5, 6))
    np.testing.assert_allclose(v[..., :1], alone, rtol=1e-6)  # and leaves its neighbour as it is


def test_spectral_null_is_floored():
    # At the null V is at most (RELATIVE_FLOOR * energy)^(-1/2); energy is 2 here.
    v = np.asarray(spectral.preconditioner(jnp.asarray(difference_kernel()), (4, 6)))
    np.testing.assert_allclose(v.max(), (2 * spectral.RELATIVE_FLOOR) ** -0.5, rtol=1e-5)


@pytest.mark.parametrize('kernel_size', [(3, 3), (2, 5)])
@pytest.mark.parametrize('strides', [(1, 1), (2, 3)])
@pytest.mark.parametrize('padding', [((0, 0), (0, 0)), ((1, 0), (0, 1)), ((1, 1), (1, 1))])
def test_full_convolution_cropped_is_the_convolution(kernel_size, strides, padding):
    x, kernel = random(17, 2, 6, 7, 3), random(18, *kernel_size, 3, 4)
    full = np.asarray(convolution.full_convolution(jnp.asarray(x), jnp.asarray(kernel)))
    grid = spectral.grid_size((6, 7), kernel_size)
    assert full.shape == (2, *grid, 4)
    rows, columns = spectral.crop_indices(grid, kernel_size, padding, strides)
    expected = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    # The same sums of at most 30 products of order one, in another order.
    np.testing.assert_allclose(full[:, rows][:, :, columns], expected, rtol=0, atol=2e-5)
