"""The ConvNorm module: golden values, float64 NumPy, and its life in a Flax training loop."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.training import train_state

from convnorm_jax import ConvNorm
from convnorm_jax.layers import core
from convnorm_jax.layers.geometry import canonical_padding, of_convolution
from convnorm_jax.layers.method import METHODS, choose_method
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

# Agreement with the published float32 code: it is 3e-6 of the largest value at worst, from
# float32 sums in another order; seven times that is allowed (the golden README asks for 1e-4).
GOLDEN_TOLERANCE = 2e-5


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(actual, expected, tolerance, scale=None):
    """|actual - expected| <= tolerance * scale, scale being the largest expected value by default."""
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * scale)


@functools.partial(jax.jit, static_argnums=(0, 2))
def init(layer, x, use_running_average=True):
    return layer.init(jax.random.key(0), x, use_running_average=use_running_average)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(layer, variables, x):
    return layer.apply(variables, x, use_running_average=True)


def eager_train(layer, variables, x):
    """(output, variables after the update) of one training pass."""
    y, update = layer.apply(variables, x, use_running_average=False, mutable=['batch_stats'])
    return y, {**variables, **update}


train = jax.jit(eager_train, static_argnums=0)


def numpy_layer(x, kernel, padding, strides=(1, 1), affine_kernel=None, affine_bias=0.0):
    """Steps 1 to 5 of the published layer in float64: V of this kernel, no batch normalization."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    (kh, kw), (h, w) = kernel.shape[:2], x.shape[1:3]
    grid = (h + kh - 1, w + kw - 1)
    padded = np.pad(x, ((0, 0), (kh - 1,) * 2, (kw - 1,) * 2, (0, 0)))
    y = sum(padded[:, a : a + grid[0], b : b + grid[1]] @ kernel[a, b] for a in range(kh) for b in range(kw))
    power = np.square(np.abs(np.fft.rfft2(kernel, grid, axes=(0, 1)))).sum(axis=2)
    y = np.fft.irfft2(np.fft.rfft2(y, axes=(1, 2)) * power**-0.5, grid, axes=(1, 2))
    (top, bottom), (left, right) = padding
    y = y[:, kh - 1 - top : grid[0] - (kh - 1 - bottom), kw - 1 - left : grid[1] - (kw - 1 - right)]
    y = y[:, :: strides[0], :: strides[1]]
    if affine_kernel is None:
        return y
    padded = np.pad(y, ((0, 0), ((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2), (0, 0)))
    h, w = y.shape[1:3]
    affine_kernel = np.asarray(affine_kernel, np.float64)
    return affine_bias + sum(
        padded[:, a : a + h, b : b + w] * affine_kernel[a, b, 0] for a in range(kh) for b in range(kw)
    )


# --- golden values -------------------------------------------------------------------------


class GoldenLayer:
    """What our layer does with a golden file's parameters and batches."""

    def __init__(self, golden, nhwc, method):
        self.golden = golden
        c = self.config = json.loads(str(golden['config']))
        layer = ConvNorm(
            c['cout'],
            (c['k'],) * 2,
            (c['stride'],) * 2,
            c['padding'],
            use_affine=c['affine'],
            use_batch_norm=c['bn'],
            method=method,
        )
        params = {path: self.ours(f'param/{name}') for path, name in self.names().items()}
        xs = [nhwc(x) for x in golden['x']]
        variables = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, use_running_average=True), xs[0])
        assert jax.tree.structure(variables['params']) == jax.tree.structure(traverse_util.unflatten_dict(params))
        assert jax.tree.map(jnp.shape, variables['params']) == jax.tree.map(
            jnp.shape, traverse_util.unflatten_dict(params)
        )
        cotangent = nhwc(golden['cotangent'])

        @jax.jit
        def step(params, stats, x):
            def output(params, x):
                return layer.apply(
                    {'params': params, 'batch_stats': stats}, x, use_running_average=False, mutable=['batch_stats']
                )

            y, back, update = jax.vjp(output, params, x, has_aux=True)
            return y, update['batch_stats'], back(cotangent)

        # As published: variances start at 1, everything else at 0.
        stats = traverse_util.unflatten_dict(
            {
                path: (np.ones if path[-1] == 'var' else np.zeros)(leaf.shape, leaf.dtype)
                for path, leaf in traverse_util.flatten_dict(variables['batch_stats']).items()
            }
        )
        params = traverse_util.unflatten_dict(params)
        self.outputs, self.stats = [], []
        for s, x in enumerate(xs):
            y, stats, gradients = step(params, stats, x)
            self.outputs.append(y)
            self.stats.append(stats)
            if s == 0:
                self.grad_params, self.grad_x = traverse_util.flatten_dict(gradients[0]), gradients[1]
        self.eval_output = evaluate(layer, {'params': params, 'batch_stats': stats}, xs[0])

    def names(self):
        names = {('kernel',): 'weight'}
        if self.config['affine']:
            names.update({('affine_kernel',): 'bpconv.weight', ('affine_bias',): 'bpconv.bias'})
            if self.config['bn']:
                names.update({('batch_norm', 'scale'): 'batch_norm.weight', ('batch_norm', 'bias'): 'batch_norm.bias'})
        return names

    def ours(self, key):
        array = self.golden[key]
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


