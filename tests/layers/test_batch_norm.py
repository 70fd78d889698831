"""BatchNorm against float64 NumPy and Flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax.layers import BatchNorm

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def train(layer, variables, x):
    return layer.apply(variables, x, use_running_average=False, mutable=['batch_stats'])


@functools.partial(jax.jit, static_argnums=0)
def evaluate(layer, variables, x):
    return layer.apply(variables, x, use_running_average=True)


@pytest.fixture(scope='module')
def variables():
    rng = np.random.default_rng(0)
    return {
        'params': {
            'scale': rng.uniform(0.5, 2, 3).astype(np.float32),
            'bias': rng.standard_normal(3).astype(np.float32),
        },
        'batch_stats': {
            'mean': rng.standard_normal(3).astype(np.float32),
            'var': rng.uniform(0.5, 2, 3).astype(np.float32),
        },
    }


def normalized(x, mean, var, variables, epsilon=1e-5):
    p = variables['params']
    return (np.asarray(x, np.float64) - mean) / np.sqrt(var + epsilon) * p['scale'] + p['bias']


@pytest.mark.parametrize('shape', [(4, 5, 6, 3), (8, 3), (2, 1, 1, 3)])
@pytest.mark.parametrize('momentum', [0.9, 0.5])
def test_training(variables, shape, momentum):
    x = 2 + 3 * random(1, *shape)
    y, after = train(BatchNorm(momentum=momentum), variables, x)
    x = x.astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(
        y.reshape(-1, 3), normalized(x, x.mean(0), x.var(0), variables), atol=2e-5
    )  # values to 5
    old, stats = variables['batch_stats'], after['batch_stats']
    np.testing.assert_allclose(stats['mean'], momentum * old['mean'] + (1 - momentum) * x.mean(0), rtol=1e-5)
    # The unbiased variance, as in PyTorch; with two examples it is twice the biased one.
    np.testing.assert_allclose(stats['var'], momentum * old['var'] + (1 - momentum) * x.var(0, ddof=1), rtol=1e-5)


def test_evaluation(variables):
    x = random(2, 4, 5, 6, 3)
    stats = variables['batch_stats']
    y = evaluate(BatchNorm(), variables, x)
    np.testing.assert_allclose(y, normalized(x, stats['mean'], stats['var'].astype(np.float64), variables), atol=1e-5)


def test_training_output_and_gradients_are_those_of_flax(variables):
    x, cotangent = random(3, 4, 5, 6, 3), random(4, 4, 5, 6, 3)

    def gradients(layer):
        def loss(params, x):
            y, _ = layer.apply({**variables, 'params': params}, x, mutable=['batch_stats'])
            return (y * cotangent).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables['params'], x)

    ours = gradients(BatchNorm(use_running_average=False))
    flax = gradients(nn.BatchNorm(use_running_average=False))
    # Two float32 orders of the same sums over 120 values.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, flax)


def test_variables_have_the_names_of_flax():
    x = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    ours, flax = (
        jax.eval_shape(lambda x, m=m: m(use_running_average=True).init(jax.random.key(0), x), x)
        for m in (BatchNorm, nn.BatchNorm)
    )
    assert ours == flax
    bare = jax.eval_shape(lambda x: BatchNorm(use_running_average=True, use_affine=False).init(jax.random.key(0), x), x)
    assert set(bare) == {'batch_stats'}


def test_init_leaves_the_statistics_at_their_start():
    layer, x = BatchNorm(use_running_average=False), 5 + random(5, 4, 3)
    stats = layer.init(jax.random.key(0), x)['batch_stats']
    np.testing.assert_array_equal(stats['mean'], 0)
    np.testing.assert_array_equal(stats['var'], 1)


def test_one_example_leaves_finite_statistics(variables):
    y, after = train(BatchNorm(), variables, random(6, 1, 3))
    # Zero but for the rounding of mean / sqrt(epsilon) = 316 mean, 316 * eps = 4e-5 for a mean of one.
    np.testing.assert_allclose(y[0], variables['params']['bias'], atol=5e-4)
    assert np.all(np.isfinite(after['batch_stats']['var']))


def test_far_from_zero(variables):
    # Mean 1000 standard deviations away: float32 keeps 1000 * eps = 1e-4 of a deviation; the
    # formula E[x^2] - E[x]^2 would lose 1000^2 * eps = 10 % of the variance.
    x = 1000 + random(7, 16, 8, 8, 3)
    y, after = train(BatchNorm(momentum=0.0), variables, x)
    x = x.astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(after['batch_stats']['var'], x.var(0, ddof=1), rtol=1e-4)
    np.testing.assert_allclose(y.reshape(-1, 3), normalized(x, x.mean(0), x.var(0), variables), atol=2e-3)


@pytest.mark.parametrize('dtype,expected', [(None, jnp.bfloat16), (jnp.float32, jnp.float32)])
def test_bfloat16(variables, dtype, expected):
    x = jnp.asarray(random(8, 8, 6, 6, 3), jnp.bfloat16)
    y, after = train(BatchNorm(dtype=dtype), variables, x)
    assert y.dtype == expected
    assert after['batch_stats']['mean'].dtype == after['batch_stats']['var'].dtype == jnp.float32
    x = np.asarray(x, np.float64)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), ddof=1)
    old = variables['batch_stats']
    # Statistics in float32 of the bfloat16 input: no further rounding.
    np.testing.assert_allclose(after['batch_stats']['mean'], 0.9 * old['mean'] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(after['batch_stats']['var'], 0.9 * old['var'] + 0.1 * var, rtol=1e-5)
    # The output is rounded once: relative error 2^-9, twice that allowed; float32 where asked for.
    tolerance = 2**-8 if dtype is None else 1e-5
    exact = normalized(x, mean, x.var((0, 1, 2)), variables)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=tolerance, atol=1e-5)


def test_constant_channel_is_finite(variables):
    x = np.full((4, 4, 4, 3), 7, np.float32)
    y, back = jax.vjp(lambda x: train(BatchNorm(), variables, x)[0], x)
    np.testing.assert_allclose(
        y, np.broadcast_to(variables['params']['bias'], y.shape), atol=2e-3
    )  # 7 * eps / sqrt(epsilon)
    assert np.all(np.isfinite(back(jnp.ones_like(y))[0]))


def after_channelwise(x, kernel, offset, scale, bias):
    """(normalized, mean, variance) of a channel-wise convolution, by the layer."""
    variables = {
        'params': {'scale': scale, 'bias': bias},
        'batch_stats': {'mean': np.zeros(3, np.float32), 'var': np.ones(3, np.float32)},
    }
    layer = BatchNorm(momentum=0)
    y, after = layer.apply(variables, x, False, channelwise=(kernel, offset), mutable=['batch_stats'])
    return y, after['batch_stats']['mean'], after['batch_stats']['var']


def by_definition(x, kernel, offset, scale, bias):
    """The same, to be differentiated by JAX."""
    pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:2]]
    x = jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), pads, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=3
    )
    x = x + offset
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    count = x.size // 3
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias, mean, var * count / (count - 1)


@pytest.fixture(scope='module', params=[(3, 3), (2, 4), (1, 1)], ids=str)
def arguments(request):
    return random(3, 4, 5, 6, 3), random(7, *request.param, 3), random(4, 3), random(5, 3), random(6, 3)


def loss(layer, arguments):
    y, mean, var = layer(*arguments)
    weights = [random(i, *a.shape) for i, a in enumerate((y, mean, var))]
    # Statistics that take part in a loss, too.
    return sum((jnp.sin(a) * w).sum() for a, w in zip((y, 3 * mean, 2 * var), weights))


def assert_close(found, expected, tolerance):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    # In front of the normalization the gradient of an offset is zero but for rounding: on the scale of the largest.
    largest = max(np.abs(np.asarray(b)).max() for b in expected)
    for a, b in zip(found, expected, strict=True):
        scale = max(np.abs(np.asarray(b)).max(), 0.01 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def test_gradients_after_a_channelwise_convolution(arguments):
    assert_close(after_channelwise(*arguments), by_definition(*arguments), 1e-6)
    found = jax.jit(jax.grad(lambda a: loss(after_channelwise, a)))(arguments)
    # A 1x1 filter only scales what is normalized: its gradient is what is left of sums that cancel.
    assert_close(found, jax.jit(jax.grad(lambda a: loss(by_definition, a)))(arguments), 5e-5)


@pytest.mark.slow
def test_second_derivatives_after_a_channelwise_convolution(arguments):
    def penalty(layer):
        first = jax.grad(lambda b: loss(layer, b))
        return jax.jit(jax.grad(lambda a: sum(jnp.square(g).sum() for g in first(a))))

    found = penalty(after_channelwise)(arguments)
    assert_close(found, penalty(by_definition)(arguments), 1e-4)


def test_gradients_have_the_dtypes_of_the_parameters(arguments):
    x, *others = arguments
    others = [a.astype(jnp.bfloat16) for a in others]
    by_others = jax.grad(lambda others: after_channelwise(x, *others)[0].sum())(others)
    assert [g.dtype for g in by_others] == [jnp.bfloat16] * 4


def test_gradient_with_respect_to_the_input_alone(arguments):
    # As an attack takes it: the same, and the parameters' gradients are not computed for it.
    by_input = lambda layer: jax.grad(lambda x: loss(layer, (x, *arguments[1:])))
    assert_close(jax.jit(by_input(after_channelwise))(arguments[0]), by_input(by_definition)(arguments[0]), 1e-5)
