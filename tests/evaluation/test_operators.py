"""Operator norms and circular singular values against dense matrices, layer by layer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax.evaluation import operators
from convnorm_jax.evaluation.layers import effective_kernel, find_sites, inner_variables
from convnorm_jax.evaluation.operators import layer_operators, operator_norm, product_bound
from convnorm_jax.layers.factory import make_layer
from convnorm_jax.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHAPE = (6, 7, 2)


class OneLayer(nn.Module):
    """A net of one strided 3x3 convolution with its normalization."""

    layer: Callable

    @nn.compact
    def __call__(self, x, train=False):
        return self.layer(3, (3, 3), strides=(2, 2), padding=1, train=train, name='strided')(x)


def perturbed(variables):
    """Parameters and variances away from their initial values."""

    def change(path, leaf):
        wave = jnp.cos(1.7 * jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)
        if path[0].key == 'params':
            return leaf + 0.4 * wave
        return leaf * (1 + 0.6 * wave) if path[-1].key == 'var' else leaf

    return jax.tree_util.tree_map_with_path(change, variables)


def with_variables(model, shape=SHAPE):
    return model, perturbed(jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(jnp.zeros((1, *shape))))


def small_net(name, layer, shape=SHAPE, **options):
    return with_variables(create_model(name, num_classes=3, layer=layer, width=2, **options), shape)


@functools.cache
def one_layer(layer):
    model, variables = with_variables(OneLayer(make_layer(layer)))
    return model, variables, layer_operators(model, variables, SHAPE)[0]


@functools.cache
def resnet(layer):
    """Net of two blocks, strides 1 and 2, 1x1 shortcut; its variables; its operators."""
    model, variables = small_net('resnet18', layer, depth=(1, 1))
    return model, variables, layer_operators(model, variables, SHAPE)


def dense_matrix(fn, shape):
    """float64 matrix [outputs, inputs] of x -> fn(x) - fn(0), fn: [B, *shape] -> [B, ...], from its columns."""
    columns = np.concatenate([np.zeros((1, *shape)), 10 * np.eye(int(np.prod(shape))).reshape(-1, *shape)])
    images = np.asarray(jax.jit(fn)(jnp.asarray(columns, jnp.float32)), np.float64).reshape(len(columns), -1)
    return (images[1:] - images[0]).T / 10


def layer_matrices(model, variables):
    """{name: float64 matrix} of the layers of a net."""
    sites = find_sites(model, variables, SHAPE)
    inside = [inner_variables(variables, site.path) for site in sites]
    return {s.name: dense_matrix(functools.partial(s.module.apply, i), s.input_shape) for s, i in zip(sites, inside)}


def values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def convolution_matrix(kernel, shape, strides=(1, 1), circular=False):
    """float64 matrix of a convolution by its definition: padded by zeros (3x3 by 1, 1x1 by 0) or periodic."""
    (h, w, cin), (kh, kw, _, cout), (sh, sw) = shape, kernel.shape, strides
    pad = 0 if circular else kh // 2
    out_h, out_w = -(-h // sh), -(-w // sw)
    matrix = np.zeros((out_h, out_w, cout, h, w, cin))
    for r, c, a, b in np.ndindex(out_h, out_w, kh, kw):
        i, j = r * sh + a - pad, c * sw + b - pad
        if circular:
            i, j = i % h, j % w
        if 0 <= i < h and 0 <= j < w:
            matrix[r, c, :, i, j, :] += np.asarray(kernel[a, b], np.float64).T
    return matrix.reshape(out_h * out_w * cout, h * w * cin)


def filter_matrix(v):
    """float64 matrix of the filter with the real frequency response v, [H, W, C]."""
    (h, w, channels), rolled = v.shape, np.fft.ifft2(v, axes=(0, 1)).real
    kernel = np.zeros((h, w, channels, channels))
    kernel[..., range(channels), range(channels)] = rolled
    return convolution_matrix(kernel, v.shape, circular=True)


@pytest.mark.slow
@pytest.mark.parametrize('layer', ['convnorm', 'batchnorm'])
def test_the_layers_of_a_resnet(layer):
    model, variables, measured = resnet(layer)
    blocks = [f'layer1_0/conv{i}' for i in (1, 2)] + [f'layer2_0/{part}' for part in ('conv1', 'conv2', 'shortcut')]
    assert [o.name for o in measured] == ['conv1', *blocks, 'linear']
    assert [o.strides for o in measured] == [(1, 1)] * 3 + [(2, 2), (1, 1), (2, 2), (1, 1)]
    assert {o.kind for o in measured[:-1]} == {{'convnorm': 'ConvNorm', 'batchnorm': 'Conv'}[layer]}
    matrices = layer_matrices(model, variables)
    for found in measured:
        assert matrices[found.name].shape == (np.prod(found.output_shape), np.prod(found.input_shape))
        np.testing.assert_allclose(found.layer_norm, values(matrices[found.name])[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('layer', ['none', 'weightnorm', 'spectralnorm', 'oni', 'own', 'groupnorm', 'switchnorm'])
def test_a_strided_layer_of_each_other_kind(layer):
    model, variables, found = one_layer(layer)
    site = find_sites(model, variables, SHAPE)[0]
    kernel = effective_kernel(site, variables)
    convolution = convolution_matrix(kernel, SHAPE, (2, 2))
    np.testing.assert_allclose(found.conv_norm, values(convolution)[0], rtol=1e-4)
    grid = (*site.grid, SHAPE[-1])
    np.testing.assert_allclose(found.conv_circular, values(convolution_matrix(kernel, grid, circular=True)), atol=1e-5)
    if layer in ('groupnorm', 'switchnorm'):  # their statistics are the picture's
        assert found.layer_norm is None and found.layer_circular is None
        return
    whole = layer_matrices(model, variables)['strided']
    np.testing.assert_allclose(found.layer_norm, values(whole)[0], rtol=1e-4)
    # The whole is the convolution with its effective kernel, times one factor a channel.
    by_channel = (matrix.reshape(-1, 3, matrix.shape[1]).swapaxes(0, 1) for matrix in (whole, convolution))
    factors = [(a * b).sum() / (b * b).sum() for a, b in zip(*by_channel)]
    np.testing.assert_allclose(whole, convolution * np.tile(factors, len(whole) // 3)[:, None], atol=1e-4)
    expected = values(convolution_matrix(kernel * factors, grid, circular=True))
    np.testing.assert_allclose(found.layer_circular, expected, atol=1e-4)


def test_spectral_norm_of_the_convolution_itself_is_one():
    model = OneLayer(make_layer('spectralnorm', mode='conv'))
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(jnp.zeros((1, *SHAPE)))
    found = layer_operators(model, variables, SHAPE)[0]
    # 15 steps of its own power iteration: a little above 1, as it comes from below.
    assert 1 - 1e-5 <= found.conv_norm < 1.05


@pytest.mark.slow
@pytest.mark.parametrize('name', ['layer1_0/conv2', 'layer2_0/conv1', 'layer2_0/shortcut'])
def test_circular_values_of_convnorm(name):
    _, variables, measured = resnet('convnorm')
    found = next(o for o in measured if o.name == name)
    params, stats = (inner_variables(variables, name.split('/'))[c] for c in ('params', 'batch_stats'))
    kernel, taps = (np.asarray(params[k], np.float64) for k in ('kernel', 'affine_kernel'))
    grid = tuple(n + k - 1 for n, k in zip(found.input_shape, kernel.shape[:2]))
    v = np.broadcast_to(np.asarray(stats['preconditioner'], np.float64), (*grid, kernel.shape[-1]))
    convolution = filter_matrix(v) @ convolution_matrix(kernel, (*grid, kernel.shape[2]), circular=True)
    np.testing.assert_allclose(found.conv_circular, values(convolution), atol=1e-5)
    # The channel-wise convolution with zeros between its taps where the stride is 2.
    (sh, sw), (kh, kw, _, channels) = found.strides, taps.shape
    apart = np.zeros((sh * (kh - 1) + 1, sw * (kw - 1) + 1, channels, channels))
    apart[::sh, ::sw, range(channels), range(channels)] = taps[:, :, 0]
    gain = np.asarray(params['batch_norm']['scale']) / np.sqrt(np.asarray(stats['batch_norm']['var']) + 1e-5)
    whole = convolution_matrix(apart * gain, (*grid, channels), circular=True) @ convolution
    np.testing.assert_allclose(found.layer_circular, values(whole), atol=1e-4)


@pytest.mark.slow
def test_convnorms_convolution_is_a_part_of_the_circular_one():
    model, variables, measured = resnet('convnorm')
    for found, site in zip(measured[:-1], find_sites(model, variables, SHAPE)):
        inside = inner_variables(variables, site.path)
        kernel, v = inside['params']['kernel'], np.asarray(inside['batch_stats']['preconditioner'], np.float64)
        (h, w), (kh, kw) = site.grid, kernel.shape[:2]
        full = filter_matrix(np.broadcast_to(v, (h, w, v.shape[-1]))) @ convolution_matrix(
            kernel, (h, w, kernel.shape[2]), circular=True
        )
        # The picture in the lower right corner of the grid; then the crop of padding 1 (0 of the 1x1), and the stride.
        full = full.reshape(h, w, -1, h, w, kernel.shape[2])[:, :, :, kh - 1 :, kw - 1 :]
        crop = kh // 2
        part = full[crop : h - crop : site.strides[0], crop : w - crop : site.strides[1]]
        part = part.reshape(-1, np.prod(found.input_shape))
        np.testing.assert_allclose(found.conv_norm, values(part)[0], rtol=1e-4)


@pytest.mark.parametrize('layer', ['convnorm', 'batchnorm'])
def test_norms_stay_below_the_largest_circular_value(layer):
    for found in resnet(layer)[2]:
        assert 0 < found.conv_norm <= found.conv_circular[0] * (1 + 1e-5)
        if layer == 'batchnorm':
            assert found.layer_norm <= found.layer_circular[0] * (1 + 1e-5)


def test_a_bfloat16_net_is_measured_in_float32():
    _, variables, expected = one_layer('batchnorm')
    found = layer_operators(OneLayer(make_layer('batchnorm', dtype=jnp.bfloat16)), variables, SHAPE)[0]
    assert (found.conv_norm, found.layer_norm) == (expected.conv_norm, expected.layer_norm)


def test_a_net_that_diverged():
    model, variables, _ = one_layer('batchnorm')
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), variables)
    with pytest.raises(ValueError, match=r'strided: .*not finite'):
        layer_operators(model, broken, SHAPE)


@pytest.mark.parametrize('size', [1, 3, 4, 5, 9, 40])
@pytest.mark.parametrize('kind', ['random', 'orthogonal', 'rank 1', 'zero', 'crowded'])
def test_power_iteration(size, kind):
    random = np.random.default_rng(size)
    a = random.normal(size=(size, size))
    matrix = {
        'random': a,
        'orthogonal': np.linalg.qr(a)[0],
        'rank 1': np.outer(a[0], a[:, 0]),
        'zero': 0 * a,
        'crowded': np.linalg.qr(a)[0] * np.linspace(0.99, 1, size),
    }[kind]
    norm = operators._largest(lambda x: matrix.T @ (matrix @ x), size, 1e-4, random)
    np.testing.assert_allclose(norm, values(matrix)[0], rtol=1e-6)


def test_power_iteration_of_a_module_beside_a_large_bias():
    kernel = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    variables = {'params': {'kernel': kernel, 'bias': np.full(5, 1e4, np.float32)}}
    norm = operator_norm(nn.Dense(5), variables, (2, 12), tolerance=1e-2)
    np.testing.assert_allclose(norm, values(kernel)[0], rtol=2e-3)
    variables['params']['kernel'] = np.full((12, 5), np.nan, np.float32)
    assert np.isnan(operator_norm(nn.Dense(5), variables, (2, 12)))


def jacobian_norm(model, variables, shape, scale):
    """Largest norm of the logits' Jacobian at 8 random pictures."""
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda x: model.apply(variables, x[None], train=False)[0])))
    pictures = scale * jax.random.normal(jax.random.key(3), (8, *shape))
    return max(values(np.asarray(j).reshape(3, -1))[0] for j in jacobian(pictures))