BY_CHOICE = [f'None {name}' for name in 'abcdefgh']


@pytest.fixture(
    scope='module',
    params=few(
        [*BY_CHOICE, *(f'{method} {name}' for method in METHODS for name in 'abcdefgh')],
        *BY_CHOICE, 'frequency a', 'spatial b', 'reference c',
    ),
)  # fmt: skip
def golden_layer(request, load_golden, nhwc):
    method, name = request.param.split()
    return GoldenLayer(load_golden(f'layer_{name}'), nhwc, None if method == 'None' else method)


def test_golden_training_outputs(golden_layer, nhwc):
    for s, y in enumerate(golden_layer.outputs):
        close(y, nhwc(golden_layer.golden[f'train_y{s}']), GOLDEN_TOLERANCE)


def test_golden_evaluation_output(golden_layer, nhwc):
    close(golden_layer.eval_output, nhwc(golden_layer.golden['eval_y']), GOLDEN_TOLERANCE)


def test_golden_gradients(golden_layer, nhwc):
    close(golden_layer.grad_x, nhwc(golden_layer.golden['grad_x']), GOLDEN_TOLERANCE)
    expected = {path: golden_layer.ours(f'grad/{name}') for path, name in golden_layer.names().items()}
    assert expected.keys() == golden_layer.grad_params.keys()
    # In front of BatchNorm the gradient of the channel-wise bias, and of a 1x1 channel-wise kernel,
    # is zero but for rounding, in the reference too: each is compared on the scale of the largest.
    largest = max(np.abs(g).max() for g in expected.values())
    for path, gradient in golden_layer.grad_params.items():
        nothing = golden_layer.config['bn'] and (
            path == ('affine_bias',) or (path == ('affine_kernel',) and golden_layer.config['k'] == 1)
        )
        close(gradient, expected[path], GOLDEN_TOLERANCE, largest if nothing else None)


def test_golden_running_spectra(golden_layer, full_spectrum):
    for s, stats in enumerate(golden_layer.stats):
        assert stats['count'] == s + 1
        v = stats['preconditioner']
        close(v, full_spectrum(golden_layer.golden[f'running_V{s}'], v.shape[1]), GOLDEN_TOLERANCE)


def test_golden_batch_norm_statistics(golden_layer):
    if not golden_layer.config['bn']:
        assert 'batch_norm' not in golden_layer.stats[-1]
        return
    stats = golden_layer.stats[-1]['batch_norm']
    close(stats['mean'], golden_layer.golden['bn_mean'], GOLDEN_TOLERANCE)
    close(stats['var'], golden_layer.golden['bn_var'], GOLDEN_TOLERANCE)


# --- the layer as an operator --------------------------------------------------------------


