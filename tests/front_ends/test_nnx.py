"""The NNX layers: the ways of NNX. Their numbers: test_same.py."""

import functools
import inspect

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
from convnorm_jax.nnx import ConvNorm

pytestmark = pytest.mark.usefixtures('quick_compilation')


def images(seed, size, batch=8, channels=4):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, *size, channels)), jnp.float32)


def modes(transform):
    """A transformation of NNX in each mode that flax has: modules as graphs with references, and as pytrees."""
    if 'graph' not in inspect.signature(transform).parameters:
        return [transform]
    return [functools.partial(transform, graph=graph) for graph in (True, False)]


def test_every_transformation_in_graph_and_tree_mode():
    x = images(0, (6, 6))
    found = []
    for jit, grad in zip(modes(nnx.jit), modes(nnx.value_and_grad), strict=True):
        layer = ConvNorm(4, 4, (3, 3), image_size=(6, 6), rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)

        @jit
        def step(layer, optimizer, x, grad=grad):
            graph, params, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)

            def loss_of(params):
                layer = nnx.merge(graph, params, statistics, copy=True)
                loss = jnp.sin(layer(x)).sum()
                return loss, nnx.state(layer, nnx.BatchStat)

            (loss, after), gradients = grad(loss_of, has_aux=True)(params)
            optimizer.update(layer, gradients)
            nnx.update(layer, after)
            return loss

        losses = [step(layer, optimizer, x) for _ in range(3)]
        assert layer.count[...] == 3
        found.append((losses, layer.kernel[...], layer.preconditioner[...]))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])
    for remat in modes(nnx.remat):
        layer = ConvNorm(4, 4, (3, 3), image_size=(6, 6), rngs=nnx.Rngs(0))
        np.testing.assert_allclose(remat(lambda layer, x: layer(x))(layer, x), layer(x), atol=1e-5)


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


@pytest.mark.parametrize('mode', range(len(modes(nnx.scan))))
def test_scan_and_vmap_over_layers(mode):
    scan, vmap = modes(nnx.scan)[mode], modes(nnx.vmap)[mode]
    x = images(0, (6, 6), channels=4)

    @functools.partial(vmap, in_axes=0, out_axes=0)
    def make(key):
        return ConvNorm(4, 4, (3, 3), image_size=(6, 6), rngs=nnx.Rngs(key))

    layers = make(jax.random.split(jax.random.key(0), 3))

    @functools.partial(scan, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer, x):
        return nnx.relu(layer(x))

    y = modes(nnx.jit)[mode](through)(layers, x)
    assert layers.count[...].tolist() == [1, 1, 1]
    again = make(jax.random.split(jax.random.key(0), 3))
    each = x
    for i in range(3):
        graph, state = nnx.split(again)
        one = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
        each = nnx.relu(one(each))
    np.testing.assert_allclose(y, each, atol=2e-5)
    many = vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
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
