"""Transposed convolutions: float64 NumPy, PyTorch where it is installed, ConvNorm's state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import ConvNormTranspose
from convnorm_jax.layers import ConvTranspose, core, spectral, transposed
from convnorm_jax.layers.geometry import padding_pairs
from convnorm_jax.layers.reparam import ONIConv, OWNConv, SpectralNormConv, WeightNormConv

pytestmark = pytest.mark.usefixtures('quick_compilation')

# (picture, kernel size, strides, padding)
GEOMETRIES = [
    ((3, 4), (4, 4), (2, 2), 1),
    ((1, 1), (4, 4), (1, 1), 0),
    ((4, 3), (3, 5), (2, 1), ((0, 2), (1, 0))),
    ((3, 2), (2, 2), (3, 3), (1, 0)),
    ((2, 3), (5, 3), (3, 2), 2),
    ((3, 3), (1, 1), (2, 2), 0),
    ((9, 9), (4, 4), (2, 2), 1),  # a grid of separable transforms
]


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def dense_matrix(kernel, size, strides):
    """The linear map of the full transposed convolution, float64 [Hf*Wf*cout, H*W*cin], entry by entry."""
    (kh, kw, cin, cout), (height, width) = kernel.shape, size
    full = ((height - 1) * strides[0] + kh, (width - 1) * strides[1] + kw)
    matrix = np.zeros((*full, cout, height, width, cin))
    for i in range(height):
        for j in range(width):
            for a in range(kh):
                for b in range(kw):
                    matrix[i * strides[0] + a, j * strides[1] + b, :, i, j] += kernel[a, b].T
    return matrix.reshape(full[0] * full[1] * cout, -1), full


def numpy_layer(x, kernel, strides, padding, normalize):
    """The layer without affine part and BatchNorm: dense matrix, filter by numpy.fft, crop."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    matrix, full = dense_matrix(kernel, x.shape[1:3], strides)
    y = (x.reshape(len(x), -1) @ matrix.T).reshape(len(x), *full, kernel.shape[-1])
    if normalize:
        power = (np.abs(np.fft.fft2(kernel, full, axes=(0, 1))) ** 2).sum(2)
        y = np.fft.ifft2(np.fft.fft2(y, axes=(1, 2)) / np.sqrt(power), axes=(1, 2)).real
    (top, bottom), (left, right) = padding_pairs(padding)
    return y[:, top : full[0] - bottom, left : full[1] - right]


@functools.partial(jax.jit, static_argnums=0)
def init(layer, x):
    return layer.init(jax.random.key(0), x, use_running_average=True)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(layer, variables, x, use_running_average=True):
    y, update = layer.apply(variables, x, use_running_average=use_running_average, mutable=['batch_stats'])
    return y, {**variables, **update}


def bare(features, kernel_size, strides, padding, **options):
    return ConvNormTranspose(features, kernel_size, strides, padding, use_affine=False, use_batch_norm=False, **options)


@pytest.mark.parametrize('size,kernel_size,strides,padding', GEOMETRIES)
def test_against_the_dense_matrix(size, kernel_size, strides, padding):
    x = random(0, 2, *size, 3)
    layer = bare(4, kernel_size, strides, padding)
    variables = init(layer, x)
    expected = numpy_layer(x, variables['params']['kernel'], strides, padding, normalize=True)
    for use_running_average in (True, False):
        y, _ = apply(layer, variables, x, use_running_average)
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    # Of the same geometry without the filter.
    plain = ConvTranspose(4, kernel_size, strides, padding, use_bias=False)
    y = jax.jit(plain.apply)({'params': variables['params']}, x)
    expected = numpy_layer(x, variables['params']['kernel'], strides, padding, normalize=False)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('size,kernel_size,strides,padding', GEOMETRIES)
def test_against_torch(size, kernel_size, strides, padding, nhwc):
    torch = pytest.importorskip('torch')
    if padding == ((0, 2), (1, 0)):
        pytest.skip('PyTorch crops evenly')
    layer = ConvTranspose(4, kernel_size, strides, padding)
    x = random(1, 2, *size, 3)
    params = jax.jit(layer.init)(jax.random.key(0), x)['params']
    weight = np.array(params['kernel']).transpose(2, 3, 0, 1)
    theirs = torch.nn.functional.conv_transpose2d(
        torch.tensor(x.transpose(0, 3, 1, 2).copy()),
        torch.tensor(weight.copy()),
        torch.tensor(np.array(params['bias'])),
        stride=strides,
        padding=padding,
    )
    np.testing.assert_allclose(jax.jit(layer.apply)({'params': params}, x), nhwc(theirs.numpy()), atol=1e-5)


