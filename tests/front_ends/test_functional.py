"""The functions without a library: `conv_norm` and the spectrum; the whole layer is in test_same.py."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import ConvNorm, ConvNormTranspose, functional
from convnorm_jax.errors import UserError
from tests.front_ends.libraries import LAYERS, images
from tests.selection import few

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


@pytest.mark.parametrize('name', few(LAYERS, 'plain', 'depthwise', 'circular', 'transposed'))
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


@pytest.mark.parametrize('options,message', [
    (dict(kernel_size=None), 'kernel_size=None: expected a positive int'),
    (dict(dtype='int32'), "dtype='int32': expected a dtype of floats"),
    (dict(dtype='bf16'), "dtype='bf16': expected a dtype of floats"),
    (dict(dtype=jnp.complex64), 'dtype=.*complex64.*: expected a dtype of floats'),
    (dict(param_dtype='int32'), "param_dtype='int32'"),
    (dict(momentum='0.9'), "momentum='0.9': expected at least 0 and below 1"),
    (dict(momentum=float('nan')), 'momentum=nan'),
    (dict(batch_norm_momentum=2), 'batch_norm_momentum=2: expected between 0 and 1'),
    (dict(batch_norm_epsilon=-1), 'batch_norm_epsilon=-1: expected at least 0'),
])  # fmt: skip
def test_settings_that_no_layer_can_have(options, message):
    with pytest.raises(UserError, match=message):
        functional.Settings(3, **options)


@pytest.mark.parametrize('size', [(6,), (2, 6, 6), (6.0, 6.0), 0, '6'])
def test_an_image_size_that_is_none(size):
    settings, kernel = functional.Settings(3, (3, 3), padding=1), jnp.ones((3, 3, 2, 3))
    for make in (
        lambda: functional.initial_state(settings, kernel, size),
        lambda: functional.preconditioner(kernel, size),
    ):
        with pytest.raises(UserError, match=r'image_size=.*expected a positive int or two of them'):
            make()
    same = functional.initial_state(settings, kernel, 6), functional.initial_state(settings, kernel, (6, 6))
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_what_does_not_belong_together():
    settings = functional.Settings(3, (3, 3))
    params = functional.initial_params(settings, jax.random.key(0), 2)
    state, x = functional.initial_state(settings, params['kernel'], (6, 6)), jnp.ones((2, 6, 6, 2))
    run = lambda params, state, x: functional.apply(settings, params, state, x, use_running_average=False)
    with pytest.raises(UserError, match=r'kernel.shape=\(3, 3, 2, 3\): expected \(3, 3, 5, 3\).*images of 5 channels'):
        run(params, state, jnp.ones((2, 6, 6, 5)))
    with pytest.raises(UserError, match=r'kernel.shape=\(5, 5, 2, 3\): expected \(3, 3, 2, 3\)'):
        functional.initial_state(settings, jnp.ones((5, 5, 2, 3)), (6, 6))
    with pytest.raises(UserError, match="state has no 'preconditioner': make it by initial_state"):
        run(params, None, x)
    grouped = functional.Settings(4, (3, 3), feature_group_count=2)
    with pytest.raises(UserError, match='feature_group_count=2 with 5 channels and features=4'):
        functional.apply(
            grouped, {'kernel': jnp.ones((3, 3, 2, 4))}, {}, jnp.ones((2, 6, 6, 5)), use_running_average=True
        )
    for channels in ('2', 2.0, 0):
        with pytest.raises(UserError, match='input channels: expected a positive int'):
            functional.initial_params(settings, jax.random.key(0), channels)


def test_an_empty_batch():
    """As with flax's layers: no output, no gradient."""
    settings = functional.Settings(3, (3, 3))
    params = functional.initial_params(settings, jax.random.key(0), 2)
    state = functional.initial_state(settings, params['kernel'], (6, 6))
    x = jnp.ones((0, 6, 6, 2))
    loss = lambda params: functional.apply(settings, params, state, x, use_running_average=False)[0].sum()
    assert loss(params) == 0
    assert jax.tree.map(jnp.shape, jax.grad(loss)(params)) == jax.tree.map(jnp.shape, params)


def test_the_examples_in_the_docstrings():
    results = doctest.testmod(functional)
    assert results.attempted >= 3 and not results.failed
