"""OCNN's penalties: golden values, the matrix of the convolution in float64, PyTorch; and which kernels they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax.layers import ocnn
from convnorm_jax.models.classifiers import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')

deconvolution = jax.jit(jax.value_and_grad(ocnn.deconvolution_penalty), static_argnums=(1, 2))
deconvolution_value = jax.jit(ocnn.deconvolution_penalty, static_argnums=(1, 2))
matrix = jax.jit(jax.value_and_grad(ocnn.matrix_penalty))


def random(seed, *shape):
    return (0.3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def hwio(w):
    return np.ascontiguousarray(w.transpose(2, 3, 1, 0))


def close(actual, expected, tolerance=2e-6):
    """|actual - expected| <= tolerance * the largest expected value."""
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def dirac(size, channels):
    """The identity as a kernel [size, size, channels, channels]."""
    kernel = np.zeros((size, size, channels, channels), np.float32)
    kernel[size // 2, size // 2] = np.eye(channels)
    return kernel


# --- the two penalties ---------------------------------------------------------------------------


@pytest.mark.parametrize('case', ['s1', 's2', 'wide'])
def test_golden(load_golden, case):
    golden = {k.removeprefix(f'ocnn/{case}/'): v for k, v in load_golden('weights').items() if k.startswith('ocnn/')}
    kernel, stride = hwio(golden['w']), int(golden['stride'])
    for name, (value, gradient) in {'deconv': deconvolution(kernel, stride), 'orth': matrix(kernel)}.items():
        assert value.dtype == jnp.float32 and value.shape == ()
        close(value, golden[name])
        close(gradient, hwio(golden[f'{name}_grad']))


def convolution_matrix(kernel, size, strides=(1, 1)):
    """[H/sh, W/sw, cout, H, W, cin]: the strided cross-correlation on a torus of size x size, entry by entry."""
    kh, kw, cin, cout = kernel.shape
    m = np.zeros((size // strides[0], size // strides[1], cout, size, size, cin))
    for y in range(m.shape[0]):
        for x in range(m.shape[1]):
            for u in range(kh):
                for v in range(kw):
                    m[y, x, :, (y * strides[0] + u) % size, (x * strides[1] + v) % size] += kernel[u, v].T
    return m


@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (3, 3), (1, 2)])
@pytest.mark.parametrize('shape', [(3, 3, 2, 3), (3, 3, 3, 2), (2, 3, 2, 2), (1, 1, 3, 2)])
def test_the_papers_penalty_is_that_of_the_matrix(shape, strides):
    kernel = random(0, *shape)
    m = convolution_matrix(np.asarray(kernel, np.float64), 6, strides)
    pixels = m.shape[0] * m.shape[1]
    m = m.reshape(pixels * shape[3], -1)
    expected = np.linalg.norm(m @ m.T - np.eye(len(m))) / np.sqrt(pixels)
    close(deconvolution_value(kernel, strides, 'paper'), expected)


@pytest.mark.parametrize('shape', [(3, 3, 2, 3), (5, 5, 2, 3)])
@pytest.mark.parametrize('stride,pixels,middle', [(1, (-1, 0, 1), 0), (2, (-1, 1), 1), (3, (-1,), -1)])
def test_the_published_penalty_is_a_part_of_the_matrix(shape, stride, pixels, middle):
    kernel, size, cout = random(1, *shape), 10, shape[3]
    m = convolution_matrix(np.asarray(kernel, np.float64), size).reshape(size * size * cout, -1)
    gram = (m @ m.T).reshape(size, size, cout, size, size, cout)
    energy = 0
    for dy in pixels:
        for dx in pixels:
            # The filters at pixel (0, 0) against those at (dy, dx).
            block = gram[0, 0, :, dy, dx]
            energy += np.sum((block - np.eye(cout) * (dy == dx == middle)) ** 2)
    close(deconvolution_value(kernel, stride), np.sqrt(energy))


@pytest.mark.parametrize(
    'lags,shape,stride',
    [
        ('published', (3, 3, 4, 6), 1),
        ('published', (5, 5, 3, 2), 2),
        ('published', (1, 1, 3, 4), 2),
        ('paper', (3, 3, 4, 6), 1),
        ('paper', (5, 5, 3, 2), 2),
        ('paper', (5, 5, 3, 2), 3),
    ],
)
def test_against_torch(lags, shape, stride):
    torch = pytest.importorskip('torch')
    kernel = random(2, *shape)
    w = torch.tensor(kernel.transpose(3, 2, 0, 1), dtype=torch.float64, requires_grad=True)
    padding = 1 if lags == 'published' else (shape[0] - 1) // stride * stride
    out = torch.nn.functional.conv2d(w, w, stride=stride, padding=padding)
    target = torch.zeros_like(out)
    target[:, :, out.shape[2] // 2, out.shape[3] // 2] = torch.eye(shape[3])
    expected = torch.linalg.vector_norm(out - target)
    expected.backward()
    value, gradient = deconvolution(kernel, stride, lags)
    close(value, expected.item())
    close(gradient, hwio(w.grad.numpy()))


@pytest.mark.parametrize('shape', [(1, 1, 3, 5), (1, 1, 5, 3), (3, 3, 2, 4), (1, 1, 4, 4)])
def test_matrix_penalty_and_its_gradient(shape):
    kernel = random(3, *shape)
    w = kernel.astype(np.float64).reshape(-1, shape[3])
    # With the singular values s: sqrt(sum (s^2 - 1)^2), gradient U (2 s (s^2 - 1)) V^T / penalty.
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    expected = np.sqrt(np.sum((s**2 - 1) ** 2))
    value, gradient = matrix(kernel)
    close(value, expected)
    close(gradient, ((u * (2 * s * (s**2 - 1) / expected)) @ vt).reshape(shape))


@pytest.mark.parametrize('scale', [1.0, 1 + 1e-7, 0.0])
def test_gradient_at_an_orthogonal_kernel(scale):
    size = {1.0: 0.0, 1 + 1e-7: 1e-6, 0.0: 2.0}[scale]  # zero, next to zero, and |0 - I| of 4 channels
    for penalty, kernel in [
        (lambda k: deconvolution(k, 1), dirac(3, 4)),
        (lambda k: deconvolution(k, 2, 'paper'), dirac(3, 4)),
        (matrix, dirac(1, 4)),
    ]:
        value, gradient = penalty(np.float32(scale) * kernel)
        np.testing.assert_allclose(value, size, atol=1e-6)
        assert np.all(np.isfinite(gradient))
        if scale == 1:
            np.testing.assert_array_equal(gradient, 0)


def test_descent_makes_a_kernel_orthogonal():
    kernel = random(4, 3, 3, 4, 4)
    first = deconvolution(kernel, 1, 'paper')[0]
    for step in range(200):
        value, gradient = deconvolution(kernel, 1, 'paper')
        kernel = kernel - 0.05 * 0.98**step * gradient
    assert value < 0.1 * first
    # An orthogonal convolution keeps the norm of every picture.
    x = random(5, 1, 8, 8, 4)
    y = jax.lax.conv_general_dilated(
        np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode='wrap'),
        kernel,
        (1, 1),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    assert 0.9 < np.linalg.norm(y) / np.linalg.norm(x) < 1.1


def test_bfloat16_kernels_are_penalized_in_float32():
    kernel = jnp.asarray(random(6, 3, 3, 4, 6), jnp.bfloat16)
    for penalty in (ocnn.deconvolution_penalty, ocnn.matrix_penalty):
        value = penalty(kernel)
        assert value.dtype == jnp.float32
        close(value, penalty(kernel.astype(jnp.float32)))


# --- which kernels ---------------------------------------------------------------------------


@functools.cache
def net(name, layer='batchnorm', **options):
    """(model, shapes of its parameters)."""
    model = create_model(name, num_classes=10, layer=layer, **options)
    images = jnp.zeros((1, 32, 32, 3))
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), images))['params']


def drawn(params):
    """Random parameters of the given shapes."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda s: (0.1 * rng.standard_normal(s.shape)).astype(np.float32), params)