@pytest.mark.parametrize('size', [(6, 6), (7, 8)], ids=['dense', 'separable'])
@pytest.mark.parametrize('kernel_size', [(3, 3), (5, 5), (2, 3)])
def test_every_output_channel_has_a_flat_unit_spectrum(kernel_size, size):
    kh, kw = kernel_size
    layer = ConvNorm(4, kernel_size, padding=((kh - 1,) * 2, (kw - 1,) * 2), use_affine=False, use_batch_norm=False)
    deltas = np.zeros((3, *size, 3), np.float32)  # one for each input channel
    deltas[np.arange(3), 2, 3, np.arange(3)] = 1
    response, _ = train(layer, init(layer, deltas), deltas)
    power = np.square(np.abs(np.fft.fft2(response, axes=(1, 2)))).sum(axis=0)
    # A float32 sum of a hundred values of order 0.1, squared, on the scale 1.
    np.testing.assert_allclose(power, 1, atol=2e-5)


def test_pointwise_kernel_has_unit_norm():
    layer = ConvNorm(5, (1, 1), use_affine=False, use_batch_norm=False)
    x = np.eye(4, dtype=np.float32).reshape(4, 1, 1, 4)
    response, _ = train(layer, init(layer, x), x)
    np.testing.assert_allclose(np.square(response).sum(axis=(0, 1, 2)), 1, rtol=1e-6)


@pytest.mark.parametrize(
    'kernel_size,padding,strides',
    [
        ((3, 3), ((1, 1), (1, 1)), (1, 1)),
        ((2, 2), ((0, 1), (1, 0)), (1, 2)),
        ((1, 3), ((0, 0), (2, 0)), (2, 1)),
        ((5, 3), ((4, 1), (0, 2)), (2, 2)),
        ((1, 1), ((0, 0), (0, 0)), (3, 2)),
    ],
)
def test_against_numpy(kernel_size, padding, strides):
    layer = ConvNorm(4, kernel_size, strides, padding, use_batch_norm=False)
    x = random(0, 2, 7, 6, 3)
    variables = init(layer, x)
    y, _ = train(layer, variables, x)
    p = variables['params']
    expected = numpy_layer(x, p['kernel'], padding, strides, p['affine_kernel'], p['affine_bias'])
    assert y.shape == expected.shape
    close(y, expected, 1e-5)  # about 30 eps: three float32 sums of some 50 terms after one another


def test_v_is_a_constant_to_differentiation():
    # With V constant the layer is linear in its kernel: <gradient, kernel> = <cotangent, output>.
    # Were V differentiated, the output would not depend on the kernel's scale: <gradient, kernel> = 0.
    layer = ConvNorm(3, use_affine=False, use_batch_norm=False)
    x, cotangent = random(1, 2, 6, 6, 2), random(2, 2, 6, 6, 3)
    variables = init(layer, x)
    kernel = variables['params']['kernel']

    def loss(kernel, x):
        y, _ = train(layer, {**variables, 'params': {'kernel': kernel}}, x)
        return (y * cotangent).sum()

    value, (gradient, grad_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(kernel, jnp.asarray(x))
    assert abs(value) > 1
    np.testing.assert_allclose((gradient * kernel).sum(), value, rtol=1e-4)  # float32 sums with cancellation
    # A finite difference of the float64 layer with V held at its value: exact, as it is linear.
    direction = random(3, *kernel.shape).astype(np.float64)
    grid = (8, 8)
    power = np.square(np.abs(np.fft.fft2(np.asarray(kernel, np.float64), grid, axes=(0, 1)))).sum(axis=2)

    def frozen(k):
        hat = np.conj(np.fft.fft2(k[::-1, ::-1].conj(), grid, axes=(0, 1)))
        x_hat = np.fft.fft2(x.astype(np.float64), grid, axes=(1, 2))
        y = np.fft.ifft2(np.einsum('bhwi,hwio->bhwo', x_hat, hat.conj()) * power**-0.5, axes=(1, 2)).real
        return (y[:, 1:7, 1:7] * cotangent).sum()

    np.testing.assert_allclose(frozen(np.asarray(kernel, np.float64)), value, rtol=1e-4)
    np.testing.assert_allclose((gradient * direction).sum(), frozen(direction), rtol=1e-4)
    eps = 1e-2  # the layer is linear in x, so the step only has to beat float32 rounding
    step = random(4, *x.shape)
    difference = (loss(kernel, x + eps * step) - loss(kernel, x - eps * step)) / (2 * eps)
    np.testing.assert_allclose((grad_x * step).sum(), difference, rtol=2e-3)


@pytest.mark.parametrize('affine,batch_norm', [(True, True), (False, False)])
def test_zero_filter_is_finite(affine, batch_norm):
    layer = ConvNorm(3, use_affine=affine, use_batch_norm=batch_norm)
    x = random(5, 2, 6, 6, 2)
    variables = init(layer, x)
    variables['params']['kernel'] = variables['params']['kernel'].at[..., 1].set(0)

    def loss(params, x):
        y, after = train(layer, {**variables, 'params': params}, x)
        return (y * random(6, *y.shape)).sum(), (y, after['batch_stats'])

    gradients, results = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables['params'], jnp.asarray(x))
    for leaf in jax.tree.leaves((gradients, results)):
        assert np.all(np.isfinite(leaf))


