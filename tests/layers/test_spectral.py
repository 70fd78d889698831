"""layers/spectral.py against float64 NumPy."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from convnorm_jax.layers import convolution, filters, spectral
from convnorm_jax.layers.channelwise import channelwise_convolution

pytestmark = pytest.mark.usefixtures('quick_compilation')

DENSE, SEPARABLE = 10**9, 0  # values of DENSE_GRID_POINTS that force either path


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numpy_power(kernel, grid):
    """Power spectrum in float64, [Hf, Wf, cout]."""
    return np.square(np.abs(np.fft.fft2(np.asarray(kernel, np.float64), grid, axes=(0, 1)))).sum(axis=2)


def numpy_filter(y, v, kept):
    """irfft2(V * rfft2(y)) in float64, cropped."""
    y, v = np.asarray(y, np.float64), np.asarray(v, np.float64)
    out = np.fft.irfft2(np.fft.rfft2(y, axes=(1, 2)) * v[:, : v.shape[1] // 2 + 1], y.shape[1:3], axes=(1, 2))
    return out[:, kept[0]][:, :, kept[1]]


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


PADDINGS = {
    (3, 3): [((1, 1), (1, 1)), ((0, 2), (1, 0))],
    (5, 5): [((2, 2), (2, 2)), ((4, 0), (0, 3))],
    (2, 3): [((0, 1), (2, 1))],
}


@pytest.mark.parametrize('path', [DENSE, SEPARABLE], ids=['dense', 'separable'])
@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize(
    'size,kernel_size,padding',
    [((6, 6), (3, 3), 0), ((5, 8), (3, 3), 1), ((7, 6), (5, 5), 0), ((4, 5), (5, 5), 1), ((5, 4), (2, 3), 0)],
)
def test_filter_and_crop(monkeypatch, path, strides, size, kernel_size, padding):
    monkeypatch.setattr(spectral, 'DENSE_GRID_POINTS', path)
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


@pytest.mark.parametrize('path', [DENSE, SEPARABLE], ids=['dense', 'separable'])
def test_gradient_of_filter_and_crop(monkeypatch, path):
    monkeypatch.setattr(spectral, 'DENSE_GRID_POINTS', path)
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


@pytest.mark.parametrize('path', [DENSE, SEPARABLE], ids=['dense', 'separable'])
def test_filter_and_crop_in_bfloat16(monkeypatch, path):
    # Bound: 2 % of the output's root mean square, for filters without a spectral null. bfloat16
    # rounds to 2^-9 = 0.2 %; input, two matrices and the spectra between them are rounded, and
    # V weighs the rounding of the spectrum by up to max(V) / rms(V) (about 2 here).
    monkeypatch.setattr(spectral, 'DENSE_GRID_POINTS', path)
    grid = (10, 9)
    v = spectral.preconditioner(jnp.asarray(random(15, 3, 3, 16, 8)), grid)
    y = jnp.asarray(random(16, 4, *grid, 8), jnp.bfloat16)
    kept = spectral.crop_indices(grid, (3, 3), ((1, 1), (1, 1)), (1, 1))
    out = filters.filter_and_crop(y, v, kept)
    expected = numpy_filter(y, v, kept)
    assert out.dtype == jnp.bfloat16
    error = np.sqrt(np.square(np.asarray(out, np.float64) - expected).mean() / np.square(expected).mean())
    assert 1e-5 < error < 0.02


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


@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (5, 5), (2, 2), (1, 3), (4, 1)])
def test_channelwise_convolution(kernel_size):
    x, kernel = random(19, 2, 6, 5, 3), random(20, *kernel_size, 3)
    out = channelwise_convolution(jnp.asarray(x), jnp.asarray(kernel))
    (kh, kw), expected = kernel_size, np.empty(x.shape)
    padded = np.pad(x.astype(np.float64), ((0, 0), ((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2), (0, 0)))
    for b in range(2):
        for c in range(3):
            expected[b, :, :, c] = scipy.signal.correlate2d(padded[b, :, :, c], kernel[:, :, c], mode='valid')
    # Sums of at most 25 float32 products of order one.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_channelwise_convolution_in_bfloat16():
    x, kernel = jnp.asarray(random(21, 2, 8, 8, 4), jnp.bfloat16), jnp.asarray(random(22, 3, 3, 4), jnp.bfloat16)
    out = channelwise_convolution(x, kernel)
    exact = np.asarray(channelwise_convolution(x.astype(jnp.float32), kernel.astype(jnp.float32)))
    assert out.dtype == jnp.bfloat16
    # Nine products and their partial sums, each rounded by at most 2^-9: 2 % of the largest is safe.
    assert np.abs(np.asarray(out, np.float32) - exact).max() < 0.02 * np.abs(exact).max()


def lax_channelwise(x, kernel):
    """XLA's own depthwise convolution, which JAX differentiates."""
    pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:2]]
    dims = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), pads, dimension_numbers=dims, feature_group_count=x.shape[-1]
    )


@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (2, 4), (5, 2)], ids=str)
def test_gradients_of_the_channelwise_convolution(kernel_size):
    x, kernel = jnp.asarray(random(25, 2, 6, 5, 3)), jnp.asarray(random(26, *kernel_size, 3))

    def first(convolution):
        return jax.jit(jax.grad(lambda x, kernel: (convolution(x, kernel) ** 3).sum(), (0, 1)))

    def second(convolution):
        def penalty(x, kernel):
            by_x, by_kernel = first(convolution)(x, kernel)
            return (by_x**2).sum() + (by_kernel**2).sum()

        return jax.jit(jax.grad(penalty, (0, 1)))

    for order in (first, second):
        expected = order(lax_channelwise)(x, kernel)
        found = order(channelwise_convolution)(x, kernel)
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_channelwise_convolution_under_vmap():
    x, kernel = jnp.asarray(random(27, 4, 2, 6, 5, 3)), jnp.asarray(random(28, 3, 3, 3))
    grad = jax.grad(lambda x, kernel: (channelwise_convolution(x, kernel) ** 2).sum(), (0, 1))
    for i, parts in enumerate(zip(*jax.vmap(grad, (0, None))(x, kernel))):
        for a, b in zip(parts, grad(x[i], kernel)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize('grid', [(6, 7), (12, 13)], ids=['dense', 'separable'])
def test_jit_equals_eager(grid):
    kernel, y = jnp.asarray(random(23, 3, 3, 2, 3)), jnp.asarray(random(24, 2, *grid, 3))
    kept = spectral.crop_indices(grid, (3, 3), ((1, 1), (1, 1)), (2, 2))

    def run(kernel, y):
        return filters.filter_and_crop(y, spectral.preconditioner(kernel, grid), kept)

    eager, jitted = run(kernel, y), jax.jit(run)(kernel, y)
    # Fusion may change the order of float32 sums, nothing else.
    np.testing.assert_allclose(jitted, eager, rtol=0, atol=3e-6 * np.abs(eager).max())
