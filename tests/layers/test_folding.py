"""fold_for_inference: equal to the net it came from, and less to do."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax import ConvNorm, ConvNormTranspose, fold_for_inference
from convnorm_jax.errors import UserError
from convnorm_jax.layers.method import METHODS
from convnorm_jax.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')


def shaken(variables, seed=0):
    """Variables with every number moved: statistics and scales that are not those of the start."""
    random = np.random.default_rng(seed)

    def move(path, leaf):
        leaf = leaf * random.uniform(0.5, 1.5, leaf.shape).astype(np.float32) + 0.1 * random.random(
            leaf.shape, np.float32
        )
        if path[-1].key == 'preconditioner':  # of a real filter: even
            leaf = (leaf + np.roll(np.flip(leaf, (-3, -2)), 1, (-3, -2))) / 2
        return leaf

    return jax.tree_util.tree_map_with_path(move, variables)


def evaluate(model, variables, x):
    return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)


class Layers(nn.Module):
    """A net of two layers with the same options."""

    options: dict

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(ConvNorm(5, (3, 3), (2, 2), 1, **self.options)(x, not train))
        x = nn.relu(ConvNorm(4, (1, 1), **self.options)(x, not train))
        return ConvNormTranspose(3, **self.options)(x, not train)


@pytest.mark.covering(1)
@pytest.mark.parametrize('method', [None, *METHODS])
@pytest.mark.parametrize('affine,batch_norm', [(True, True), (True, False), (False, True), (False, False)])
def test_layers(method, affine, batch_norm):
    model = Layers({'method': method, 'use_affine': affine, 'use_batch_norm': batch_norm})
    x = np.random.default_rng(1).standard_normal((3, 12, 12, 2)).astype(np.float32)
    variables = shaken(jax.jit(model.init)(jax.random.key(0), x))
    folded = fold_for_inference(model, variables, x)
    expected = evaluate(model, variables, x)
    # Only what was folded is needed: the parameters may be anything.
    nothing = jax.tree.map(jnp.zeros_like, variables)
    y = evaluate(model, {**nothing, 'folded': folded['folded']}, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize('name,options', [
    pytest.param('resnet18', {'depth': (1, 1, 1, 1)}, marks=pytest.mark.slow),
    pytest.param('vgg11', {}, marks=pytest.mark.slow),
    ('simple_cnn', {}),
])  # fmt: skip
def test_nets_and_their_gradients(name, options):
    model = create_model(name, num_classes=10, layer='convnorm', width=8, **options)
    x = np.random.default_rng(2).random((8, 32, 32, 3), np.float32)
    variables = shaken(jax.jit(model.init)(jax.random.key(0), x))
    folded = fold_for_inference(model, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    value_and_grad = jax.jit(jax.value_and_grad(lambda x, v: jnp.square(model.apply(v, x, train=False)).sum()))
    (value, gradient), (expected, expected_gradient) = value_and_grad(x, folded), value_and_grad(x, variables)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    # By its length: where a ReLU's input is next to zero rounding may switch it, and all pixels behind it.
    assert np.linalg.norm(gradient - expected_gradient) < 1e-3 * np.linalg.norm(expected_gradient)


def test_there_is_less_to_do():
    model = create_model('simple_cnn', num_classes=10, layer='convnorm', width=8)
    x = np.zeros((16, 32, 32, 3), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    folded = fold_for_inference(model, variables, x)
    flops = lambda v: (
        jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(v, x).compile().cost_analysis()['flops']
    )
    assert flops(folded) < 0.95 * flops(variables)  # a twentieth at least is the kernel's side


def test_training_goes_on_without_it():
    model = Layers({})
    x = np.ones((2, 8, 8, 2), np.float32)
    variables = shaken(jax.jit(model.init)(jax.random.key(0), x))
    folded = fold_for_inference(model, variables, x)
    # In training mode the folded values are not looked at, and are never written unasked.
    train = jax.jit(lambda variables: model.apply(variables, x, train=True, mutable=['batch_stats']))
    (y, update), (expected, _) = train(folded), train(variables)
    np.testing.assert_array_equal(y, expected)
    assert set(update) == {'batch_stats'}
    update = jax.eval_shape(lambda variables: model.apply(variables, x, train=False, mutable=True)[1], variables)
    assert set(update) == {'params', 'batch_stats'}


@pytest.mark.parametrize('mutable', [True, flax.core.DenyList('params'), ['batch_stats', 'folded']], ids=str)
def test_nothing_is_written_unasked(mutable):
    # Issue 13.1: with a DenyList every collection is mutable, and inference would take stale values ever after.
    model, x = Layers({}), np.random.default_rng(3).random((4, 8, 8, 2), np.float32)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=True))(x)
    assert set(variables) == {'params', 'batch_stats'}
    apply = lambda variables, train: model.apply(variables, x, train=train, mutable=mutable)[1]
    for train in (True, False):
        assert 'folded' not in jax.eval_shape(functools.partial(apply, train=train), variables)
    # A net that was folded can be trained further; its folded values stay as they are.
    folded = fold_for_inference(model, shaken(variables), x)
    update = jax.jit(functools.partial(apply, train=True))(folded)
    jax.tree.map(np.testing.assert_array_equal, update.get('folded', folded['folded']), folded['folded'])


def test_training_with_a_deny_list_equals_training_with_the_statistics_named():
    model, x = Layers({}), np.random.default_rng(4).random((4, 8, 8, 2), np.float32)
    variables, results = jax.jit(model.init)(jax.random.key(0), x), []
    for mutable in (['batch_stats'], flax.core.DenyList('params')):

        @jax.jit
        def step(state, mutable=mutable):
            def loss(params):
                y, new = model.apply({**state, 'params': params}, x, train=True, mutable=mutable)
                return jnp.square(y - 1).mean(), new

            gradient, new = jax.grad(loss, has_aux=True)(state['params'])
            return {**new, 'params': jax.tree.map(lambda p, g: p - 0.1 * g, state['params'], gradient)}

        state = step(step(variables))
        results.append((state, evaluate(model, state, x)))
    assert set(results[0][0]) == set(results[1][0]) == {'params', 'batch_stats'}
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.covering(1)
@pytest.mark.parametrize('method', [None, *METHODS])
@pytest.mark.parametrize('height,width', [(33, 32), (32, 31), (34, 32)])
def test_another_size_is_refused(method, height, width):
    # By the frequency domain 34 and 35 rows of a grid have equally many products: the grid itself is compared.
    model = Layers({'method': method})
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 2), np.float32))
    folded = fold_for_inference(model, variables, jax.ShapeDtypeStruct((8, 32, 32, 2), np.float32))
    run = lambda x: jax.eval_shape(lambda x: model.apply(folded, x, train=False), x)
    assert run(jax.ShapeDtypeStruct((3, 32, 32, 2), np.float32)).shape == (3, 32, 32, 3)
    with pytest.raises(UserError, match=rf'ConvNorm_0: folded for images of 32x32, got {height}x{width}; call fold'):
        run(jax.ShapeDtypeStruct((8, height, width, 2), np.float32))


class Block(nn.Module):
    """As nn.scan wants it."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, train):
        layer = nn.remat(ConvNorm, static_argnums=(2,)) if self.remat else ConvNorm
        return nn.relu(layer(4, name='norm')(x, not train)), None


