"""Nets of every library as the function of the attacks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from convnorm_jax.attacks.nets import as_logits_fn
from convnorm_jax.equinox import ConvNorm as EquinoxConvNorm
from convnorm_jax.errors import UserError
from convnorm_jax.models import create_model
from convnorm_jax.nnx import ConvNorm

pytestmark = pytest.mark.usefixtures('quick_compilation')

IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)


def nnx_net():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        ConvNorm(3, 4, (3, 3), image_size=(8, 8), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs),
        lambda x: x.mean((1, 2)), nnx.Linear(4, 5, rngs=rngs),
    )  # fmt: skip


class Stateful(eqx.Module):
    """ConvNorm, whose statistics are a state, and a linear layer."""

    layer: EquinoxConvNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.layer = EquinoxConvNorm(3, 4, 3, padding=1, image_size=(8, 8), key=key)
        self.head = eqx.nn.Linear(4, 5, key=key)

    def __call__(self, x, state):
        x, state = self.layer(x, state)
        return self.head(x.mean((1, 2))), state


def stateless():
    keys = jax.random.split(jax.random.key(0))
    return eqx.nn.Sequential(
        [eqx.nn.Conv2d(3, 4, 3, key=keys[0]), eqx.nn.Lambda(lambda x: x.mean((1, 2))), eqx.nn.Linear(4, 5, key=keys[1])]
    )


def by_hand(name):
    """(net, its logits of `IMAGES` computed without `as_logits_fn`)"""
    if name == 'function':
        return (lambda x: x.mean((1, 2))), IMAGES.mean((1, 2))
    if name == 'linen':
        model = create_model('simple_cnn', num_classes=5, layer='batchnorm', width=4, depth=(1,))
        variables = model.init(jax.random.key(0), IMAGES)
        return (model, variables), model.apply(variables, IMAGES, train=False)
    if name.startswith('nnx'):
        net = nnx_net()
        net.eval()
        return net if name == 'nnx' else nnx.split(net), net(jnp.asarray(IMAGES))
    if name == 'equinox':
        net = stateless()
        return net, jnp.stack([net(x) for x in IMAGES.transpose(0, 3, 1, 2)])
    net, state = eqx.nn.make_with_state(Stateful)(jax.random.key(0))
    net = eqx.nn.inference_mode(net)
    return (net, state), jnp.stack([net(x, state)[0] for x in IMAGES.transpose(0, 3, 1, 2)])


@pytest.mark.parametrize('name', ['function', 'linen', 'nnx', 'nnx, split', 'equinox', 'equinox with state'])
def test_logits_are_those_of_the_net(name):
    net, expected = by_hand(name)
    logits_fn = as_logits_fn(net)
    np.testing.assert_allclose(jax.jit(lambda f, x: f(x))(logits_fn, IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert as_logits_fn(logits_fn) is logits_fn
    # The arrays of a net are arguments of a program, not constants in it.
    assert name == 'function' or sum(np.size(leaf) for leaf in jax.tree.leaves(logits_fn)) > 20


def test_a_net_in_training_mode_is_refused():
    with pytest.raises(UserError, match=r'training mode \(use_running_average=False\); call net.eval'):
        as_logits_fn(nnx_net())
    net = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=r'training mode \(deterministic=False\)'):
        as_logits_fn(nnx.split(net))
    with pytest.raises(UserError, match=r'a ConvNorm is in training mode .* eqx.nn.inference_mode'):
        as_logits_fn(eqx.nn.make_with_state(Stateful)(jax.random.key(0)))
    with pytest.raises(UserError, match=r'a Dropout is in training mode'):
        as_logits_fn(eqx.nn.Sequential([eqx.nn.Dropout(0.5)]))


@pytest.mark.parametrize(
    ('net', 'words'), [(nn.Dense(3), 'without its variables'), (3, 'net is a int: expected'), (((1, 2), 3), 'tuple')]
)
def test_what_is_no_net(net, words):
    with pytest.raises(UserError, match=words):
        as_logits_fn(net)
