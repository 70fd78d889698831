"""Which layers a net has, and their spectra as trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.evaluation.layers import effective_kernel, find_layers, find_sites, layer_spectra
from convnorm_jax.evaluation.spectral import channel_power_spectrum
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.factory import ConvThenNorm
from convnorm_jax.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHAPE = (8, 6, 2)


def trained(layer, passes=2, **options):
    """(net of two convolutions, variables whose kernels moved after `passes` training passes)."""
    model = create_model('simple_cnn', num_classes=10, layer=layer, width=4, depth=(1, 1), **options)
    images = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images)

    @jax.jit
    def forward(variables):
        mutable = [name for name in variables if name != 'params']
        state = model.apply(variables, images, train=True, mutable=mutable)[1]
        return {**variables, **state}

    for _ in range(passes):
        variables = forward(variables)
        noise = jax.tree.map(lambda p: 0.3 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), variables['params'])
        variables['params'] = jax.tree.map(jnp.add, variables['params'], noise)
    return model, variables


@pytest.mark.slow
def test_convnorm_flattens_the_power_spectrum():
    model, variables = trained('convnorm', spectrum='exact')
    # Without its running spectrum the layer recomputes it from the kernel.
    stats = {
        name: {key: value for key, value in layer.items() if key != 'preconditioner'}
        for name, layer in variables['batch_stats'].items()
    }
    found = layer_spectra(model, {**variables, 'batch_stats': stats}, SHAPE)
    assert [(s.name, s.size) for s in found] == [('conv1_1', (10, 8)), ('conv2_1', (6, 5))]
    for spectrum in found:
        np.testing.assert_allclose(spectrum.power_after, 1, atol=1e-4)
        assert np.ptp(spectrum.power_before) > 0.1
        assert spectrum.singular_after.max() < spectrum.singular_before.max()


def test_convnorm_is_measured_with_its_running_spectrum():
    model, variables = trained('convnorm')
    for spectrum in layer_spectra(model, variables, SHAPE):
        kernel = np.asarray(variables['params'][spectrum.name]['kernel'])
        v = np.asarray(variables['batch_stats'][spectrum.name]['preconditioner'])[:, : spectrum.size[1] // 2 + 1]
        power = channel_power_spectrum(kernel, spectrum.size)
        np.testing.assert_allclose(spectrum.power_before, power, rtol=1e-5)
        np.testing.assert_allclose(spectrum.power_after, power * v**2, rtol=1e-4)
        assert np.abs(spectrum.power_after - 1).max() > 0.01  # the kernels moved since


def test_batch_norms_scale_enters():
    model, variables = trained('batchnorm')
    for spectrum in layer_spectra(model, variables, SHAPE):
        scale = np.asarray(variables['params'][spectrum.name]['norm']['scale'])
        variance = np.asarray(variables['batch_stats'][spectrum.name]['norm']['var'])
        assert np.ptp(scale) > 0.1 and np.ptp(variance) > 1e-3
        expected = spectrum.power_before * scale**2 / (variance + 1e-5)
        np.testing.assert_allclose(spectrum.power_after, expected, rtol=1e-4)


def expected_kernel(layer, params, stats):
    """The reparametrized kernel in NumPy float64."""
    kernel = np.asarray(params['kernel'], np.float64)
    rows = kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1)
    if layer == 'weightnorm':
        return kernel / np.linalg.norm(rows, axis=1) * np.asarray(params['scale'])
    if layer == 'spectralnorm':
        return kernel / (np.asarray(stats['u'], np.float64) @ rows @ np.asarray(stats['v'], np.float64))
    rows = rows - rows.mean(1, keepdims=True)
    if layer == 'oni':  # three steps of Newton from the identity
        rows /= np.sqrt(np.linalg.norm(rows @ rows.T))
        b = np.eye(len(rows))
        for _ in range(3):
            b = 1.5 * b - 0.5 * b @ b @ b @ rows @ rows.T
        rows = b @ rows * np.asarray(params['scale'])[:, None]
    else:  # OWN: the nearest matrix with orthonormal rows
        u, _, vt = np.linalg.svd(rows, full_matrices=False)
        rows = 1.414 * u @ vt
    return rows.reshape(*kernel.transpose(3, 2, 0, 1).shape).transpose(2, 3, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize('layer', ['spectralnorm', 'weightnorm', 'oni', 'own'])
def test_reparametrized_kernels_are_measured_as_they_come_out(layer):
    model, variables = trained(layer)
    sites, found = find_layers(model, variables, SHAPE), layer_spectra(model, variables, SHAPE)
    assert [s.name for s in found] == ['conv1_1', 'conv2_1']
    for site, spectrum in zip(sites, found):
        params, stats = (variables[c][site.name] for c in ('params', 'batch_stats'))
        kernel = effective_kernel(site, variables)
        assert kernel.dtype == np.float32 and np.abs(kernel - params['conv']['kernel']).max() > 0.05
        np.testing.assert_allclose(kernel, expected_kernel(layer, params['conv'], stats.get('conv')), atol=1e-4)
        np.testing.assert_allclose(spectrum.power_before, channel_power_spectrum(kernel, spectrum.size), rtol=1e-5)
        gain = np.asarray(params['norm']['scale']) ** 2 / (np.asarray(stats['norm']['var']) + 1e-5)
        np.testing.assert_allclose(spectrum.power_after, spectrum.power_before * gain, rtol=1e-4)


@pytest.mark.parametrize('layer', ['none', 'groupnorm', 'switchnorm'])
def test_layers_without_a_fixed_scale_are_the_same_before_and_after(layer):
    model, variables = trained(layer)
    found = layer_spectra(model, variables, SHAPE)
    assert [s.name for s in found] == ['conv1_1', 'conv2_1']
    for spectrum in found:
        np.testing.assert_array_equal(spectrum.power_before, spectrum.power_after)
        np.testing.assert_allclose(spectrum.singular_before, spectrum.singular_after, rtol=1e-5)


def test_only_so_many_evenly_chosen():
    model = create_model('simple_cnn', num_classes=10, layer='convnorm', width=2, depth=(3, 2))
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(jnp.zeros((1, *SHAPE)))
    names = [site.name for site in find_layers(model, variables, SHAPE)]
    assert names == ['conv1_1', 'conv1_2', 'conv1_3', 'conv2_1', 'conv2_2']
    chosen = [s.name for s in layer_spectra(model, variables, SHAPE, most=3)]
    assert chosen == ['conv1_1', 'conv1_3', 'conv2_2']
    assert [s.name for s in layer_spectra(model, variables, SHAPE)] == names


@pytest.mark.parametrize(('layer', 'module'), [('convnorm', ConvNorm), ('batchnorm', ConvThenNorm)])
@pytest.mark.parametrize('stem', ['cifar', 'imagenet'])
def test_the_layers_of_a_resnet(layer, module, stem):
    model = create_model('resnet18', num_classes=10, layer=layer, width=2, depth=(2, 1), stem=stem)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 24, 3)), train=False))
    sites = find_layers(model, variables, (32, 24, 3))
    blocks = ['layer1_0', 'layer1_1', 'layer2_0']
    names = ['conv1', *(f'{block}/{conv}' for block in blocks for conv in ('conv1', 'conv2'))]
    assert [site.name for site in sites] == names  # not the 1x1 shortcut
    assert all(type(site.module) is module and '/'.join(site.path) == site.name for site in sites)
    everywhere = [site.name for site in find_sites(model, variables, (32, 24, 3))]
    assert everywhere == [*names, 'layer2_0/shortcut', 'linear']
    # Grids are those of the pictures coming in: halved behind the strided convolution.
    first, inside = ((34, 26), (34, 26)) if stem == 'cifar' else ((38, 30), (10, 8))
    halved = tuple((n - 2) // 2 + 2 for n in inside)
    assert [site.grid for site in sites] == [first, *[inside] * 5, halved]


def test_the_layers_of_a_bottleneck_are_its_3x3s():
    model = create_model('resnet50', num_classes=10, layer='convnorm', width=2, depth=(1, 1))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    names = [site.name for site in find_layers(model, variables, (8, 8, 3))]
    assert names == ['conv1', 'layer1_0/conv2', 'layer2_0/conv2']
