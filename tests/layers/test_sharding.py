"""The layer on several devices: jax.shard_map, meshes in use, axes of every kind. Fake CPU devices, see conftest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from convnorm_jax import ConvNorm, ConvNormTranspose
from convnorm_jax.errors import UserError
from convnorm_jax.layers import frequency
from convnorm_jax.layers.method import METHODS
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

LAYERS = {
    'convolution': functools.partial(ConvNorm, 4, (3, 3), (2, 1), 1),
    'bare': functools.partial(ConvNorm, 4, use_affine=False),
    'without BatchNorm': functools.partial(ConvNorm, 4, use_batch_norm=False),
    'transposed': functools.partial(ConvNormTranspose, 4, (4, 4), (2, 2)),
    '1x1': functools.partial(ConvNorm, 4, (1, 1)),
}


def make_mesh(shape=(4,), names=('data',), kind=AxisType.Auto):
    if jax.device_count() < 4:
        pytest.skip('needs four devices')
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[:4])


@functools.lru_cache
def case(name, method):
    layer = LAYERS[name](method=method)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6, 5, 3)).astype(np.float32))
    return layer, jax.jit(lambda x: layer.init(jax.random.key(0), x, True))(x), x


def training_loss(layer, statistics, params, x):
    y = layer.apply({'params': params, 'batch_stats': statistics}, x, False, mutable=['batch_stats'])[0]
    return (jnp.sin(3 * y) * jnp.arange(y[0].size).reshape(y[0].shape)).sum()


def close(found, expected, tolerance=1e-4):
    largest = max(np.abs(b).max() for b in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max(), 0.1 * largest))


@pytest.mark.covering(1)
@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('method', [None, *METHODS])
def test_shard_map(name, method):
    """Of each device its own batch, with the default check of what varies over the mesh."""
    (layer, variables, x), mesh = case(name, method), make_mesh()
    params, statistics = variables['params'], variables.get('batch_stats', {})
    mine = functools.partial(training_loss, layer, statistics)
    parts = jnp.stack(jnp.split(x, 4))

    def unsharded(params, x):
        return jax.vmap(mine, (None, 0))(params, x.reshape(parts.shape)).sum()

    sharded = jax.shard_map(
        lambda params, x: jax.lax.psum(mine(params, x), 'data'), mesh=mesh, in_specs=(P(), P('data')), out_specs=P()
    )
    expected = jax.jit(jax.value_and_grad(unsharded, (0, 1)))(params, x)

    def inside(params, x):
        return jax.grad(lambda params: jax.lax.psum(mine(params, x), 'data'))(params)

    inside = jax.shard_map(inside, mesh=mesh, in_specs=(P(), P('data')), out_specs=P())
    outside = jax.value_and_grad(sharded, (0, 1))
    found = jax.jit(lambda *given: (outside(*given), inside(*given)))(params, x)
    close(found, (expected, expected[1][0]))


@pytest.mark.slow
@pytest.mark.parametrize('method', few([None, *METHODS], None))
def test_eager_shard_map(method):
    (layer, variables, x), mesh = case('convolution', method), make_mesh((2, 2), ('data', 'model'))
    infer = lambda x: layer.apply(variables, x, True)
    train = lambda x: layer.apply(variables, x, False, mutable=['batch_stats'])[0]
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
    close(shard(infer)(x), infer(x), 1e-5)
    close(shard(train)(x), jnp.concatenate([train(half) for half in jnp.split(x, 2)]), 1e-5)


def test_gradients_of_each_example_within_shard_map():
    (layer, variables, x), mesh = case('convolution', None), make_mesh()
    value = lambda params, x: jnp.square(layer.apply({**variables, 'params': params}, x[None], True)).sum()
    each = jax.vmap(jax.grad(value), (None, 0))
    sharded = jax.shard_map(
        lambda params, x: each(jax.tree.map(lambda p: jax.lax.pcast(p, 'data', to='varying'), params), x),
        mesh=mesh, in_specs=(P(), P('data')), out_specs=P('data'),
    )  # fmt: skip
    close(jax.jit(sharded)(variables['params'], x), jax.jit(each)(variables['params'], x))


def test_forward_mode_within_shard_map():
    (layer, variables, x), mesh = case('convolution', None), make_mesh()
    infer = lambda x: layer.apply(variables, x, True)
    along = lambda x: jax.jvp(infer, (x,), (jnp.cos(x),))[1]
    sharded = jax.shard_map(along, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
    close(jax.jit(sharded)(x), jax.jit(along)(x))


@pytest.mark.covering(1)
@pytest.mark.parametrize('name', ['convolution', 'transposed'])
@pytest.mark.parametrize(
    'shape,names,batch,filters',
    [
        ((4,), ('data',), P('data'), P()),
        ((2, 2), ('data', 'model'), P('data'), P(None, None, None, 'model')),
        ((4,), ('model',), P(), P(None, None, None, 'model')),
        ((2, 2), ('replica', 'data'), P(('replica', 'data')), P()),
    ],
    ids=str,
)
@pytest.mark.parametrize('method', [None, 'spatial'])
def test_a_mesh_in_use(name, method, shape, names, batch, filters):
    (layer, variables, x), mesh = case(name, method), make_mesh(shape, names)
    gradient = jax.value_and_grad(functools.partial(training_loss, layer, variables['batch_stats']), (0, 1))
    expected = jax.jit(gradient)(variables['params'], x)
    params = dict(variables['params'])
    params['kernel'] = jax.device_put(params['kernel'], NamedSharding(mesh, filters))
    with jax.set_mesh(mesh):
        found = jax.jit(gradient)(params, jax.device_put(x, NamedSharding(mesh, batch)))
    close(jax.device_get(found), expected)


def test_only_an_axis_of_data_cuts_the_batch():
    assert frequency._batch_shards(8) == 1
    for shape, names, kind, expected in (
        ((4,), ('data',), AxisType.Auto, 4),
        ((2, 2), ('data', 'model'), AxisType.Auto, 2),
        ((4,), ('model',), AxisType.Auto, 1),
        ((2, 2), ('data', 'model'), AxisType.Explicit, 1),
    ):
        with jax.set_mesh(make_mesh(shape, names, kind)):
            assert frequency._batch_shards(8) == expected
            assert frequency._batch_shards(7) == 1
    within = lambda x: x + frequency._batch_shards(8)
    mesh = make_mesh()
    assert jax.shard_map(within, mesh=mesh, in_specs=P('data'), out_specs=P('data'))(jnp.zeros(4)).max() == 1


@pytest.mark.parametrize('layer', [ConvNorm(4), ConvNormTranspose(4)])
def test_explicit_axes_are_refused_in_one_line(layer):
    x, mesh = np.zeros((8, 6, 5, 3), np.float32), make_mesh(kind=AxisType.Explicit)
    variables = layer.init(jax.random.key(0), x, True)
    with jax.set_mesh(mesh):
        images = jax.device_put(x, NamedSharding(mesh, P('data')))
        with pytest.raises(
            UserError, match=r'explicit axes .*data.*: make it with jax\.make_mesh.*AxisType\.Auto'
        ) as e:
            jax.jit(lambda x: layer.apply(variables, x, True))(images)
        assert '\n' not in str(e.value).partition('\n---')[0]  # behind that JAX says that frames are left out
    with jax.set_mesh(make_mesh()):
        jax.jit(lambda x: layer.apply(variables, x, True))(x)