# --- the running spectrum ------------------------------------------------------------------


@pytest.mark.parametrize('count', [1, 2, 1000, 20000, 39000, 40000, 40001, 10**6])
def test_update_weight(count):
    expected = max((1 + math.cos(math.pi * min(count, 40000) / 40000)) / 2, 0.01)
    weight = core.update_weight(jnp.asarray(count, jnp.int32))
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, expected, rtol=0, atol=2e-7)  # float32, on values up to 1


@pytest.mark.parametrize(
    'momentum,count', [(None, 0), (None, 19999), (None, 39999), (None, 999999), (0.75, 0), (0.75, 50000)]
)
def test_running_spectrum_update(momentum, count):
    layer = ConvNorm(3, momentum=momentum, use_batch_norm=False)
    x = random(7, 1, 5, 6, 2)
    variables = init(layer, x)
    old = random(8, 7, 8, 3) ** 2
    variables['batch_stats'] = {'preconditioner': jnp.asarray(old), 'count': jnp.asarray(count, jnp.int32)}
    _, after = train(layer, variables, x)
    weight = (
        1 - momentum if momentum is not None else max((1 + math.cos(math.pi * min(count + 1, 40000) / 40000)) / 2, 0.01)
    )
    kernel = np.asarray(variables['params']['kernel'], np.float64)
    v = np.square(np.abs(np.fft.fft2(kernel, (7, 8), axes=(0, 1)))).sum(axis=2) ** -0.5
    np.testing.assert_allclose(after['batch_stats']['preconditioner'], weight * v + (1 - weight) * old, rtol=2e-5)
    assert after['batch_stats']['count'] == count + 1 and after['batch_stats']['count'].dtype == jnp.int32
    # Inference takes the average as it is, and writes nothing.
    y, update = jax.jit(lambda v, x: layer.apply(v, x, use_running_average=True, mutable=['batch_stats']))(after, x)
    jax.tree.map(np.testing.assert_array_equal, update['batch_stats'], after['batch_stats'])
    if weight < 0.999:  # the first update takes the new value alone
        assert np.abs(y - train(layer, after, x)[0]).max() > 1e-3


@pytest.mark.parametrize('use_running_average', [True, False])
def test_init_starts_from_the_kernel_and_counts_nothing(use_running_average):
    layer = ConvNorm(3)
    x = random(9, 2, 6, 6, 2)
    variables = init(layer, x, use_running_average)
    assert set(variables) == {'params', 'batch_stats'}
    assert set(variables['batch_stats']) == {'preconditioner', 'count', 'batch_norm'}
    assert variables['batch_stats']['count'] == 0
    np.testing.assert_array_equal(variables['batch_stats']['batch_norm']['mean'], 0)
    np.testing.assert_array_equal(variables['batch_stats']['batch_norm']['var'], 1)
    kernel = np.asarray(variables['params']['kernel'], np.float64)
    v = np.square(np.abs(np.fft.fft2(kernel, (8, 8), axes=(0, 1)))).sum(axis=2) ** -0.5
    np.testing.assert_allclose(variables['batch_stats']['preconditioner'], v, rtol=2e-5)