# The kernels and strides of the published trainer, `diff` in its training loop; None: the matrix penalty.
PUBLISHED = {
    'layer1_0/conv1': 1,
    'layer1_1/conv1': 1,
    'layer2_0/conv1': 2,
    'layer2_1/conv1': 1,
    'layer3_0/conv1': 2,
    'layer3_1/conv1': 1,
    'layer4_0/conv1': 2,
    'layer4_1/conv1': 1,
    'layer2_0/shortcut': None,
    'layer3_0/shortcut': None,
    'layer4_0/shortcut': None,
}


@pytest.mark.parametrize('layer', ['batchnorm', 'convnorm', 'switchnorm', 'spectralnorm'])
def test_default_on_resnet18_is_the_published_choice(layer):
    model, params = net('resnet18', layer, width=4)
    suffix = '/kernel' if layer == 'convnorm' else '/conv/kernel'
    paths = ocnn.kernel_paths(params)
    assert set(paths) == {name + suffix for name in PUBLISHED} and len(paths) == 11
    strides = ocnn.convolution_strides(model, (32, 32, 3))
    for name, stride in PUBLISHED.items():
        if stride:
            assert strides[name + suffix] == (stride, stride)


def test_the_sum_on_resnet18_is_the_published_one():
    model, params = net('resnet18', width=4)
    params = drawn(params)
    penalty = ocnn.make_ocnn_penalty(params, strides=ocnn.convolution_strides(model, (32, 32, 3)))
    value, gradient = jax.jit(jax.value_and_grad(penalty))(params)
    assert value.shape == () and value.dtype == jnp.float32

    @jax.jit
    def by_hand(params):
        terms = []
        for name, stride in PUBLISHED.items():
            block, conv = name.split('/')
            kernel = params[block][conv]['conv']['kernel']
            terms.append(ocnn.matrix_penalty(kernel) if stride is None else ocnn.deconvolution_penalty(kernel, stride))
        return terms

    close(value, sum(float(term) for term in by_hand(params)))
    paths = ocnn.kernel_paths(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = '/'.join(key.key for key in path)
        assert np.any(leaf != 0) == (name in paths), name


@pytest.mark.parametrize('name,count', [('simple_cnn', 6), ('vgg11', 8), ('simple_cnn2', 3)])
def test_default_on_plain_nets_is_every_3x3_kernel(name, count):
    model, params = net(name, 'convnorm')
    paths = ocnn.kernel_paths(params)
    assert len(paths) == count
    assert all(params[path.split('/')[0]]['kernel'].shape[:2] == (3, 3) for path in paths)
    assert set(paths) <= set(ocnn.convolution_strides(model, (32, 32, 3)))


def test_default_on_bottlenecks():
    # The authors' script for ResNet-50: three convolutions in each of 16 blocks, and four shortcuts.
    _, params = net('resnet50', width=4)
    assert len(ocnn.kernel_paths(params)) == 3 * 16 + 4
    # ResNet-34: 16 blocks and three shortcuts.
    _, params = net('resnet34', width=4)
    assert len(ocnn.kernel_paths(params)) == 16 + 3


class Own(nn.Module):
    """A net of the user's: convolutions of Flax, a dense layer, strides as Flax takes them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name='first')(x)
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name='second')(x))
        x = nn.Conv(4, (1, 1), strides=(2, 2), name='third')(x)
        return nn.Dense(3, name='head')(x.mean((1, 2)))


def own_net():
    """(model, shapes of its parameters)."""
    return Own(), jax.eval_shape(lambda: Own().init(jax.random.key(0), jnp.zeros((1, 8, 8, 2))))['params']


def test_a_pattern_on_a_net_of_the_users():
    model, params = own_net()
    params = drawn(params)
    strides = ocnn.convolution_strides(model, (8, 8, 2))
    assert strides == {'first/kernel': (1, 1), 'second/kernel': (2, 2), 'third/kernel': (2, 2)}
    assert ocnn.kernel_paths(params, '.*') == ('first/kernel', 'second/kernel', 'third/kernel')
    make = functools.partial(ocnn.make_ocnn_penalty, params)

    @jax.jit
    def values(params):
        k = {name: params[name]['kernel'] for name in ('first', 'second', 'third')}
        return {
            'all': make(strides=strides, pattern='.*', lags='paper')(params),
            'one': make(strides={'second/kernel': 2}, pattern='second.*')(params),
            # A 1x1 kernel needs no strides.
            'third': make(strides={}, pattern='third/kernel')(params),
        }, {
            'all': ocnn.deconvolution_penalty(k['first'], 1, 'paper')
            + ocnn.deconvolution_penalty(k['second'], 2, 'paper')
            + ocnn.matrix_penalty(k['third']),
            'one': ocnn.deconvolution_penalty(k['second'], 2),
            'third': ocnn.matrix_penalty(k['third']),
        }

    jax.tree.map(close, *values(params))


@pytest.mark.parametrize('pattern', ['conv1', 'layer9.*', 'linear/kernel', ''])
def test_no_match_is_an_error_that_names_paths(pattern):
    _, params = net('resnet18', width=4)
    with pytest.raises(ValueError) as error:
        ocnn.make_ocnn_penalty(params, strides={}, pattern=pattern)
    # 20 convolutions: the stem, 16 in the blocks, three shortcuts.
    assert f'pattern={pattern!r}: matches none of the 20' in str(error.value)
    assert 'conv1/conv/kernel, layer1_0/conv1/conv/kernel' in str(error.value)


def test_the_default_fails_loudly_on_another_net():
    _, params = own_net()
    with pytest.raises(ValueError, match=r'matches none of the 3 .*first/kernel, second/kernel, third/kernel'):
        ocnn.kernel_paths(params)


def test_other_mistakes():
    model, params = net('resnet18', width=4)
    strides = ocnn.convolution_strides(model, (32, 32, 3))
    with pytest.raises(ValueError, match=r"pattern='\('.*regular expression"):
        ocnn.kernel_paths(params, '(')
    with pytest.raises(ValueError, match=r"lags='all'.*published.*paper"):
        ocnn.make_ocnn_penalty(params, strides=strides, lags='all')
    with pytest.raises(ValueError, match="lags='all'"):
        ocnn.deconvolution_penalty(dirac(3, 2), lags='all')
    with pytest.raises(ValueError, match=r'strides=.*layer1_0/conv1/conv/kernel'):
        ocnn.make_ocnn_penalty(params, strides={})
    with pytest.raises(ValueError, match='strides of layer1_0/conv1/conv/kernel=0'):
        ocnn.make_ocnn_penalty(params, strides={**strides, 'layer1_0/conv1/conv/kernel': 0})
