"""Every layer a model can be built with, by its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax.layers import LAYERS, BatchNorm, ConvNorm, ConvThenNorm, SwitchNorm, factory, make_layer

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
