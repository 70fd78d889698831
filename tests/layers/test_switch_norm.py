"""SwitchNorm against float64 NumPy, finite differences, and PyTorch where it is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.layers import SwitchNorm

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHAPE = (3, 4, 5, 6)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pictures(seed, shape=SHAPE):
    """Examples and channels that differ in mean and in spread, so that every statistic matters."""
    x, shift, spread = random(seed, *shape), random(seed + 1, shape[0], 1, 1, shape[-1]), random(seed + 2, shape[-1])
    return x * np.exp(0.5 * spread) + 2 * shift + 1


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
            'scale': rng.uniform(0.5, 2, 6).astype(np.float32),
            'bias': rng.standard_normal(6).astype(np.float32),
            'mean_weight': rng.standard_normal(3).astype(np.float32),
            'var_weight': rng.standard_normal(3).astype(np.float32),
        },
        'batch_stats': {
            'mean': rng.standard_normal(6).astype(np.float32),
            'var': rng.uniform(0.5, 2, 6).astype(np.float32),
        },
    }


def softmax(w):
    e = np.exp(np.asarray(w, np.float64))
    return e / e.sum()


def batch_moments(x):
    """(mean, var) of the channels over the batch, as the authors' code forms them: second moments, float64."""
    x = np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
    mean, second = x.mean(1), x.var(1, ddof=1) + x.mean(1) ** 2
    return mean.mean(0), second.mean(0) - mean.mean(0) ** 2


def reference(params, x, batch=None, epsilon=1e-5):
    """Output in float64; `batch`: running (mean, var), None in training."""
    shape, x = x.shape, np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
    mean_bn, var_bn = batch_moments(x) if batch is None else batch
    mean_in, var_in = x.mean(1, keepdims=True), x.var(1, ddof=1, keepdims=True)
    mean_ln = mean_in.mean(-1, keepdims=True)
    var_ln = (var_in + mean_in**2).mean(-1, keepdims=True) - mean_ln**2
    a, b = softmax(params['mean_weight']), softmax(params['var_weight'])
    mean = a[0] * mean_in + a[1] * mean_ln + a[2] * mean_bn
    var = b[0] * var_in + b[1] * var_ln + b[2] * var_bn
    return ((x - mean) / np.sqrt(var + epsilon) * params['scale'] + params['bias']).reshape(shape)


def running(variables):
    return variables['batch_stats']['mean'].astype(np.float64), variables['batch_stats']['var'].astype(np.float64)


@pytest.mark.parametrize('shape', [SHAPE, (1, 4, 4, 6), (5, 1, 2, 6)])
def test_training_output(variables, shape):
    x = pictures(1, shape)
    y, _ = train(SwitchNorm(), variables, x)
    np.testing.assert_allclose(y, reference(variables['params'], x), atol=2e-5)  # values to 6


@pytest.mark.parametrize('chosen', range(3))
def test_order_of_the_weights(variables, chosen):
    """All weight on instance, layer or batch: what is normalized then has mean 0 along those axes."""
    logits = np.where(np.arange(3) == chosen, 40, 0).astype(np.float32)
    params = {
        'scale': np.ones(6, np.float32),
        'bias': np.zeros(6, np.float32),
        'mean_weight': logits,
        'var_weight': logits,
    }
    y = np.asarray(train(SwitchNorm(), {**variables, 'params': params}, pictures(2))[0])
    axes = [(1, 2), (1, 2, 3), (0, 1, 2)]
    for i, over in enumerate(axes):
        off_centre = np.abs(y.mean(over)).max()
        # Instances of mean zero are so in any union of them.
        assert off_centre < 1e-5 if i == chosen or chosen == 0 else off_centre > 0.1
    # 20 pixels, their variance unbiased: 19/20 of one. The layer's and batch's are unions of these.
    second = np.square(y).mean(axes[chosen])
    assert np.all((second > 0.9) & (second < 1.0))


@pytest.mark.parametrize('momentum', [0.9, 0.5])
def test_running_statistics_over_several_batches(variables, momentum):
    layer, stats = SwitchNorm(momentum=momentum), variables['batch_stats']
    mean, var = running(variables)
    for seed in range(4):
        x = pictures(10 * seed)
        _, update = train(layer, {'params': variables['params'], 'batch_stats': stats}, x)
        stats = update['batch_stats']
        m, v = batch_moments(x)
        mean, var = momentum * mean + (1 - momentum) * m, momentum * var + (1 - momentum) * v
    np.testing.assert_allclose(stats['mean'], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats['var'], var, rtol=1e-5)


def test_evaluation(variables):
    x = pictures(3)
    y, after = SwitchNorm(use_running_average=True).apply(variables, x, mutable=['batch_stats'])
    np.testing.assert_allclose(y, reference(variables['params'], x, running(variables)), atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, after['batch_stats'], variables['batch_stats'])
    # An example's output does not depend on the others.
    np.testing.assert_allclose(evaluate(SwitchNorm(), variables, x[:1]), y[:1], atol=2e-6)