@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (2, 3)])
def test_adjoint_of_a_strided_convolution(strides):
    """<y, convolution(x)> = <transposed convolution(y), x>, the convolution being lax's, with swapped channels."""
    kernel, y = random(2, 3, 4, 5, 2), random(3, 1, 3, 2, 5)
    painted = transposed.full_transposed_convolution(y, kernel, strides)
    x = random(4, *painted.shape)
    convolved = jax.lax.conv_general_dilated(
        x, kernel.swapaxes(2, 3), strides, 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    np.testing.assert_allclose((convolved * y).sum(), (painted * x).sum(), rtol=1e-4)


@pytest.mark.parametrize('strides', [(1, 1), (2, 2)])
def test_every_output_channel_has_a_flat_unit_spectrum(strides):
    """The output of a unit impulse, uncropped, is the normalized kernel of that input channel."""
    cin, size = 3, (3, 4)
    layer = bare(5, (4, 4), strides, 0)
    impulses = np.zeros((cin, *size, cin), np.float32)
    impulses[range(cin), 0, 0, range(cin)] = 1
    kernels, _ = apply(layer, init(layer, impulses), impulses)
    power = (np.abs(np.fft.fft2(np.asarray(kernels, np.float64), axes=(1, 2))) ** 2).sum(0)
    np.testing.assert_allclose(power, 1, atol=1e-4)


def test_running_spectrum():
    layer, x = ConvNormTranspose(4), random(5, 2, 3, 3, 2)
    variables = init(layer, x)
    stats = variables['batch_stats']
    assert set(variables['params']) == {'kernel', 'affine_kernel', 'affine_bias', 'batch_norm'}
    assert set(stats) == {'preconditioner', 'count', 'batch_norm'}
    assert variables['params']['kernel'].shape == (4, 4, 2, 4) and stats['preconditioner'].shape == (8, 8, 4)
    v = spectral.preconditioner(variables['params']['kernel'], (8, 8))
    np.testing.assert_allclose(stats['preconditioner'], v, rtol=1e-5)
    given = {**variables, 'batch_stats': {**stats, 'preconditioner': 2 * v, 'count': jnp.float32(19999)}}
    _, after = apply(layer, given, x, use_running_average=False)
    assert after['batch_stats']['count'] == 20000
    weight = float(core.update_weight(20000))
    assert weight == pytest.approx(0.5)
    np.testing.assert_allclose(after['batch_stats']['preconditioner'], (weight + 2 * (1 - weight)) * v, rtol=1e-5)
    # Inference takes the running one, training the kernel's; 'exact' the kernel's always.
    y, same = apply(bare(4, (4, 4), (2, 2), 1), given, x)
    z, _ = apply(bare(4, (4, 4), (2, 2), 1), given, x, use_running_average=False)
    exact, _ = apply(bare(4, (4, 4), (2, 2), 1, spectrum='exact'), given, x)
    np.testing.assert_allclose(y, 2 * z, atol=1e-5)
    np.testing.assert_allclose(exact, z, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same['batch_stats'], given['batch_stats'])


def test_another_picture_size():
    layer = ConvNormTranspose(4)
    variables = init(layer, random(6, 1, 4, 4, 2))
    with pytest.raises(ValueError, match=r"ConvNormTranspose: .* 4x4 images, got 3x5.*spectrum='exact'"):
        layer.apply(variables, random(7, 1, 3, 5, 2), use_running_average=True)
    exact = ConvNormTranspose(4, spectrum='exact')
    assert exact.apply(variables, random(7, 1, 3, 5, 2), use_running_average=True).shape == (1, 6, 10, 4)


def test_gradients_are_finite_differences():
    layer, x = ConvNormTranspose(2, use_batch_norm=False), random(8, 1, 2, 2, 2)
    variables = init(layer, x)
    cotangent = random(9, 1, 4, 4, 2)

    @jax.jit
    def loss(params, x):  # at inference, where V is not the kernel's
        y = layer.apply({**variables, 'params': params}, x, use_running_average=True)
        return (y * cotangent).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)))(variables['params'], x)
    direction = jax.tree.map(lambda a: random(10, *a.shape), (variables['params'], x))
    step = 0.01
    moved = lambda sign: loss(*jax.tree.map(lambda a, d: a + sign * step * d, (variables['params'], x), direction))
    along = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction)))
    # Central differences are exact to step^2 times a third derivative.
    np.testing.assert_allclose((moved(1) - moved(-1)) / (2 * step), along, rtol=2e-3)