@pytest.mark.parametrize('use_running_average', [True, False])
def test_exact_mode_has_the_same_variables(use_running_average):
    # A training step's state must have the structure of the one it was given (jit, scan, checkpoints).
    x = random(9, 2, 6, 6, 2)
    exact = init(ConvNorm(3, spectrum='exact'), x, use_running_average)
    running = init(ConvNorm(3), x, use_running_average)
    assert jax.tree.map(jnp.shape, exact) == jax.tree.map(jnp.shape, running)


@pytest.mark.parametrize('size,other', [((8, 8), (9, 9)), ((3, 32), (3, 33)), ((8, 8), (8, 7))])
def test_another_picture_size_at_inference(size, other):
    layer = ConvNorm(3)
    x = random(10, 2, *size, 2)
    _, variables = train(layer, init(layer, x), x)
    picture = random(11, 2, *other, 2)
    with pytest.raises(ValueError) as error:
        layer.apply(variables, picture, use_running_average=True)
    for h, w in (size, other):
        assert f'{h}x{w}' in str(error.value)
    assert "spectrum='exact'" in str(error.value)

    exact = layer.clone(spectrum='exact')
    y = evaluate(exact, variables, picture)
    p, stats = variables['params'], variables['batch_stats']['batch_norm']
    expected = numpy_layer(picture, p['kernel'], ((1, 1), (1, 1)), (1, 1), p['affine_kernel'], p['affine_bias'])
    expected = (expected - np.asarray(stats['mean'])) / np.sqrt(np.asarray(stats['var'], np.float64) + 1e-5)
    # As in test_against_numpy; the running variance starts at 1, so BatchNorm enlarges little.
    close(y, expected, 1e-5)


def test_size_error_names_the_layer():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return ConvNorm(2, use_running_average=True, name='stem')(x)

    variables = jax.jit(Net().init)(jax.random.key(0), jnp.zeros((1, 6, 6, 1)))
    with pytest.raises(ValueError, match='stem'):
        Net().apply(variables, jnp.zeros((1, 7, 6, 1)))


def test_pointwise_layer_takes_any_picture_size():
    layer = ConvNorm(3, (1, 1))
    variables = init(layer, random(12, 1, 6, 6, 2))
    picture = random(13, 2, 9, 5, 2)
    p = variables['params']
    y = evaluate(layer, variables, picture)
    expected = numpy_layer(picture, p['kernel'], ((0, 0), (0, 0)), (1, 1), p['affine_kernel'], p['affine_bias'])
    close(y, expected / np.sqrt(1 + 1e-5), 1e-5)


# --- shapes, paddings, errors --------------------------------------------------------------


@pytest.mark.parametrize('kernel_size', [(1, 1), (2, 2), (3, 3), (5, 5), (1, 3)])
@pytest.mark.parametrize('padding', ['SAME', 'VALID', 0, ((0, 0), (0, 1))])
@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (2, 1)])
def test_output_shapes_are_those_of_a_convolution(kernel_size, padding, strides):
    if kernel_size == (1, 1) and not isinstance(padding, (str, int)):
        padding = ((0, 0), (0, 0))
    x = jax.ShapeDtypeStruct((2, 8, 7, 3), jnp.float32)
    plain = nn.Conv(4, kernel_size, strides, padding)
    ours = ConvNorm(4, kernel_size, strides, padding)
    key = jax.random.key(0)
    shape = jax.eval_shape(lambda x: plain.init_with_output(key, x)[0], x)
    assert jax.eval_shape(lambda x: ours.init_with_output(key, x, use_running_average=False)[0], x) == shape


