"""The NNX layers: the numbers of the Linen ones, and the ways of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import convnorm_jax
from convnorm_jax.errors import UserError
from convnorm_jax.nnx import ConvNorm, ConvNormTranspose

pytestmark = pytest.mark.usefixtures('quick_compilation')

LAYERS = {
    'plain': (ConvNorm, convnorm_jax.ConvNorm, (3, 3), {}, (8, 8)),
    'strided': (ConvNorm, convnorm_jax.ConvNorm, (3, 3), {'strides': 2, 'padding': 1}, (8, 7)),
    'pointwise': (ConvNorm, convnorm_jax.ConvNorm, (1, 1), {}, (5, 5)),
    'sequence': (ConvNorm, convnorm_jax.ConvNorm, (3,), {'kernel_dilation': 2}, (9,)),
    'depthwise': (ConvNorm, convnorm_jax.ConvNorm, (3, 3), {'feature_group_count': 4, 'momentum': 0.9}, (6, 6)),
    'without': (ConvNorm, convnorm_jax.ConvNorm, (3, 3), {'use_affine': False, 'use_batch_norm': False}, (6, 6)),
    'transposed': (ConvNormTranspose, convnorm_jax.ConvNormTranspose, (4, 4), {}, (4, 5)),
}


def images(seed, size, batch=8, channels=4):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, *size, channels)), jnp.float32)


def linen_variables(layer):
    """The parameters and statistics of an NNX layer under Linen's names."""
    params, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)[1:]
    params, statistics = (nnx.to_pure_dict(part) for part in (params, statistics))
    inside = lambda tree, names: {name: tree.pop(name) for name in names if name in tree}
    params['batch_norm'] = inside(params, ('scale', 'bias'))
    statistics['batch_norm'] = inside(statistics, ('mean', 'var'))
    drop = lambda tree: {
        name: value for name, value in tree.items() if value is not None and not (isinstance(value, dict) and not value)
    }
    return {'params': drop(params), 'batch_stats': drop(statistics)}


@pytest.mark.parametrize('name', LAYERS)
def test_ten_steps_are_linens(name):
    """Training by SGD and then inference: the same bits."""
    kind, linen, kernel_size, options, size = LAYERS[name]
    layer = kind(4, 8, kernel_size, **options, image_size=size, rngs=nnx.Rngs(0))
    other = linen(8, kernel_size, **options)
    variables = linen_variables(layer)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.05), wrt=nnx.Param)
    tx = optax.sgd(0.05)
    opt_state = tx.init(variables['params'])

    @nnx.jit
    def step(layer, optimizer, x):
        loss, gradients = nnx.value_and_grad(lambda layer: jnp.sin(layer(x)).sum())(layer)
        optimizer.update(layer, gradients)
        return loss

    @jax.jit
    def linen_step(variables, opt_state, x):
        def loss_of(params):
            given = {**variables, 'params': params}
            y, changed = other.apply(given, x, use_running_average=False, mutable=['batch_stats'])
            return jnp.sin(y).sum(), changed

        (loss, changed), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables['params'])
        updates, opt_state = tx.update(gradients, opt_state)
        return {'params': optax.apply_updates(variables['params'], updates), **changed}, opt_state, loss

    for seed in range(10):
        x = images(seed, size)
        loss = step(layer, optimizer, x)
        variables, opt_state, expected = linen_step(variables, opt_state, x)
        np.testing.assert_array_equal(loss, expected)
    found = linen_variables(layer)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert found['batch_stats']['count'] == 10
    layer.eval()
    y = nnx.jit(lambda layer, x: layer(x))(layer, images(11, size))
    expected = jax.jit(lambda v, x: other.apply(v, x, use_running_average=True))(variables, images(11, size))
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, linen_variables(layer), variables)  # inference changes nothing


def test_train_and_eval_and_the_argument():
    layer = ConvNorm(4, 8, 3, image_size=(6, 6), rngs=nnx.Rngs(0))
    x = images(0, (6, 6))
    layer(x)
    assert layer.count[...] == 1
    layer.eval()
    layer(x)
    assert layer.count[...] == 1
    layer(x, use_running_average=False)
    assert layer.count[...] == 2
    layer.train()
    layer(x)
    assert layer.count[...] == 3


def test_the_first_batch_gives_the_size():
    layer = ConvNorm(4, 8, (3, 3), rngs=nnx.Rngs(0))
    assert layer.preconditioner is None
    layer(images(0, (6, 7)))
    assert layer.preconditioner[...].shape == (8, 9, 8) and layer.count[...] == 1
    with pytest.raises(UserError, match='running spectrum is of 6x7 images, got 7x7'):
        layer(images(0, (7, 7)))
    graph, params, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)
    same = nnx.merge(graph, params, statistics)
    same.eval(), layer.eval()
    np.testing.assert_array_equal(same(images(1, (6, 7))), layer(images(1, (6, 7))))


def test_exact_without_batch_norm_needs_no_size():
    layer = ConvNorm(4, 8, 3, spectrum='exact', use_batch_norm=False, use_running_average=True, rngs=nnx.Rngs(0))
    for size in ((6, 6), (7, 9)):
        assert layer(images(0, size)).shape == (8, *size, 8)
    assert layer.preconditioner is None


def test_scan_and_vmap_over_layers():
    x = images(0, (6, 6), channels=4)

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return ConvNorm(4, 4, (3, 3), image_size=(6, 6), rngs=nnx.Rngs(key))

    layers = make(jax.random.split(jax.random.key(0), 3))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer, x):
        return nnx.relu(layer(x))

    y = nnx.jit(through)(layers, x)
    assert layers.count[...].tolist() == [1, 1, 1]
    again = make(jax.random.split(jax.random.key(0), 3))
    each = x
    for i in range(3):
        graph, state = nnx.split(again)
        one = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
        each = nnx.relu(one(each))
    np.testing.assert_allclose(y, each, atol=2e-5)
    many = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
    assert many.shape == (3, *x.shape) and layers.count[...].tolist() == [2, 2, 2]


def test_linens_layer_by_the_bridge():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            return convnorm_jax.ConvNorm(8)(x, use_running_average=not train)

    x = images(0, (6, 6))
    net = bridge.lazy_init(bridge.ToNNX(Net(), rngs=nnx.Rngs(0)), x)
    before = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
    y = net(x, mutable=['batch_stats'])
    after = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
    assert y.shape == (8, 6, 6, 8)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)))
    assert np.isfinite(net(x, train=False)).all()


def test_refused():
    with pytest.raises(UserError, match='expected in_features=4'):
        ConvNorm(4, 8, 3, rngs=nnx.Rngs(0))(images(0, (6, 6), channels=3))
    with pytest.raises(UserError, match='feature_group_count=3'):
        ConvNorm(4, 8, 3, feature_group_count=3, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="method='fast'"):
        ConvNorm(4, 8, 3, method='fast', rngs=nnx.Rngs(0))
