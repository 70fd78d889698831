"""What is measured of grouped and of 1-D layers: against dense matrices, and of whole nets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax import plots
from convnorm_jax.evaluation import spectral
from convnorm_jax.evaluation.layers import find_sites, layer_spectra
from convnorm_jax.evaluation.operators import layer_operators, product_bound
from convnorm_jax.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHAPE = (6, 5, 2)
CASES = [((6,), (3, 2, 4), 1), ((5,), (3, 2, 4), 2), ((5, 4), (3, 3, 1, 3), 3), ((4, 6), (3, 2, 2, 6), 3)]
CASES += [((3, 4, 3), (2, 3, 1, 2, 2), 2)]


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def circular_matrix(size, kernel, groups, scale=None):
    """The circular stride-1 convolution as a matrix, a row for each pixel and channel that it is given."""
    channels = kernel.shape[-2] * groups
    basis = np.eye(np.prod(size) * channels, dtype=np.float32).reshape(-1, *size, channels)
    edges = [(0, k - 1) for k in kernel.shape[:-2]]
    conv = nn.Conv(kernel.shape[-1], kernel.shape[:-2], padding='VALID', use_bias=False, feature_group_count=groups)
    y = conv.apply({'params': {'kernel': kernel}}, np.pad(basis, [(0, 0), *edges, (0, 0)], mode='wrap'))
    if scale is not None:
        axes = tuple(range(1, 1 + len(size)))
        y = np.fft.irfftn(np.fft.rfftn(y, axes=axes) * scale, s=size, axes=axes)
    return np.asarray(y, np.float64).reshape(len(basis), -1)


@pytest.mark.parametrize('size,shape,groups', CASES)
def test_singular_values_against_the_dense_matrix(size, shape, groups):
    kernel = random(0, *shape)
    found = spectral.singular_values(kernel, size, groups=groups)
    expected = np.linalg.svd(circular_matrix(size, kernel, groups), compute_uv=False)
    assert found.shape == (np.prod(size) * min(shape[-2] * groups, shape[-1]),)
    # Near zero a float32 singular value is known to the largest one's last bits.
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-5 * expected[0])


@pytest.mark.parametrize('size,shape,groups', CASES)
def test_scaled_singular_values_against_the_dense_matrix(size, shape, groups):
    kernel = random(1, *shape)
    power = spectral.channel_power_spectrum(kernel, size)
    assert power.shape == (*spectral.half_grid(size), shape[-1])
    scale = power**-0.5
    found = spectral.singular_values(kernel, size, scale, groups)
    expected = np.linalg.svd(circular_matrix(size, kernel, groups, scale), compute_uv=False)
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-4 * expected[0])
    if shape[-2] == 1 and groups == shape[-1]:  # a depthwise ConvNorm is an isometry
        np.testing.assert_allclose(found, 1, atol=1e-4)


@pytest.mark.parametrize('groups', [0, 4])
def test_groups_that_do_not_divide(groups):
    with pytest.raises(ValueError, match=f'groups={groups}: expected a divisor of the 3 output channels'):
        spectral.singular_values(random(0, 3, 3, 1, 3), (5, 5), groups=groups)


@functools.cache
def net(name, layer):
    """(net, variables away from the start)."""
    model = create_model(name, num_classes=3, layer=layer, width=3, depth=(1, 1))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))

    def moved(path, leaf):
        wave = jnp.cos(1.7 * jnp.arange(leaf.size)).reshape(leaf.shape)
        if path[0].key == 'params':
            return leaf + 0.3 * wave
        return leaf * (1 + 0.5 * wave) if path[-1].key == 'var' else leaf

    return model, jax.tree_util.tree_map_with_path(moved, variables)


NETS = {'mobilenet': ('conv1', 'depthwise1_1', 'depthwise2_1'), 'sequence_cnn': ('conv1_1', 'conv2_1')}


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('layer', ['convnorm', 'batchnorm', 'oni'])
@pytest.mark.parametrize('name', NETS)
def test_spectra_of_a_net(name, layer, tmp_path):
    model, variables = net(name, layer)
    found = layer_spectra(model, variables, SHAPE)
    assert tuple(spectrum.name for spectrum in found) == NETS[name]
    rank = 1 if name == 'sequence_cnn' else 2
    for spectrum in found:
        assert spectrum.power_before.shape[:-1] == spectral.half_grid(spectrum.size) and len(spectrum.size) == rank
        # All directions together: Parseval.
        full = spectral._multiplicity(spectrum.size)
        energy = (spectrum.power_before.reshape(len(full), -1).sum(-1) * full).sum()
        np.testing.assert_allclose(np.square(spectrum.singular_before).sum(), energy, rtol=1e-4)
        if layer == 'oni':  # BatchNorm comes behind
            assert spectrum.singular_after.shape == spectrum.singular_before.shape
    assert plots.layer_spectra(found, tmp_path / 'spectra.png').stat().st_size > 10_000


@pytest.mark.slow
def test_a_depthwise_convnorm_is_measured_as_an_isometry():
    _, variables = net('mobilenet', 'convnorm')
    exact = create_model('mobilenet', num_classes=3, layer='convnorm', width=3, depth=(1, 1), spectrum='exact')
    for spectrum in layer_spectra(exact, variables, SHAPE):
        if 'depthwise' in spectrum.name:
            np.testing.assert_allclose(spectrum.singular_after, 1, atol=1e-4)
            assert np.ptp(spectrum.singular_before) > 0.1


def dense_norm(site, variables):
    """Norm of the linear part of a whole layer at evaluation."""
    inside = {k: functools.reduce(lambda tree, key: tree.get(key, {}), site.path, v) for k, v in variables.items()}
    size = int(np.prod(site.input_shape))
    batch = np.concatenate([np.eye(size), np.zeros((1, size))]).astype(np.float32).reshape(-1, *site.input_shape)
    y = np.asarray(site.module.apply(inside, batch), np.float64).reshape(size + 1, -1)
    return np.linalg.norm(y[:-1] - y[-1], 2)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('layer', ['convnorm', 'batchnorm', 'spectralnorm'])
@pytest.mark.parametrize('name', NETS)
def test_operators_of_a_net(name, layer):
    model, variables = net(name, layer)
    operators = layer_operators(model, variables, SHAPE)
    sites = find_sites(model, variables, SHAPE)
    assert [o.name for o in operators] == [s.name for s in sites] and operators[-1].name == 'linear'
    for operator, site in zip(operators, sites):
        # A zero-padded, strided convolution is a part of the circular one.
        assert operator.conv_norm <= operator.conv_circular[0] * 1.001
        np.testing.assert_allclose(operator.layer_norm, dense_norm(site, variables), rtol=2e-3)
        assert operator.layer_norm <= operator.layer_circular[0] * 1.001 or operator.kind == 'ConvNorm'
    bound, x = product_bound(model, operators), random(3, 40, *SHAPE)
    logits = np.asarray(jax.jit(model.apply)(variables, x))
    apart = np.linalg.norm(logits[::2] - logits[1::2], axis=1) / np.linalg.norm(
        (x[::2] - x[1::2]).reshape(20, -1), axis=1
    )
    by_hand = np.prod([o.layer_norm for o in operators]) / np.prod(operators[-2].output_shape[:-1]) ** 0.5
    np.testing.assert_allclose(bound, by_hand, rtol=1e-6)
    assert 0 < apart.max() <= bound


@pytest.mark.parametrize('name', NETS)
def test_what_is_not_linear_has_no_bound(name):
    model, variables = net(name, 'groupnorm')
    operators = layer_operators(model, variables, SHAPE)
    assert [o.layer_norm is None for o in operators] == [True] * (len(operators) - 1) + [False]
    assert product_bound(model, operators) is None
