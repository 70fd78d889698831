"""fold_for_inference: equal to the net it came from, and less to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax import ConvNorm, ConvNormTranspose, fold_for_inference
from convnorm_jax.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')


def shaken(variables, seed=0):
    """Variables with every number moved: statistics and scales that are not those of the start."""
    random = np.random.default_rng(seed)
    move = lambda leaf: (
        leaf * random.uniform(0.5, 1.5, leaf.shape).astype(np.float32) + 0.1 * random.random(leaf.shape, np.float32)
    )
    return jax.tree.map(move, variables)


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


@pytest.mark.parametrize('method', ['frequency', 'spatial'])
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


@pytest.mark.parametrize('name,options', [('resnet18', {'depth': (1, 1, 1, 1)}), ('vgg11', {}), ('simple_cnn', {})])
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
    x = np.zeros((8, 32, 32, 3), np.float32)
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
    y, update = model.apply(folded, x, train=True, mutable=['batch_stats'])
    expected, _ = model.apply(variables, x, train=True, mutable=['batch_stats'])
    np.testing.assert_array_equal(y, expected)
    assert set(update) == {'batch_stats'}
    assert set(model.apply(variables, x, train=False, mutable=True)[1]) == {'params', 'batch_stats'}


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
