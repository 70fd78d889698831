"""Dtypes of the layer: float64, float16 and bfloat16, and JAX's strict promotion of dtypes and ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax import ConvNorm, ConvNormTranspose
from convnorm_jax.layers import DENSE_LAYERS, LAYERS, BatchNorm, ConditionalBatchNorm, make_dense, make_layer, spectral
from convnorm_jax.layers.factory import make_transposed_layer
from convnorm_jax.layers.method import METHODS
from convnorm_jax.layers.reparam import SpectralNormConv, WeightNormConv
from convnorm_jax.layers.transposed import ConvTranspose

pytestmark = pytest.mark.usefixtures('quick_compilation')

EVERY = (None, *METHODS)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def as_published(x, p, padding=1, epsilon=1e-5):
    """A pass in training with a 3x3 kernel at stride 1 in float64 NumPy: (output, V, mean, biased variance)."""
    kernel, affine = np.asarray(p['kernel']), np.asarray(p['affine_kernel'])[:, :, 0]
    height, width = x.shape[1:3]
    grid = height + 2, width + 2
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    y = sum(padded[:, a : a + grid[0], b : b + grid[1]] @ kernel[a, b] for a in range(3) for b in range(3))
    v = np.square(np.abs(np.fft.fft2(kernel, grid, axes=(0, 1)))).sum(2) ** -0.5
    y = np.fft.ifft2(np.fft.fft2(y, axes=(1, 2)) * v, axes=(1, 2)).real[:, 1:-1, 1:-1]
    padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(padded[:, a : a + height, b : b + width] * affine[a, b] for a in range(3) for b in range(3))
    y = y + np.asarray(p['affine_bias'])
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    y = (y - mean) / np.sqrt(var + epsilon)
    return y * np.asarray(p['batch_norm']['scale']) + np.asarray(p['batch_norm']['bias']), v, mean, var


BIASED = {
    'convnorm': (ConvNorm(2, use_batch_norm=False), 'affine_bias'),
    'transposed convnorm': (ConvNormTranspose(2, use_batch_norm=False), 'affine_bias'),
    'transposed': (ConvTranspose(2), 'bias'),
    'spectral norm': (SpectralNormConv(2), 'bias'),
    'weight norm': (WeightNormConv(2), 'bias'),
}


@pytest.mark.parametrize('name', BIASED)
def test_the_gradient_of_a_bias_is_summed_in_float32(name):
    """JAX sums what it broadcasts in bfloat16 in bfloat16: 8 bits for a sum of thousands."""
    layer, bias = BIASED[name]
    x = jnp.ones((16, 16, 16, 2), jnp.bfloat16)
    how = {} if name == 'transposed' or name == 'weight norm' else {'use_running_average': True}
    layer = layer.clone(dtype=jnp.bfloat16)
    variables = jax.jit(lambda x: layer.init(jax.random.key(0), x, **how))(x)

    @jax.jit
    def gradient(params):
        y, back = jax.vjp(lambda p: layer.apply({**variables, 'params': p}, x, **how), params)
        assert y.dtype == jnp.bfloat16
        cotangent = jnp.asarray(1 + 0.1 * random(0, *y.shape), y.dtype)
        return cotangent, back(cotangent)[0][bias]

    cotangent, found = gradient(variables['params'])
    expected = np.asarray(cotangent, np.float64).sum((0, 1, 2))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8)


@pytest.mark.covering(1)
@pytest.mark.parametrize('size', [(6, 5), (11, 12)], ids=['dense', 'separable'])
@pytest.mark.parametrize('param_dtype', ['float32', 'float64'])
@pytest.mark.parametrize('method', EVERY)
def test_float64(x64, method, param_dtype, size):
    layer, x = ConvNorm(5, (3, 3), padding=1, method=method, param_dtype=param_dtype), random(0, 9, *size, 4)
    variables = jax.jit(lambda x: layer.init(jax.random.key(0), x, True))(x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables['params'])} == {param_dtype}
    train = jax.jit(lambda v, x: layer.apply(v, x, False, mutable=['batch_stats']))
    y, update = train(variables, x)
    expected, v, mean, var = as_published(x, variables['params'])
    assert y.dtype == jnp.float64
    # V of float32 parameters is float32, as it is kept; all else is float64.
    exact = 1e-12 if param_dtype == 'float64' else 3e-6
    np.testing.assert_allclose(y, expected, rtol=0, atol=exact)
    # Running values: float32, unless the parameters are float64, and of the dtype that they started with.
    old, new = (jax.tree.map(lambda a: a.dtype, t['batch_stats']) for t in (variables, update))
    assert old == new and old['batch_norm'] == {'mean': param_dtype, 'var': param_dtype}
    assert old['preconditioner'] == param_dtype and old['count'] == 'float32'
    count = x[..., 0].size
    tolerance = 1e-12 if param_dtype == 'float64' else 1e-6
    stats = update['batch_stats']['batch_norm']
    np.testing.assert_allclose(stats['mean'], 0.1 * mean, rtol=0, atol=tolerance)
    np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * var * count / (count - 1), rtol=tolerance)
    np.testing.assert_allclose(update['batch_stats']['preconditioner'], v, rtol=10 * tolerance)
    # At inference, too: with running statistics that are those of the batch.
    kept = {'preconditioner': v, 'count': 1.0, 'batch_norm': {'mean': mean, 'var': var}}
    y = jax.jit(lambda v, x: layer.apply(v, x, True))({**variables, 'batch_stats': kept}, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


def test_batch_norm_alone_in_float64(x64):
    x = 1000 + random(1, 16, 4, 3)
    layer = BatchNorm(use_running_average=False)
    y = layer.apply(layer.init(jax.random.key(0), x), x, mutable=['batch_stats'])[0]
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5), rtol=0, atol=1e-11)


def test_a_scan_over_steps_keeps_the_dtypes(x64):
    layer, x = ConvNorm(3), random(2, 4, 6, 6, 2)
    variables = layer.init(jax.random.key(0), x, True)

    def step(stats, x):
        return layer.apply({**variables, 'batch_stats': stats}, x, False, mutable=['batch_stats'])[1][
            'batch_stats'
        ], None

    stats, _ = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(variables['batch_stats'], jnp.stack([x, x]))
    assert stats['count'] == 2


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('size', [(6, 5), (11, 12)], ids=['dense', 'separable'])
@pytest.mark.parametrize('method', EVERY)
def test_parameters_in_bfloat16_round_nothing_but_themselves(method, size):
    # The transform's matrices would be rounded with them: 0.2 % of error where float32 has 1e-6.
    layer = ConvNorm(5, (3, 3), padding=1, method=method, param_dtype=jnp.bfloat16)
    x = random(3, 9, *size, 4).astype(np.float32)
    variables = jax.jit(lambda x: layer.init(jax.random.key(0), x, True))(x)
    y, update = jax.jit(lambda v, x: layer.apply(v, x, False, mutable=['batch_stats']))(variables, x)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables['params'])
    expected, v, _, _ = as_published(x.astype(np.float64), params)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    stats = update['batch_stats']
    np.testing.assert_allclose(stats['preconditioner'], v, rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype('float32')}
    np.testing.assert_allclose(spectral.preconditioner(variables['params']['kernel'], v.shape[:2]), v, rtol=1e-5)


# Relative error (root mean square) of the output and of the gradients: 2^-9 and 2^-12 for each of some ten roundings.
HALF = {'bfloat16': 0.05, 'float16': 0.006}


@pytest.mark.covering(1)
@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('cls', [ConvNorm, ConvNormTranspose])
@pytest.mark.parametrize('method', EVERY)
def test_half_precision(method, cls, dtype):
    layer, exact = cls(8, method=method, dtype=dtype), cls(8, method='reference')
    x = random(4, 4, 6, 6, 16).astype(np.float32)
    variables = jax.jit(lambda x: exact.init(jax.random.key(0), x, True))(x)

    def results(layer):
        def output(params, x):
            return layer.apply({**variables, 'params': params}, x, False, mutable=['batch_stats'])

        y, back, update = jax.vjp(output, variables['params'], x, has_aux=True)
        by_params, by_x = back(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))
        return y, by_x, by_params['kernel'], by_params['batch_norm'], update

    found, expected = jax.jit(lambda: results(layer))(), jax.jit(lambda: results(exact))()
    assert found[0].dtype == dtype
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found[1:])} == {'float32'}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(c, np.float64) for c in (a, b))
        assert np.sqrt(np.mean((a - b) ** 2)) < HALF[dtype] * max(np.sqrt(np.mean(b**2)), 0.3)


# --- strict promotion -----------------------------------------------------------------------------------------


@pytest.fixture
def strict():
    """Issue 13.11: no implicit broadcasting of ranks, no implicit conversion of dtypes."""
    with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
        yield


class _Layer(nn.Module):
    """A layer of the factory in a net."""

    make: object
    train_argument: bool = False

    @nn.compact
    def __call__(self, x, train):
        return self.make(train)(x)


def assert_runs(make, shape, dtype='float32'):
    """Training, with gradients, and inference."""
    model, x = _Layer(make), jnp.asarray(random(5, *shape), dtype)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, False))
    variables = jax.tree.map(lambda a: jnp.full(a.shape, 0.5, a.dtype), variables)
    state = {name: tree for name, tree in variables.items() if name != 'params'}

    def loss(params, x):
        y, new = model.apply({'params': params, **state}, x, True, mutable=list(state))
        return jnp.square(y).sum(), new

    jax.eval_shape(jax.grad(loss, (0, 1), has_aux=True), variables.get('params', {}), x)
    jax.eval_shape(lambda v: model.apply(v, x, False), variables)


@pytest.mark.covering(1)
@pytest.mark.parametrize('dtype,param_dtype', [(None, 'float32'), ('bfloat16', 'float32'), ('bfloat16', 'bfloat16')])
@pytest.mark.parametrize('method', EVERY)
def test_the_layer_under_strict_promotion(strict, method, dtype, param_dtype):
    options = {'method': method, 'dtype': dtype, 'param_dtype': param_dtype}
    for kernel_size in ((3, 3), (1, 1), (2, 2)):
        layer = functools.partial(ConvNorm, 4, kernel_size, padding=0, **options)
        for more in ({}, {'use_affine': False}, {'use_batch_norm': False}, {'spectrum': 'exact'}, {'momentum': 0.9}):
            assert_runs(
                lambda train, more=more, layer=layer: layer(use_running_average=not train, **more), (4, 6, 5, 3)
            )
    transposed = functools.partial(ConvNormTranspose, 4, **options)
    assert_runs(lambda train: transposed(use_running_average=not train), (4, 3, 4, 3))


def test_float64_under_strict_promotion(strict, x64):
    for method in EVERY:
        for options in (
            {'param_dtype': 'float64'},
            {'dtype': 'float64'},
            {'dtype': 'float32', 'param_dtype': 'float64'},
        ):
            layer = functools.partial(ConvNorm, 4, method=method, **options)
            assert_runs(lambda train, layer=layer: layer(use_running_average=not train), (4, 6, 5, 3), 'float64')


def test_second_derivatives_under_strict_promotion(strict):
    layer, x = ConvNorm(3), jnp.asarray(random(6, 2, 5, 5, 2), jnp.float32)
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, True))
    variables = jax.tree.map(lambda a: jnp.full(a.shape, 0.5, a.dtype), variables)
    value = lambda x: jnp.sin(layer.apply(variables, x, False, mutable=['batch_stats'])[0]).sum()
    jax.eval_shape(lambda x: jax.jvp(jax.grad(value), (x,), (x,)), x)
    jax.eval_shape(jax.vmap(jax.grad(lambda x: value(x[None]))), x)


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_batch_norm_under_strict_promotion(strict, dtype):
    for shape in ((4, 3), (4, 5, 3), (4, 5, 6, 3)):
        for options in ({}, {'use_affine': False}):
            layer = functools.partial(BatchNorm, dtype=dtype, **options)
            assert_runs(lambda train, layer=layer: layer(use_running_average=not train), shape, dtype or 'float32')


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', LAYERS)
def test_layers_to_compare_with_under_strict_promotion(strict, name, dtype):
    if name == 'groupnorm' and dtype == 'bfloat16':
        pytest.skip("flax's own GroupNorm raises there")
    layer = make_layer(name, dtype=dtype)
    for strides in ((1, 1), (2, 2)):
        assert_runs(
            lambda train, s=strides: layer(8, (3, 3), strides=s, padding=1, use_bias=True, train=train), (4, 6, 6, 8)
        )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['none', 'batchnorm', 'spectralnorm', 'convnorm'])
def test_transposed_layers_under_strict_promotion(strict, name, dtype):
    layer = make_transposed_layer(name, dtype=dtype)
    options = {'strides': (2, 2), 'padding': 1, 'use_bias': True}
    assert_runs(lambda train: layer(8, (4, 4), train=train, **options), (4, 3, 3, 8))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_dense_and_conditional_layers_under_strict_promotion(strict, dtype):
    for name in DENSE_LAYERS:
        layer = make_dense(name, dtype=dtype)
        assert_runs(lambda train, layer=layer: layer(6, use_bias=True, train=train), (4, 5))
    norm = lambda train: functools.partial(
        ConditionalBatchNorm(3, not train, dtype=jnp.dtype(dtype)), labels=jnp.array([0, 1, 2, 0])
    )
    assert_runs(norm, (4, 5, 6, 8))


def test_a_conditional_batch_norm_in_float64(x64):
    x, labels = random(7, 4, 5, 3), jnp.array([0, 1, 1, 0])
    layer = ConditionalBatchNorm(2, False, param_dtype=jnp.float64)
    variables = layer.init(jax.random.key(0), x, labels)
    y = layer.apply(variables, x, labels, mutable=['batch_stats'])[0]
    np.testing.assert_allclose(y, (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5), rtol=0, atol=1e-13)
