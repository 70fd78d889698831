"""Spectra of layers against the dense matrix of the circular convolution."""

import numpy as np
import pytest

from convnorm_jax.evaluation import spectral

# (kernel height, width, input channels, output channels), grid: odd, even, mixed, wide, narrow.
CASES = [
    ((3, 3, 2, 3), (5, 7)),
    ((3, 3, 3, 2), (6, 4)),
    ((2, 3, 2, 2), (5, 4)),
    ((1, 1, 4, 3), (3, 2)),
    ((3, 2, 2, 3), (4, 5)),
    ((3, 3, 2, 2), (3, 3)),
]


def random_kernel(shape, dtype=np.float64):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def circular_cross_correlation(image, kernel):
    """By its definition: shifted copies of the image [H, W, cin], one per tap."""
    result = np.zeros((*image.shape[:2], kernel.shape[-1]))
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            result += np.roll(image, (-row, -column), axis=(0, 1)) @ kernel[row, column]
    return result


def dense_matrix(kernel, size, scale=None):
    """The layer as a matrix, column by column from the basis images; `scale` as a filter."""
    columns = []
    for index in range(size[0] * size[1] * kernel.shape[2]):
        image = np.zeros(size[0] * size[1] * kernel.shape[2])
        image[index] = 1
        output = circular_cross_correlation(image.reshape(*size, -1), kernel)
        if scale is not None:
            spectrum = np.fft.rfft2(output, axes=(0, 1)) * scale
            output = np.fft.irfft2(spectrum, s=size, axes=(0, 1))
        columns.append(output.ravel())
    return np.stack(columns, axis=1)


def dense_singular_values(*args):
    return np.linalg.svd(dense_matrix(*args), compute_uv=False)


@pytest.mark.parametrize(('shape', 'size'), CASES)
def test_singular_values_are_those_of_the_dense_matrix(shape, size):
    kernel = random_kernel(shape)
    result = spectral.singular_values(kernel, size)
    assert result.shape == (size[0] * size[1] * min(shape[2:]),)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, dense_singular_values(kernel, size), atol=1e-10)


@pytest.mark.parametrize(('shape', 'size'), CASES)
def test_scales_are_those_of_the_dense_matrix(shape, size):
    kernel = random_kernel(shape)
    power = spectral.channel_power_spectrum(kernel, size)
    per_channel = np.linspace(-1, 2, shape[-1])
    for scale in (power**-0.5, per_channel):
        result = spectral.singular_values(kernel, size, scale)
        np.testing.assert_allclose(result, dense_singular_values(kernel, size, scale), atol=1e-10)


@pytest.mark.parametrize(('shape', 'size'), CASES)
def test_response_and_power_are_those_of_the_fft(shape, size):
    kernel = random_kernel(shape)
    expected = np.fft.rfft2(kernel, s=size, axes=(0, 1))
    np.testing.assert_allclose(spectral.frequency_response(kernel, size), expected, atol=1e-12)
    power = spectral.channel_power_spectrum(kernel, size)
    np.testing.assert_allclose(power, (np.abs(expected) ** 2).sum(axis=2), atol=1e-12)


@pytest.mark.parametrize(('shape', 'size'), CASES)
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_the_preconditioner_makes_every_channel_an_isometry(shape, size, dtype):
    kernel = random_kernel(shape, dtype)
    scale = spectral.channel_power_spectrum(kernel, size) ** -0.5
    result = spectral.layer_spectrum('layer', kernel, size, scale)
    tolerance = 1e-4 if dtype == np.float32 else 1e-10
    assert (result.name, result.size) == ('layer', size)
    assert result.power_after.dtype == result.singular_after.dtype == dtype
    np.testing.assert_allclose(result.power_after, 1, rtol=tolerance)
    total = (result.singular_after.astype(np.float64) ** 2).sum()
    np.testing.assert_allclose(total, shape[-1] * size[0] * size[1], rtol=tolerance)
    np.testing.assert_array_equal(result.power_before, spectral.channel_power_spectrum(kernel, size))
    np.testing.assert_array_equal(result.singular_before, spectral.singular_values(kernel, size))


def test_values_descend_and_chunks_change_nothing(monkeypatch):
    kernel, size = random_kernel((3, 3, 4, 5), np.float32), (8, 9)
    scale = spectral.channel_power_spectrum(kernel, size) ** -0.5
    whole = spectral.layer_spectrum('', kernel, size, scale)
    response = spectral.frequency_response(kernel, size)
    assert (np.diff(whole.singular_after) <= 0).all()
    monkeypatch.setattr(spectral, '_CHUNK_ENTRIES', 7 * 20)
    pieces = spectral.layer_spectrum('', kernel, size, scale)
    np.testing.assert_allclose(pieces.power_after, whole.power_after, rtol=1e-5)
    np.testing.assert_allclose(pieces.singular_after, whole.singular_after, atol=1e-5)
    np.testing.assert_allclose(spectral.frequency_response(kernel, size), response, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    kernel = random_kernel((3, 3, 2, 2), np.float16)
    assert spectral.singular_values(kernel, (4, 4)).dtype == np.float32
    assert spectral.frequency_response(kernel, (4, 4)).dtype == np.complex64


@pytest.mark.parametrize(
    ('kernel_shape', 'size', 'scale', 'message'),
    [
        ((3, 3, 2), (4, 4), None, r'kernel.shape=\(3, 3, 2\)'),
        ((3, 3, 2, 2), (2, 4), None, r'size=\(2, 4\)'),
        ((3, 3, 2, 2), (4,), None, r'size=\(4,\)'),
        ((3, 3, 2, 2), (4, 4), np.ones(3), r'scale.shape=\(3,\)'),
        ((3, 3, 2, 2), (4, 4), np.ones((4, 4, 2)), r'scale.shape=\(4, 4, 2\)'),
        ((3, 3, 2, 2), (4, 4), np.ones(2, complex), 'scale.dtype=complex128'),
    ],
)
def test_what_a_user_gets_wrong_is_named(kernel_shape, size, scale, message):
    with pytest.raises(ValueError, match=message) as caught:
        spectral.singular_values(np.ones(kernel_shape), size, scale)
    assert '\n' not in str(caught.value)