class Scanned(nn.Module):
    """Layers in a scan, with one before it."""

    collections: tuple
    first: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        if self.first:
            x = nn.relu(ConvNorm(4, name='first')(x, not train))
        axes = {name: 0 for name in self.collections}
        body = nn.scan(Block, variable_axes=axes, split_rngs={'params': True}, in_axes=nn.broadcast, length=3)
        return body(self.remat, name='blocks')(x, train)[0]


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('remat', [True, False])
def test_layers_in_a_scan(first, remat):
    x = np.random.default_rng(5).random((8, 7, 6, 4), np.float32)
    without = Scanned(('params', 'batch_stats'), first, remat)
    carried = Scanned(('params', 'batch_stats', 'folded'), first, remat)
    variables = shaken(jax.jit(carried.init)(jax.random.key(0), x))
    layers = 2 if first else 1
    message = rf"1 of {layers} layers are inside .* the first is 'blocks/norm'; add it there, .*'folded': 0"
    with pytest.raises(UserError, match=message) as found:
        fold_for_inference(without, variables, x)
    assert '\n' not in str(found.value)
    folded = fold_for_inference(carried, variables, x)
    assert folded['folded']['blocks']['norm']['bias'].shape == (3, 4)
    expected = evaluate(without, variables, x)
    nothing = jax.tree.map(jnp.zeros_like, variables)
    y = evaluate(carried, {**nothing, 'folded': folded['folded']}, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_strict_promotion():
    x = np.random.default_rng(6).random((8, 6, 6, 2), np.float32)
    with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
        for options in ({}, {'use_affine': False}, {'use_batch_norm': False}):
            model = Layers(options)
            variables = jax.jit(model.init)(jax.random.key(0), x)
            evaluate(model, fold_for_inference(model, variables, x), x)


def test_errors():
    x = np.ones((2, 8, 8, 2), np.float32)
    model = create_model('simple_cnn', num_classes=10, layer='batchnorm', width=4, depth=(1,))
    with pytest.raises(ValueError, match='no ConvNorm'):
        fold_for_inference(model, model.init(jax.random.key(0), x), x)
    model = Layers({})
    variables = jax.jit(model.init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match='running spectrum is of 8x8'):
        fold_for_inference(model, variables, np.ones((1, 10, 10, 2), np.float32))
    with pytest.raises(ValueError, match='ConvNorm_0: folded for images of 8x8, got 10x10'):
        model.apply(fold_for_inference(model, variables, x), np.ones((1, 10, 10, 2), np.float32))
