"""Every layer a model can be built with, by its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax.layers import (
    DENSE_LAYERS,
    LAYERS,
    BatchNorm,
    ConvNorm,
    ConvNormTranspose,
    ConvThenNorm,
    SwitchNorm,
    factory,
    make_dense,
    make_layer,
    make_transposed_layer,
)

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(name, train, options=None, kernel_size=(3, 3), **conv):
    return make_layer(name, **(options or {}))(8, kernel_size, **{'strides': (2, 2), 'padding': 1, **conv}, train=train)


@pytest.mark.parametrize('name', LAYERS)
def test_builds_trains_and_evaluates(name):
    x = random(0, 4, 8, 8, 3)
    training, inference = build(name, True), build(name, False)
    variables = jax.jit(inference.init)(jax.random.key(0), x)
    y, update = jax.jit(lambda v, x: training.apply(v, x, mutable=['batch_stats']))(variables, x)
    assert y.shape == (4, 4, 4, 8) and y.dtype == jnp.float32 and np.all(np.isfinite(y))
    assert jax.tree.structure(update) == jax.tree.structure({k: v for k, v in variables.items() if k == 'batch_stats'})
    z, after = jax.jit(lambda v, x: inference.apply(v, x, mutable=['batch_stats']))({**variables, **update}, x)
    assert z.shape == y.shape and np.all(np.isfinite(z))
    jax.tree.map(np.testing.assert_array_equal, after, update)  # inference writes nothing
    if update:  # a layer with statistics learns them in training and uses them at inference
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), update['batch_stats'], variables['batch_stats'])
        assert any(jax.tree.leaves(changed))
        assert np.abs(y - z).max() > 1e-3


@pytest.mark.parametrize('name', LAYERS)
def test_every_parameter_has_a_finite_gradient(name):
    layer, x = build(name, True, use_bias=True), random(1, 4, 8, 8, 3)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    cotangent = random(2, 4, 4, 4, 8)

    @jax.jit
    def gradient(params):
        def loss(params):
            y, _ = layer.apply({**variables, 'params': params}, x, mutable=['batch_stats'])
            return (y * cotangent).sum()

        return jax.grad(loss)(params)

    gradients = gradient(variables['params'])
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(leaf))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)) > 0.1


@pytest.mark.parametrize('name', LAYERS)
def test_bfloat16_keeps_parameters_and_statistics_float32(name):
    layer = build(name, True, {'dtype': jnp.bfloat16})
    y, variables = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), jnp.zeros((4, 8, 8, 3))))
    assert y.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(variables):
        assert leaf.dtype in (jnp.float32, jnp.int32)


@pytest.mark.parametrize('name', LAYERS)
def test_the_name_reaches_the_module(name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return make_layer(name)(4, (1, 1), padding=0, name='first')(x)

    variables = jax.eval_shape(lambda: Net().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2))))
    assert set(variables['params']) == {'first'}


def test_what_each_name_builds():
    assert isinstance(build('convnorm', True), ConvNorm)
    for name, norm in [
        ('batchnorm', BatchNorm),
        ('groupnorm', nn.GroupNorm),
        ('switchnorm', SwitchNorm),
        ('none', None),
    ]:
        layer = build(name, True)
        assert isinstance(layer, ConvThenNorm)
        assert layer.norm is None if norm is None else isinstance(layer.norm(), norm)


def test_convnorm_options_reach_the_layer():
    layer = build('convnorm', True, dict(use_affine=False, use_batch_norm=False, momentum=0.5, spectrum='exact'))
    assert (layer.use_affine, layer.use_batch_norm, layer.momentum, layer.spectrum) == (False, False, 0.5, 'exact')
    assert layer.use_running_average is False and build('convnorm', False).use_running_average is True


@pytest.mark.parametrize(
    'features,wanted,expected', [(64, 32, 32), (16, 32, 16), (20, 32, 20), (48, 32, 24), (20, 8, 5), (7, 4, 1)]
)
def test_groups_divide_the_channels(features, wanted, expected):
    layer = make_layer('groupnorm', groups=wanted)(features, (1, 1), padding=0)
    assert layer.norm().num_groups == expected


@pytest.mark.parametrize('use_bias', [True, False])
@pytest.mark.parametrize('name', LAYERS)
def test_use_bias(name, use_bias):
    layer = build(name, True, use_bias=use_bias)
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))['params']
    if name == 'convnorm':  # its channel-wise convolution has the bias, always
        assert set(params) == {'kernel', 'affine_kernel', 'affine_bias', 'batch_norm'}
    else:
        assert ('bias' in params['conv']) == use_bias


def test_plain_convolution_against_jax():
    layer, x = build('none', True, use_bias=True), random(3, 2, 8, 8, 3)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    conv = variables['params']['conv']
    expected = conv['bias'] + jax.lax.conv_general_dilated(
        x, conv['kernel'], (2, 2), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-5)  # 27 float32 products
    # PyTorch's initial values: within 1/sqrt(fan_in) = 1/sqrt(27), and close to it.
    for leaf in conv.values():
        assert 0.5 * 27**-0.5 < np.abs(leaf).max() <= 27**-0.5 * (1 + 1e-6)


def test_unknown_layer_lists_the_names():
    with pytest.raises(ValueError, match="layer='batch_norm'") as error:
        make_layer('batch_norm')
    assert all(name in str(error.value) for name in LAYERS)


@pytest.mark.parametrize('name', LAYERS)
def test_unknown_option_lists_the_options(name):
    with pytest.raises(ValueError, match=f"layer='{name}'.*'colour'") as error:
        make_layer(name, colour=1)
    assert all(option in str(error.value) for option in factory.LAYER_OPTIONS[name])


@pytest.mark.parametrize('groups', [0, -1])
def test_wrong_number_of_groups(groups):
    with pytest.raises(ValueError, match=f'groups={groups}'):
        build('groupnorm', True, dict(groups=groups))


def shapes_of(layer, x):
    """(output, params) as shapes."""
    y, variables = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), x))
    return y, variables['params']


@pytest.mark.parametrize('name', ['convnorm', 'spectralnorm', 'oni', 'own', 'weightnorm'])
def test_without_batch_norm(name):
    x = jnp.zeros((2, 8, 8, 3))
    part = 'batch_norm' if name == 'convnorm' else 'norm'
    for options, expected in [({}, True), (dict(use_batch_norm=True), True), (dict(use_batch_norm=False), False)]:
        assert (part in shapes_of(build(name, True, options), x)[1]) == expected


@pytest.mark.parametrize('name', ['batchnorm', 'groupnorm', 'switchnorm', 'none'])
def test_use_batch_norm_is_no_option_of_the_others(name):
    with pytest.raises(ValueError, match=f"layer='{name}' has no option 'use_batch_norm'"):
        make_layer(name, use_batch_norm=False)


@pytest.mark.parametrize('name', ['batchnorm', 'groupnorm', 'switchnorm', 'oni', 'convnorm', 'none'])
def test_edge_layer(name):
    layer = factory.make_edge_layer(name)(8, (3, 3), padding=1, train=True)
    params = shapes_of(layer, jnp.zeros((2, 8, 8, 3)))[1]
    plain = name in ('batchnorm', 'groupnorm', 'switchnorm', 'none')
    assert (set(params) == {'conv'} and set(params['conv']) == {'kernel'}) == plain


@pytest.mark.parametrize('name', LAYERS)
def test_kernel_init(name):
    """Of the kernel of every layer but ConvNorm's, which does not depend on its scale."""
    init = nn.initializers.constant(2.0)
    for layer in (build(name, True, kernel_init=init), make_transposed_layer(name)(8, (4, 4), kernel_init=init)):
        variables = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        if name != 'convnorm':
            np.testing.assert_array_equal(variables['params']['conv']['kernel'], 2)


