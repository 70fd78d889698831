"""Every named layer with groups of channels and with one spatial axis, and OCNN's penalty of their kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax.layers import LAYERS, make_layer, make_transposed_layer, ocnn
from convnorm_jax.layers.reparam import ONIConv, SpectralNormConv
from convnorm_jax.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')

# What a layer makes of a channel depends on all channels: SwitchNorm's layer statistics, and the largest singular
# value; GroupNorm has groups of its own.
MIXED = ('switchnorm', 'spectralnorm', 'groupnorm')


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(name, features, kernel_size=(3, 3), train=False, options=None, **settings):
    settings = {'strides': (2,) * len(kernel_size), 'padding': 1, **settings}
    return make_layer(name, **(options or {}))(features, kernel_size, train=train, **settings)


def init(layer, x):
    """Variables with other values than those at the start."""
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    wave = lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape)
    return {**variables, 'params': jax.tree.map(wave, variables['params'])}


def apply(layer, variables, x):
    return jax.jit(lambda v, x: layer.apply(v, x, mutable=['batch_stats'])[0])(variables, x)


def of_group(tree, group, groups):
    """The variables of one group: a part of every array's output channels."""
    part = lambda a: a.reshape(*a.shape[:-1], groups, -1)[..., group, :] if a.ndim else a
    return jax.tree.map(part, tree)