def test_bound_of_a_resnet():
    model, variables, measured = resnet('batchnorm')
    norm = {name: values(matrix)[0] for name, matrix in layer_matrices(model, variables).items()}
    block1 = norm['layer1_0/conv1'] * norm['layer1_0/conv2'] + 1
    block2 = norm['layer2_0/conv1'] * norm['layer2_0/conv2'] + norm['layer2_0/shortcut']
    expected = norm['conv1'] * block1 * block2 * norm['linear'] / np.sqrt(3 * 4)
    bound = product_bound(model, measured)
    np.testing.assert_allclose(bound, expected, rtol=1e-3)
    assert 0.1 < jacobian_norm(model, variables, SHAPE, 3.0) <= bound
    stem = create_model('resnet18', num_classes=3, layer='batchnorm', width=2, depth=(1, 1), stem='imagenet')
    np.testing.assert_allclose(product_bound(stem, measured), 2 * bound)  # the pool's windows overlap


def test_bound_of_a_chain():
    shape = (8, 4, 2)
    model, variables = small_net('simple_cnn', 'batchnorm', shape, depth=(1, 1))
    measured = layer_operators(model, variables, shape)
    bound = product_bound(model, measured)
    np.testing.assert_allclose(bound, np.prod([o.layer_norm for o in measured]))
    assert len(measured) == 3 and 0.1 * bound < jacobian_norm(model, variables, shape, 3.0) <= bound


def test_no_bound_without_every_norm_or_a_known_net():
    model, _, found = one_layer('none')
    assert product_bound(model, [found]) is None
    known = create_model('simple_cnn', num_classes=3, layer='groupnorm', width=2)
    assert product_bound(known, [one_layer('groupnorm')[2]]) is None