def test_same_padding_places_the_kernel_as_a_convolution_does():
    # A filter with a single tap has a flat spectrum: ConvNorm is then the convolution itself.
    for kernel_size, strides in [((3, 3), (2, 2)), ((2, 2), (1, 1)), ((5, 3), (2, 1))]:
        x = random(14, 1, 8, 7, 2)
        kernel = np.zeros((*kernel_size, 2, 1), np.float32)
        kernel[0, -1, 1] = 1
        ours = ConvNorm(1, kernel_size, strides, use_affine=False, use_batch_norm=False)
        variables = init(ours, x)
        y, _ = train(ours, {**variables, 'params': {'kernel': jnp.asarray(kernel)}}, x)
        plain = jax.lax.conv_general_dilated(x, kernel, strides, 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
        np.testing.assert_allclose(y, plain, atol=1e-5)  # two float32 transforms of values up to 3


@pytest.mark.parametrize(
    'size,kernel_size,strides,padding,expected',
    [
        ((8, 8), (3, 3), (1, 1), 'SAME', ((1, 1), (1, 1))),
        ((8, 7), (3, 3), (2, 2), 'SAME', ((0, 1), (1, 1))),
        ((8, 8), (2, 5), (1, 1), 'SAME', ((0, 1), (2, 2))),
        ((8, 8), (3, 3), (1, 1), 'VALID', ((0, 0), (0, 0))),
        ((8, 8), (3, 3), (1, 1), 2, ((2, 2), (2, 2))),
        ((8, 8), (5, 3), (1, 1), (3, 1), ((3, 3), (1, 1))),
        ((8, 8), (5, 3), (1, 1), [(0, 4), (2, 1)], ((0, 4), (2, 1))),
        ((8, 8), (5, 3), (1, 1), (np.int64(3), (1, 0)), ((3, 3), (1, 0))),
    ],
)
def test_canonical_padding(size, kernel_size, strides, padding, expected):
    assert canonical_padding(padding, size, kernel_size, strides) == expected


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(padding=3), 'padding=3'),
        (dict(padding=-1), 'padding=-1'),
        (dict(padding=1, kernel_size=(1, 1)), r'padding=1 .*kernel_size=\(1, 1\)'),
        (dict(padding=((0, 3), (0, 0))), r'padding=\(\(0, 3\)'),
        (dict(padding=(1, 1, 1)), r'padding=\(1, 1, 1\)'),
        (dict(padding=((1, 1, 1), 0)), r'padding=\(\(1, 1, 1\)'),
        (dict(padding='REFLECT'), "padding='REFLECT'.*'SAME'.*'VALID'.*'CIRCULAR'"),
        (dict(kernel_size=0), 'kernel_size=0'),
        (dict(kernel_size=(3, 3, 3)), r'kernel_size=\(3, 3, 3\)'),
        (dict(strides=0), 'strides=0'),
        (dict(strides=(1, -1)), r'strides=\(1, -1\)'),
        (dict(spectrum='best'), "spectrum='best'.*running.*exact"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: ConvNorm(2, **options).init(jax.random.key(0), jnp.zeros((1, 6, 6, 2)), use_running_average=True)
        )


@pytest.mark.parametrize('shape', [(6, 6, 2), (1, 2, 6, 6, 2), (6,)])
def test_wrong_rank(shape):
    with pytest.raises(ValueError, match=r'x.shape='):
        jax.eval_shape(lambda: ConvNorm(2).init(jax.random.key(0), jnp.zeros(shape), use_running_average=True))


def test_picture_smaller_than_a_valid_kernel():
    with pytest.raises(ValueError, match='kernel_size'):
        jax.eval_shape(
            lambda: ConvNorm(2, 5, padding='VALID').init(
                jax.random.key(0), jnp.zeros((1, 3, 3, 2)), use_running_average=True
            )
        )


def test_use_running_average_must_be_given_once():
    x = jnp.zeros((1, 6, 6, 2))
    with pytest.raises(Exception, match='use_running_average'):
        jax.eval_shape(lambda: ConvNorm(2).init(jax.random.key(0), x))
    shape = jax.eval_shape(lambda: ConvNorm(2, use_running_average=True).init_with_output(jax.random.key(0), x)[0])
    assert shape.shape == (1, 6, 6, 2)


