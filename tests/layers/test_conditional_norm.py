"""BatchNorm with a scale and a bias for each class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.layers import BatchNorm, ConditionalBatchNorm

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_against_numpy():
    x, labels = 3 + 2 * random(0, 4, 3, 3, 5), np.array([2, 0, 0, 1])
    layer = ConditionalBatchNorm(3, use_running_average=False)
    variables = layer.init(jax.random.key(0), x, labels)
    params = variables['params']
    np.testing.assert_array_equal(params['scale'], np.ones((3, 5)))
    np.testing.assert_array_equal(params['bias'], np.zeros((3, 5)))
    params = {'scale': random(1, 3, 5), 'bias': random(2, 3, 5)}
    y, update = jax.jit(lambda x: layer.apply({**variables, 'params': params}, x, labels, mutable=['batch_stats']))(x)
    normalized = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    scale, bias = (params[name][labels][:, None, None] for name in ('scale', 'bias'))
    np.testing.assert_allclose(y, normalized * scale + bias, atol=1e-5)
    # The running statistics are BatchNorm's.
    plain = BatchNorm(use_running_average=False, use_affine=False)
    _, expected = plain.apply(plain.init(jax.random.key(0), x), x, mutable=['batch_stats'])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        update['batch_stats']['batch_norm'],
        expected['batch_stats'],
    )
    evaluation = ConditionalBatchNorm(3, use_running_average=True)
    z = evaluation.apply({'params': params, **update}, x, labels)
    stats = update['batch_stats']['batch_norm']
    normalized = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
    np.testing.assert_allclose(z, normalized * scale + bias, atol=1e-5)


@pytest.mark.parametrize('labels', [None, np.zeros(4, np.int32)])
def test_without_classes_it_is_batch_norm(labels):
    x = random(3, 4, 2, 2, 3)
    layer, plain = ConditionalBatchNorm(), BatchNorm()
    variables = layer.init(jax.random.key(0), x, labels, use_running_average=False)
    assert jax.tree.map(jnp.shape, variables['params']) == {'batch_norm': {'scale': (3,), 'bias': (3,)}}
    inner = {collection: tree['batch_norm'] for collection, tree in variables.items()}
    y, _ = layer.apply(variables, x, labels, use_running_average=False, mutable=['batch_stats'])
    expected, _ = plain.apply(inner, x, use_running_average=False, mutable=['batch_stats'])
    np.testing.assert_array_equal(y, expected)


def test_dtypes():
    x, labels = jnp.zeros((2, 3), jnp.bfloat16), jnp.zeros((2,), jnp.int32)
    for dtype, expected in [(None, jnp.bfloat16), (jnp.float32, jnp.float32)]:
        layer = ConditionalBatchNorm(2, use_running_average=True, dtype=dtype)
        y, variables = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), x, labels))  # noqa: B023
        assert y.dtype == expected
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('labels', [None, np.zeros(3, np.int32), np.zeros((4, 1), np.int32)])
def test_wrong_labels(labels):
    with pytest.raises(ValueError, match=r'labels.shape=.*4 images'):
        ConditionalBatchNorm(2, use_running_average=True).init(jax.random.key(0), jnp.zeros((4, 2)), labels)


def test_wrong_number_of_classes():
    with pytest.raises(ValueError, match='num_classes=-1'):
        ConditionalBatchNorm(-1, use_running_average=True).init(jax.random.key(0), jnp.zeros((4, 2)))


def test_a_numpy_integer_is_a_number_of_classes():
    x, labels = np.ones((2, 3, 3, 4), np.float32), np.array([0, 2])
    layer = ConditionalBatchNorm(np.int64(3), use_running_average=True)
    assert layer.init(jax.random.key(0), x, labels)['params']['scale'].shape == (3, 4)