def finite_differences(f, value, step=1e-5):
    value = np.asarray(value, np.float64)
    gradient = np.empty_like(value)
    for i in np.ndindex(value.shape):
        ends = []
        for sign in (1, -1):
            moved = value.copy()
            moved[i] += sign * step
            ends.append(f(moved))
        gradient[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@functools.partial(jax.jit, static_argnums=0)
def gradients(training, variables, x, cotangent):
    def loss(params, x):
        y, _ = SwitchNorm(use_running_average=not training).apply(
            {**variables, 'params': params}, x, mutable=['batch_stats']
        )
        return (y * cotangent).sum()

    return jax.grad(loss, (0, 1))(variables['params'], x)


@pytest.mark.parametrize('training', [True, False])
def test_gradients_against_finite_differences(variables, training):
    x, cotangent = pictures(4), random(5, *SHAPE)
    params, batch = variables['params'], None if training else running(variables)
    ours, ours_x = gradients(training, variables, x, cotangent)

    def loss(params, x):
        return (reference(params, x, batch) * cotangent).sum()

    for name, value in params.items():
        expected = finite_differences(lambda v, name=name: loss({**params, name: v}, x), value)
        np.testing.assert_allclose(ours[name], expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)
    expected = finite_differences(lambda v: loss(params, v), x)
    np.testing.assert_allclose(ours_x, expected, atol=2e-5 * np.abs(expected).max())


def test_training_against_torch(variables):
    torch = pytest.importorskip('torch')
    x, cotangent = pictures(6), random(7, *SHAPE)
    leaf = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in variables['params'].items()}
    leaf['x'] = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float64, requires_grad=True)
    flat = leaf['x'].flatten(2)
    variance, mean = torch.var_mean(flat, -1, keepdim=True)
    second = variance + mean**2
    means, variances = [mean], [variance]
    for axis in (1, 0):
        means.append(mean.mean(axis, keepdim=True))
        variances.append(second.mean(axis, keepdim=True) - means[-1] ** 2)
    mean = sum(w * m for w, m in zip(leaf['mean_weight'].softmax(0), means))
    variance = sum(w * v for w, v in zip(leaf['var_weight'].softmax(0), variances))
    y = (flat - mean) / (variance + 1e-5).sqrt() * leaf['scale'][:, None] + leaf['bias'][:, None]
    y = y.unflatten(2, SHAPE[1:3]).permute(0, 2, 3, 1)
    (y * torch.tensor(cotangent)).sum().backward()
    np.testing.assert_allclose(train(SwitchNorm(), variables, x)[0], y.detach().numpy(), atol=2e-5)
    ours, ours_x = gradients(True, variables, x, cotangent)
    for name, value in {**ours, 'x': ours_x.transpose(0, 3, 1, 2)}.items():
        expected = leaf[name].grad.numpy()
        np.testing.assert_allclose(value, expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def test_initial_values():
    variables = SwitchNorm(use_running_average=False).init(jax.random.key(0), pictures(8))
    expected = {
        'params': {'scale': np.ones(6), 'bias': np.zeros(6), 'mean_weight': np.ones(3), 'var_weight': np.ones(3)},
        'batch_stats': {'mean': np.zeros(6), 'var': np.zeros(6)},
    }
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_far_from_zero(variables):
    # Mean 1000 standard deviations away: E[x^2] - E[x]^2 in float32 would lose 10 % of the variance.
    x = 1000 + random(9, 8, 8, 8, 6)
    y, after = train(SwitchNorm(momentum=0.0), variables, x)
    np.testing.assert_allclose(after['batch_stats']['var'], batch_moments(x)[1], rtol=1e-4)
    np.testing.assert_allclose(y, reference(variables['params'], x), atol=2e-3)


def test_pictures_of_one_pixel_are_finite(variables):
    x = pictures(10, (4, 1, 1, 6))
    y, back = jax.vjp(lambda x: train(SwitchNorm(), variables, x)[0], x)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(back(jnp.ones_like(y))[0]))
    # Nothing varies within a channel of one example: only the layer's and the batch's variances are left.
    p, z = variables['params'], x[:, 0, 0].astype(np.float64)
    a, v = softmax(p['mean_weight']), softmax(p['var_weight'])
    mean = a[0] * z + a[1] * z.mean(1, keepdims=True) + a[2] * z.mean(0)
    var = v[1] * z.var(1, keepdims=True) + v[2] * z.var(0)
    expected = (z - mean) / np.sqrt(var + 1e-5) * p['scale'] + p['bias']
    np.testing.assert_allclose(y[:, 0, 0], expected, atol=2e-5)


def test_constant_pictures_are_finite(variables):
    x = np.full((4, 4, 4, 6), 7, np.float32)
    y, back = jax.vjp(lambda x: train(SwitchNorm(), variables, x)[0], x)
    bias = np.broadcast_to(variables['params']['bias'], y.shape)
    np.testing.assert_allclose(y, bias, atol=2e-3)  # 7 * eps / sqrt(epsilon)
    assert np.all(np.isfinite(back(jnp.ones_like(y))[0]))


@pytest.mark.parametrize('dtype,expected', [(None, jnp.bfloat16), (jnp.float32, jnp.float32)])
def test_bfloat16(variables, dtype, expected):
    x = jnp.asarray(pictures(11), jnp.bfloat16)
    y, after = train(SwitchNorm(dtype=dtype), variables, x)
    assert y.dtype == expected
    assert after['batch_stats']['mean'].dtype == after['batch_stats']['var'].dtype == jnp.float32
    x = np.asarray(x, np.float64)
    # Statistics in float32 of the bfloat16 input: no further rounding.
    for name, old, new in zip(('mean', 'var'), running(variables), batch_moments(x)):
        np.testing.assert_allclose(after['batch_stats'][name], 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-6)
    # The output is rounded once: relative error 2^-9, twice that allowed; float32 where asked for.
    tolerance = 2**-8 if dtype is None else 1e-5
    exact = reference(variables['params'], x)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=tolerance, atol=2e-5)


def test_vectors_are_refused(variables):
    with pytest.raises(ValueError, match=r'x.shape=\(8, 6\)'):
        evaluate(SwitchNorm(), variables, random(12, 8, 6))