@pytest.mark.parametrize('use_bias', [True, False])
@pytest.mark.parametrize('name', LAYERS)
def test_transposed_layer(name, use_bias):
    x = jnp.zeros((2, 4, 4, 3))
    default = make_transposed_layer(name)(8, (4, 4), train=True, use_bias=use_bias, name='up')
    y, params = shapes_of(default, x)
    assert y.shape == (2, 8, 8, 8) and default.name == 'up'
    assert name == 'convnorm' or ('bias' in params['conv']) == use_bias
    assert (params if name == 'convnorm' else params['conv'])['kernel'].shape == (4, 4, 3, 8)
    first = make_transposed_layer(name, dtype=jnp.bfloat16)(8, (4, 4), strides=(1, 1), padding=0, train=True)
    y, params = shapes_of(first, jnp.zeros((2, 1, 1, 3)))
    assert (y.shape, y.dtype) == ((2, 4, 4, 8), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_what_a_transposed_name_builds():
    for train in (True, False):
        layer = make_transposed_layer('convnorm', momentum=0.5, use_batch_norm=False)(8, (4, 4), train=train)
        assert isinstance(layer, ConvNormTranspose)
        assert (layer.use_running_average, layer.momentum, layer.use_batch_norm) == (not train, 0.5, False)
    variables = jax.eval_shape(
        lambda: make_transposed_layer('spectralnorm')(8, (4, 4)).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    )
    assert variables['batch_stats']['conv']['u'].shape == (8,)  # a row for each output channel
    assert 'norm' in variables['params']


def test_wrong_transposed_layers():
    with pytest.raises(ValueError, match="layer='up'"):
        make_transposed_layer('up')
    with pytest.raises(ValueError, match="no option 'colour'"):
        make_transposed_layer('oni', colour=1)
    make_transposed_layer('spectralnorm', mode='reshaped')
    with pytest.raises(ValueError, match=r"mode='conv'.*'reshaped' only"):
        make_transposed_layer('spectralnorm', mode='conv')


@pytest.mark.parametrize('name', DENSE_LAYERS)
def test_dense(name):
    x = random(4, 5, 6)
    training, inference = (make_dense(name)(3, train=train, name='linear') for train in (True, False))
    variables = jax.jit(inference.init)(jax.random.key(0), x)
    params = variables['params']
    limit = np.sqrt(6 / (6 + 3))  # Xavier's
    assert 0.5 * limit < np.abs(params['kernel']).max() <= limit * (1 + 1e-6)
    np.testing.assert_array_equal(params['bias'], 0)
    params['bias'] = random(5, 3)
    kernel = np.asarray(params['kernel'])
    norm = np.linalg.norm(kernel, 2) if name == 'spectralnorm' else 1
    # After the 15 iterations of the initialization the norm is right to a per cent.
    np.testing.assert_allclose(inference.apply(variables, x), x @ kernel / norm + params['bias'], atol=0.05)
    _, update = training.apply(variables, x, mutable=['batch_stats'])
    if name == 'none':
        assert not update
    else:
        assert jax.tree.map(jnp.shape, update['batch_stats']) == {'u': (3,), 'v': (6,)}
    no_bias = make_dense(name, dtype=jnp.bfloat16)(3, use_bias=False, kernel_init=nn.initializers.ones, train=True)
    y, params = shapes_of(no_bias, x)
    assert y.dtype == jnp.bfloat16 and jax.tree.map(jnp.shape, params) == {'kernel': (6, 3)}


def test_spectral_norm_dense_against_numpy():
    """One power iteration in training, none at evaluation; a gradient that knows u and v are constant."""
    kernel, u, v, x = random(6, 6, 3), random(7, 3), random(8, 6), random(9, 5, 6)
    layer = make_dense('spectralnorm')(3, use_bias=False, train=True)
    variables = {'params': {'kernel': kernel}, 'batch_stats': {'u': u, 'v': v}}

    def loss(params):
        y, update = layer.apply({**variables, 'params': params}, x, mutable=['batch_stats'])
        return y.sum(), (y, update['batch_stats'])

    gradient, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
    v = kernel @ u / np.linalg.norm(kernel @ u)
    u = v @ kernel / np.linalg.norm(v @ kernel)
    norm = v @ kernel @ u
    np.testing.assert_allclose(y, x @ kernel / norm, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state['u'], u, atol=1e-5)
    np.testing.assert_allclose(state['v'], v, atol=1e-5)
    by_product = np.outer(x.sum(0), np.ones(3))
    expected = by_product / norm - (by_product * kernel).sum() / norm**2 * np.outer(v, u)
    np.testing.assert_allclose(gradient['kernel'], expected, atol=1e-4)
    with pytest.raises(ValueError, match="dense='spectral'"):
        make_dense('spectral')