@pytest.mark.slow
def test_gradient_of_a_gradient():
    layer, x = ConvNormTranspose(2), random(11, 2, 2, 2, 2)
    variables = init(layer, x)

    @jax.jit
    def penalty(params, x):
        def total(x):
            y, _ = layer.apply({**variables, 'params': params}, x, use_running_average=False, mutable=['batch_stats'])
            return jnp.square(y).sum()

        return jnp.square(jax.grad(total)(x) + 1).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(penalty, (0, 1)))(variables['params'], x)):
        assert np.all(np.isfinite(leaf))


def test_initial_values_are_those_of_pytorch():
    """ConvTranspose2d's fan is counted on the output channels: within 1/sqrt(16 * 4)."""
    x = random(12, 1, 2, 2, 9)
    for layer in (ConvTranspose(4), WeightNormConv(4, (4, 4), (2, 2), 1, transposed=True)):
        params = jax.jit(layer.init)(jax.random.key(0), x)['params']
        for name in ('kernel', 'bias'):
            assert 0.3 / 8 < np.abs(params[name]).max() <= 1 / 8 * (1 + 1e-6)
    kernel = init(ConvNormTranspose(4), x)['params']['kernel']
    assert 0.9 / 8 < np.abs(kernel).max() <= 1 / 8 * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('layer', [SpectralNormConv, ONIConv, OWNConv, WeightNormConv])
def test_reparametrized_kernels_are_those_of_the_convolution(layer):
    """The same kernel and state give the same reparametrized kernel, transposed or not."""
    x, state = random(13, 2, 3, 3, 3), {}
    if layer is SpectralNormConv:
        state['use_running_average'] = True
    straight, upsampling = (
        layer(4, (4, 4), (1, 1) if not t else (2, 2), 3 if not t else 1, transposed=t, **state) for t in (False, True)
    )
    variables = jax.jit(straight.init)(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, jax.jit(upsampling.init)(jax.random.key(0), x))
    variables['params']['bias'] = jnp.zeros(4)
    impulses = np.zeros((3, 1, 1, 3), np.float32)
    impulses[range(3), 0, 0, range(3)] = 1
    # The kernel is what the convolution answers to an impulse, mirrored.
    kernel = np.asarray(straight.apply(variables, impulses))[:, ::-1, ::-1].transpose(1, 2, 0, 3)
    y = jax.jit(upsampling.apply)(variables, x)
    expected = numpy_layer(x, kernel, (2, 2), 1, normalize=False)
    assert y.shape == (2, 6, 6, 4)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_spectral_norm_as_torch_takes_it(nhwc):
    torch = pytest.importorskip('torch')
    theirs = torch.nn.utils.spectral_norm(torch.nn.ConvTranspose2d(3, 5, 4, 2, 1))
    x = random(14, 2, 3, 3, 3)
    layer = SpectralNormConv(5, (4, 4), (2, 2), 1, transposed=True, use_running_average=False)
    weight = theirs.weight_orig.detach().numpy()
    variables = {
        'params': {'kernel': weight.transpose(2, 3, 0, 1), 'bias': theirs.bias.detach().numpy()},
        'batch_stats': {'u': theirs.weight_u.numpy().copy(), 'v': theirs.weight_v.numpy().copy()},
    }
    expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2).copy())).detach().numpy()
    y, update = layer.apply(variables, x, mutable=['batch_stats'])
    np.testing.assert_allclose(y, nhwc(expected), atol=1e-5)
    np.testing.assert_allclose(update['batch_stats']['u'], theirs.weight_u.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(padding='SAME'), "padding='SAME': expected an int"),
        (dict(padding=4), 'padding=4.*between 0 and kernel_size - 1'),
        (dict(padding=-1), 'padding=-1'),
        (dict(kernel_size=(3, 3), padding=2, strides=1), 'nothing would be left'),
        (dict(kernel_size=0), 'kernel_size=0'),
        (dict(strides=(2,)), 'strides='),
    ],
)
def test_wrong_options(options, message):
    x = jnp.zeros((1, 1, 1, 2))
    for layer in (
        ConvNormTranspose(3, **options, use_running_average=True),
        ConvTranspose(3, **options),
        ONIConv(3, **{'kernel_size': 4, 'strides': 2, **options}, transposed=True),
    ):
        with pytest.raises(ValueError, match=message):
            layer.init(jax.random.key(0), x)


def test_wrong_rank_and_mode():
    with pytest.raises(ValueError, match=r'x.shape='):
        ConvTranspose(3).init(jax.random.key(0), jnp.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="mode='conv'"):
        layer = SpectralNormConv(3, (4, 4), (2, 2), 1, mode='conv', transposed=True, use_running_average=True)
        layer.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))


def test_bfloat16():
    layer = ConvNormTranspose(3, dtype=jnp.bfloat16)
    x = jnp.zeros((1, 4, 4, 2))
    y, variables = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), x, use_running_average=True))
    assert y.dtype == jnp.bfloat16 and all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables))