def test_int_kernel_size_and_strides():
    x = random(15, 1, 6, 6, 2)
    short, long = ConvNorm(3, 5, 2, 2), ConvNorm(3, (5, 5), (2, 2), ((2, 2), (2, 2)))
    variables = init(short, x)
    np.testing.assert_array_equal(evaluate(short, variables, x), evaluate(long, variables, x))


@pytest.mark.parametrize(
    'affine,batch_norm,expected',
    [
        (True, True, {'kernel', 'affine_kernel', 'affine_bias', 'batch_norm'}),
        (True, False, {'kernel', 'affine_kernel', 'affine_bias'}),
        (False, True, {'kernel'}),
        (False, False, {'kernel'}),
    ],
)
def test_parameters(affine, batch_norm, expected):
    layer = ConvNorm(6, (3, 5), use_affine=affine, use_batch_norm=batch_norm)
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros((1, 6, 6, 4)), use_running_average=True))[
        'params'
    ]
    assert set(params) == expected
    assert params['kernel'].shape == (3, 5, 4, 6)
    if affine:
        assert params['affine_kernel'].shape == (3, 5, 1, 6) and params['affine_bias'].shape == (6,)


def test_initial_values_are_those_of_pytorch():
    layer = ConvNorm(256, use_batch_norm=False)
    params = init(layer, np.zeros((1, 4, 4, 16), np.float32))['params']
    for name, fan_in in [('kernel', 9 * 16), ('affine_kernel', 9), ('affine_bias', 9)]:
        values, bound = np.asarray(params[name]).ravel(), fan_in**-0.5
        assert np.abs(values).max() <= bound * (1 + 1e-6)
        # Uniform: the largest of n values is within 10/n of the bound but for e^-10; the standard
        # deviation bound/sqrt(3) has a relative error of 0.45/sqrt(n), and four of them are allowed.
        assert np.abs(values).max() > bound * (1 - 10 / values.size)
        np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=1.8 / values.size**0.5)


# --- precision -----------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(6, 6), (9, 9)], ids=['dense', 'separable'])
@pytest.mark.parametrize('param_dtype', [jnp.float32, jnp.bfloat16])
def test_bfloat16(size, param_dtype):
    # Bound: 3 % root mean square of the outputs, which BatchNorm brings to order one. About ten
    # roundings of 2^-9 = 0.2 % each (input, kernel, two transforms, nine partial sums, output).
    layer = ConvNorm(8, dtype=jnp.bfloat16, param_dtype=param_dtype)
    x = random(16, 4, *size, 16)
    variables = init(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables['params'])} == {jnp.dtype(param_dtype)}
    y, after = train(layer, variables, x)
    assert y.dtype == jnp.bfloat16
    stats = after['batch_stats']
    assert stats['preconditioner'].dtype == jnp.float32
    assert stats['batch_norm']['mean'].dtype == stats['batch_norm']['var'].dtype == jnp.float32
    params = jax.tree.map(lambda p: p.astype(jnp.float32), variables['params'])
    exact, exact_after = train(ConvNorm(8), {**variables, 'params': params}, x)
    error = np.sqrt(np.square(np.asarray(y, np.float32) - exact).mean() / np.square(exact).mean())
    assert 1e-5 < error < 0.03
    # The spectrum is computed from the parameters, in float32: no rounding to bfloat16 in between.
    np.testing.assert_allclose(stats['preconditioner'], exact_after['batch_stats']['preconditioner'], rtol=1e-6)


def test_dtype_follows_flax():
    key = jax.random.key(0)
    for dtype, x_dtype, expected in [
        (None, jnp.float32, jnp.float32),
        (None, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float32),
    ]:
        x = jnp.zeros((1, 6, 6, 2), x_dtype)
        plain = jax.eval_shape(lambda x, d=dtype: nn.Conv(2, (3, 3), dtype=d).init_with_output(key, x)[0], x)
        ours = jax.eval_shape(
            lambda x, d=dtype: ConvNorm(2, dtype=d).init_with_output(key, x, use_running_average=False)[0], x
        )
        assert ours.dtype == plain.dtype == expected


