"""The functions without a library: `conv_norm` and the spectrum; the whole layer is in test_same.py."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import ConvNorm, ConvNormTranspose, functional
from convnorm_jax.errors import UserError
from tests.front_ends.libraries import LAYERS, images

pytestmark = pytest.mark.usefixtures('quick_compilation')
NAMES = {'kernel_dilation': 'dilation', 'feature_group_count': 'groups'}


def case(name):
    """(kernel, the arguments of `conv_norm`, the same layer in Linen)."""
    transposed, kernel_size, _, given = LAYERS[name]
    given = {key: value for key, value in given.items() if key in ('strides', 'padding', *NAMES)}
    shape = (*kernel_size, 4 // given.get('feature_group_count', 1), 8)
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    layer = (ConvNormTranspose if transposed else ConvNorm)(
        8, kernel_size, use_affine=False, use_batch_norm=False, **given
    )
    return kernel, {NAMES.get(key, key): value for key, value in given.items()} | {'transposed': transposed}, layer


@pytest.mark.parametrize('name', LAYERS)
def test_conv_norm_is_the_layers_operation(name):
    kernel, options, layer = case(name)
    x = images(name, 0)
    expected, state = layer.apply({'params': {'kernel': kernel}}, x, use_running_average=False, mutable=['batch_stats'])
    np.testing.assert_array_equal(functional.conv_norm(x, kernel, **options), expected)
    v = functional.preconditioner(kernel, LAYERS[name][2], **options)
    np.testing.assert_allclose(functional.conv_norm(x, kernel, v, **options), expected, atol=2e-5)
    np.testing.assert_allclose(v, state['batch_stats']['preconditioner'], rtol=2e-4)
    gradient = jax.grad(lambda kernel: jnp.sin(functional.conv_norm(x, kernel, **options)).sum())(kernel)
    wanted = jax.grad(lambda kernel: jnp.sin(functional.conv_norm(x, kernel, v, **options)).sum())(kernel)
    np.testing.assert_allclose(gradient, wanted, atol=1e-4 * np.abs(wanted).max())  # V is a constant
    other = functional.conv_norm(x, kernel, 2 * v, **options)
    np.testing.assert_allclose(other, 2 * expected, atol=5e-5)


def test_the_spectrum_is_the_definition():
    kernel = np.random.default_rng(0).standard_normal((3, 2, 4, 8))
    v = functional.preconditioner(jnp.asarray(kernel, jnp.float32), (6, 7))
    power = np.square(np.abs(np.fft.fft2(kernel, (8, 8), axes=(0, 1)))).sum(2)
    np.testing.assert_allclose(v, power**-0.5, rtol=1e-4)


def test_the_running_average():
    old, new = jnp.full((2, 3), 1.0), jnp.full((2, 3), 3.0)
    np.testing.assert_allclose(functional.running_average(old, new, 1, momentum=0.75), 1.5)
    for count in (1, 20000, 40000, 10**6):  # the published schedule
        weight = max(0.5 * (1 + np.cos(np.pi * min(count, 40000) / 40000)), 0.01)
        np.testing.assert_allclose(functional.running_average(old, new, count), 1 + 2 * weight, rtol=1e-5)
    half = functional.running_average(old.astype(jnp.bfloat16), new, 1, 0.75)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize('change,message', [
    (dict(x=(2, 8, 8, 5)), 'expected 4 channels'),
    (dict(x=(8, 8, 4)), r'x.shape=\(8, 8, 4\)'),
    (dict(v=(8, 8, 6)), r'preconditioner.shape=\(8, 8, 6\): expected \(10, 10, 6\) for images of 8x8'),
    (dict(groups=4), 'feature_group_count=4'),
    (dict(padding='REFLECT'), "padding='REFLECT'"),
    (dict(method='fast'), "method='fast'"),
])  # fmt: skip
def test_refused(change, message):
    x, v = jnp.zeros(change.pop('x', (2, 8, 8, 4))), change.pop('v', None)
    with pytest.raises(UserError, match=message):
        functional.conv_norm(x, jnp.ones((3, 3, 4, 6)), None if v is None else jnp.ones(v), **change)


def test_the_examples_in_the_docstrings():
    results = doctest.testmod(functional)
    assert results.attempted >= 3 and not results.failed