@pytest.mark.covering(1)
@pytest.mark.parametrize('features,groups', [(4, 4), (8, 4), (6, 2)], ids=['depthwise', 'multiplier', 'grouped'])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', [name for name in LAYERS if name not in MIXED])
def test_groups_are_layers_of_their_own(name, train, features, groups):
    x = random(0, 3, 6, 5, 4)
    options = {'iterations': 2} if name == 'oni' else {}
    whole = build(name, features, train=train, options=options, feature_group_count=groups, use_bias=True)
    single = build(name, features // groups, train=train, options=options, use_bias=True)
    variables = init(whole, x)
    y = apply(whole, variables, x)
    parts = [
        apply(single, of_group(variables, g, groups), x[..., g * 4 // groups : (g + 1) * 4 // groups])
        for g in range(groups)
    ]
    assert y.shape == (3, 3, 3, features) and np.ptp(y) > 0.1
    # float32 sums in another order, through BatchNorm's division by the spread of 27 numbers.
    np.testing.assert_allclose(y, np.concatenate(parts, -1), atol=1e-4 * np.abs(y).max())


def kernels(layer, variables, x):
    """(parameter, kernel that the convolution takes)."""
    found = []

    def record(call, args, kwargs, context):
        found.extend(args[1:2] if context.method_name == '_convolution' else ())
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        layer.apply(variables, x, mutable=['batch_stats'])
    return np.asarray(variables['params']['conv']['kernel']), np.asarray(found[0])


def test_the_published_spectral_norm_is_of_the_kernel_as_a_matrix():
    x = random(0, 2, 6, 5, 4)
    layer = build('spectralnorm', 8, feature_group_count=4, train=True, options={'iterations': 300})
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    kernel, used = kernels(layer, variables, x)
    assert kernel.shape == (3, 3, 1, 8)
    sigma = np.linalg.norm(kernel.reshape(9, 8), 2)
    np.testing.assert_allclose(kernel / used, np.full(kernel.shape, sigma), rtol=1e-4)


@pytest.mark.parametrize('shape,groups', [((6, 5, 4), 2), ((6, 5, 4), 4), ((9, 4), 1), ((9, 4), 4)])
def test_the_norm_of_the_convolution_itself(shape, groups):
    """mode='conv' against the dense matrix of the grouped or 1-D convolution."""
    rank = len(shape) - 1
    layer = SpectralNormConv(8, (3,) * rank, 2, 1, mode='conv', init_iterations=300, feature_group_count=groups)
    x = random(1, 1, *shape)
    variables = jax.jit(layer.init, static_argnames='use_running_average')(
        jax.random.key(0), x, use_running_average=True
    )
    kernel = variables['params']['kernel']
    basis = np.eye(x.size, dtype=np.float32).reshape(-1, *shape)
    columns = nn.Conv(8, (3,) * rank, 2, 1, use_bias=False, feature_group_count=groups).apply(
        {'params': {'kernel': kernel}}, basis
    )
    sigma = np.linalg.norm(np.asarray(columns).reshape(x.size, -1), 2)
    bias = variables['params']['bias']
    y = layer.apply(variables, basis, use_running_average=True) - bias
    np.testing.assert_allclose(y * sigma, columns, atol=1e-3 * np.abs(columns).max())


@pytest.mark.covering(1)
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', LAYERS)
def test_one_axis_is_a_row_of_an_image(name, train, groups):
    x = random(2, 3, 9, 4)
    settings = {'train': train, 'use_bias': True, 'feature_group_count': groups}
    line = build(name, 8, (3,), **settings)
    image = build(name, 8, (1, 3), **{**settings, 'strides': (1, 2), 'padding': ((0, 0), (1, 1))})
    variables = init(line, x)
    wider = jax.eval_shape(image.init, jax.random.key(0), x[:, None])
    y = apply(line, variables, x)
    expected = apply(image, jax.tree.map(lambda a, b: a.reshape(b.shape), variables, wider), x[:, None])
    assert y.shape == (3, 5, 8) and np.ptp(y) > 0.1
    np.testing.assert_allclose(y, expected[:, 0], atol=1e-4 * np.abs(y).max())


@pytest.mark.parametrize('name', LAYERS)
def test_pytorchs_initial_values(name):
    x = random(3, 1, 4, 4, 64)
    layer = build(
        name, 256, feature_group_count=32, use_bias=True, options={'init_scale': 1.0} if name == 'oni' else {}
    )
    params = jax.jit(layer.init)(jax.random.key(0), x)['params']
    conv = params.get('conv', params)
    fan_in = 9 * 2
    assert conv['kernel'].shape == (3, 3, 2, 256)
    for leaf in conv['kernel'], conv.get('bias'):
        if leaf is not None:  # uniform in +-1 / sqrt(fan_in)
            bound = fan_in**-0.5
            assert 0.95 * bound < np.abs(leaf).max() <= bound
            assert abs(np.std(leaf) / (bound / 3**0.5) - 1) < 0.1


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('groups', [3, 0, True])
def test_groups_that_do_not_divide(name, groups):
    with pytest.raises(ValueError, match=f'feature_group_count={groups} with 4 channels and features=8: expected') as e:
        build(name, 8, feature_group_count=groups).init(jax.random.key(0), random(0, 1, 6, 6, 4))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize(
    'kernel_size,shape,expected',
    [((3,), (1, 6, 6, 4), r'\[batch, width, channels\]'), ((3, 3), (1, 6, 4), r'\[batch, height, width, channels\]')],
)
def test_images_of_another_rank(name, kernel_size, shape, expected):
    with pytest.raises(ValueError, match=expected + r' with kernel_size=\(3,'):
        build(name, 8, kernel_size).init(jax.random.key(0), random(0, *shape))


@pytest.mark.parametrize('name', [name for name in LAYERS if name != 'convnorm'])
def test_transposed_layers_have_one_group(name):
    layer = make_transposed_layer(name)
    with pytest.raises(ValueError, match=r'feature_group_count.*take convnorm'):
        layer(8, (4, 4), feature_group_count=2).init(jax.random.key(0), random(0, 1, 6, 6, 4))


def test_a_transposed_convnorm_has_groups():
    layer = make_transposed_layer('convnorm')(8, (4, 4), feature_group_count=2)
    y, variables = layer.init_with_output(jax.random.key(0), random(0, 1, 6, 6, 4))
    assert y.shape == (1, 12, 12, 8) and variables['params']['kernel'].shape == (4, 4, 2, 8)


def test_a_transposed_reparametrized_convolution_has_two_axes():
    with pytest.raises(ValueError, match=r'kernel_size=\(3,\) .* 2 spatial axes and one group'):
        ONIConv(8, (3,), 1, 1, transposed=True).init(jax.random.key(0), random(0, 1, 6, 4))


# --- OCNN --------------------------------------------------------------------------------------


def dense(kernel, groups):
    """The kernel of one group that convolves alike."""
    *taps, inside, cout = kernel.shape
    found = np.zeros((*taps, groups * inside, cout), kernel.dtype)
    for g in range(groups):
        ours = slice(g * cout // groups, (g + 1) * cout // groups)
        found[..., g * inside : (g + 1) * inside, ours] = kernel[..., ours]
    return found


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('lags', ocnn.LAGS)
@pytest.mark.parametrize('strides', [1, 2])
@pytest.mark.parametrize('shape,groups', [((3, 3, 1, 6), 6), ((3, 3, 2, 6), 3), ((3, 1, 6), 3), ((3, 2, 3, 2, 4), 2)])
def test_ocnn_of_a_grouped_kernel(shape, groups, strides, lags):
    kernel = random(4, *shape)
    penalty = jax.value_and_grad(lambda k: ocnn.deconvolution_penalty(k, strides, lags, groups))
    value, gradient = penalty(kernel)
    expected = ocnn.deconvolution_penalty(dense(kernel, groups), strides, lags)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert gradient.shape == shape and np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0.01


@pytest.mark.parametrize('shape,groups', [((1, 1, 4, 6), 3), ((1, 1, 1, 6), 2), ((1, 3, 2), 2), ((3, 2, 8), 1)])
def test_ocnns_penalty_of_a_grouped_matrix(shape, groups):
    kernel = random(5, *shape)
    value = ocnn.matrix_penalty(kernel, groups)
    np.testing.assert_allclose(value, ocnn.matrix_penalty(dense(kernel, groups)), rtol=1e-5)


@pytest.mark.parametrize('lags', ocnn.LAGS)
@pytest.mark.parametrize('stride', [1, 2])
def test_ocnn_of_one_axis(stride, lags):
    kernel = random(6, 3, 4, 5)
    value = ocnn.deconvolution_penalty(kernel, stride, lags)
    np.testing.assert_allclose(value, ocnn.deconvolution_penalty(kernel[None], (1, stride), lags), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('name,left_out', [('mobilenet', {'conv1'}), ('sequence_cnn', set())])
@pytest.mark.parametrize('layer', ['convnorm', 'batchnorm'])
def test_ocnn_of_a_net(name, left_out, layer):
    model = create_model(name, num_classes=5, layer=layer, width=4, depth=(1, 1))
    found = ocnn.convolution_geometry(model, (8, 8, 1))
    strides, groups = ({path: pair[i] for path, pair in found.items()} for i in (0, 1))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']
    places = {path.split('/')[0] for path in ocnn.kernel_paths(params)}
    assert places == set(params) - {'linear'} - left_out
    penalty = ocnn.make_ocnn_penalty(params, strides=strides, groups=groups)
    expected = 0
    for path in ocnn.kernel_paths(params):
        kernel = np.asarray(params[path.split('/')[0]].get('conv', params[path.split('/')[0]])['kernel'])
        assert groups[path] == (kernel.shape[-1] if 'depthwise' in path else 1)
        whole = dense(kernel, groups[path])
        one = set(kernel.shape[:-2]) == {1}
        expected += ocnn.matrix_penalty(whole) if one else ocnn.deconvolution_penalty(whole, strides[path])
    np.testing.assert_allclose(penalty(params), expected, rtol=1e-5)