# --- in a program --------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(6, 6), (9, 9)], ids=['dense', 'separable'])
def test_jit_equals_eager(size):
    layer = ConvNorm(4, strides=2)
    x = random(17, 2, *size, 3)
    variables = init(layer, x)
    eager, jitted = eager_train(layer, variables, x), train(layer, variables, x)
    # The same float32 operations, fused: a few eps on values of order one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jitted, eager)


class _State(train_state.TrainState):
    batch_stats: dict


class _Net(nn.Module):
    """As a Flax user writes it: ConvNorm in place of Conv and BatchNorm."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(ConvNorm(8)(x, use_running_average=not train))
        x = nn.relu(ConvNorm(8, strides=2, use_running_average=not train)(x))
        return nn.Dense(2)(x.mean((1, 2)))


@pytest.fixture(scope='module')
def task():
    """Pictures whose class is the direction of their stripes."""
    rng = np.random.default_rng(18)
    labels = np.arange(32) % 2
    stripes = np.broadcast_to(np.sin(np.arange(8) * 2.0)[:, None], (8, 8))
    images = np.where(labels[:, None, None], stripes, stripes.T) + 0.3 * rng.standard_normal((32, 8, 8))
    return images[..., None].astype(np.float32), labels


def _step(state, batch):
    images, labels = batch

    def loss_fn(params):
        logits, update = state.apply_fn(
            {'params': params, 'batch_stats': state.batch_stats}, images, train=True, mutable=['batch_stats']
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), update

    (loss, update), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=update['batch_stats']), loss


def _state(images):
    net = _Net()
    variables = jax.jit(lambda x: net.init(jax.random.key(0), x, train=False))(images[:1])
    return _State.create(apply_fn=net.apply, tx=optax.sgd(0.1, 0.9), **variables)


def test_a_plain_flax_training_loop(task):
    images, labels = task
    state = _state(images)

    @jax.jit
    def run(state):  # a scan asks the state to keep its structure, shapes and dtypes
        return jax.lax.scan(lambda s, _: _step(s, (images, labels)), state, None, length=15)

    state, losses = run(state)
    assert losses[-1] < 0.2 * losses[0]
    assert state.batch_stats['ConvNorm_0']['count'] == state.batch_stats['ConvNorm_1']['count'] == 15
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    logits = jax.jit(lambda v: state.apply_fn(v, images, train=False))(variables)
    assert (logits.argmax(-1) == labels).mean() > 0.9


def test_a_batch_split_over_devices_equals_one_device(task):
    assert len(jax.devices()) >= 4, 'tests/conftest.py asks for four fake CPU devices'
    images, labels = task
    state = _state(images)
    mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.jit(_step)
    one, _ = step(state, (images, labels))
    many, _ = step(jax.device_put(state, everywhere), jax.device_put((images, labels), split))
    # Sums over the batch in another order; statistics are those of the whole batch.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        (one.params, one.batch_stats),
        (many.params, many.batch_stats),
    )


# --- methods -------------------------------------------------------------------------------


def test_the_method_is_chosen_by_size():
    geometry = of_convolution((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)))
    assert choose_method(geometry, 32, 256, 256) == 'frequency'
    assert choose_method(geometry, 1, 256, 256) == 'spatial'  # the kernel's filters cost more than one picture
    assert choose_method(geometry, 32, 4096, 4096) == 'spatial'  # 10 GB of filters
    assert choose_method(geometry, 32, 8, 8) == 'frequency'
    large = of_convolution((32, 32), (3, 3), (1, 1), ((1, 1), (1, 1)))
    assert choose_method(large, 16, 8, 8) == choose_method(large, 128, 3, 8) == 'frequency'
    assert choose_method(large, 15, 64, 64) == 'spatial'


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method='fft': expected one of \('frequency', 'spatial', 'reference'\)"):
        ConvNorm(2, method='fft').init(jax.random.key(0), random(0, 1, 4, 4, 1), use_running_average=True)
