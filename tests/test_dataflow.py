"""The flow between layers, read off jaxprs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from convnorm_jax import dataflow
from convnorm_jax.dataflow import Call, mark

X = jnp.ones((2, 3))
CONV, NORM, OTHER = 0, 1, 2


def conv(x, layer=CONV):
    return mark(2 * x, Call(layer, x.shape, x.shape))


def norm(x, layer=NORM):
    return 3 * mark(x, Call(layer, x.shape))


def flow(function):
    return dataflow.trace(function, X)


@jax.custom_vjp
def with_own_gradient(x):
    return norm(x)


with_own_gradient.defvjp(lambda x: (norm(x), None), lambda _, g: (g,))


@jax.custom_jvp
def with_own_tangent(x):
    return norm(x)


with_own_tangent.defjvp(lambda x, t: (norm(*x), t[0]))

FOLLOWS = {
    'directly': lambda x: norm(conv(x)),
    'cast': lambda x: norm(conv(x).astype(jnp.float16)),
    'jit': lambda x: norm(jax.jit(conv)(x)),
    'two jits': lambda x: jax.jit(norm)(jax.jit(jax.jit(conv))(x)),
    'vmap': lambda x: jax.vmap(norm)(jax.vmap(conv)(x)),
    'vmap of another axis': lambda x: jax.vmap(norm, 1, 1)(conv(x)),
    'remat': lambda x: jax.checkpoint(norm)(conv(x)),
    'custom vjp': lambda x: with_own_gradient(conv(x)),
    'custom jvp': lambda x: with_own_tangent(conv(x)),
    'gradient': lambda x: jax.grad(lambda x: norm(conv(x)).sum())(x),
    'in a branch': lambda x: jax.lax.cond(x.sum() > 0, lambda x: norm(conv(x)), lambda x: x, x),
    'named': lambda x: norm(checkpoint_name(conv(x), 'y')),
    'shape only': lambda x: norm(y := conv(x)) * y.shape[0],
}
APART = {
    'an operation between': lambda x: norm(conv(x) + 1),
    'the other way round': lambda x: conv(norm(x)),
    'another layer between': lambda x: norm(norm(conv(x), OTHER)),
    'into a branch': lambda x: jax.lax.cond(x.sum() > 0, norm, lambda x: x, conv(x)),
    'through a loop': lambda x: norm(jax.lax.scan(lambda c, _: (c + 1, None), conv(x), None, length=2)[0]),
}


@pytest.mark.parametrize('name', FOLLOWS)
def test_follows(name):
    found = flow(FOLLOWS[name])
    assert found.once(CONV) and found.once(NORM)
    assert found.source(NORM) == CONV and found.uses(CONV) == 1
    assert all(len(call.input) == (1 if name.startswith('vmap') else 2) for call in found.calls[NORM])


@pytest.mark.parametrize('name', APART)
def test_apart(name):
    assert flow(APART[name]).source(NORM) is None


def test_uses():
    assert flow(lambda x: norm(y := conv(x)) + y).uses(CONV) == 2
    assert flow(lambda x: (norm(y := conv(x)), y)).uses(CONV) == 2  # a result of the model
    assert flow(lambda x: (norm(y := conv(x)), jax.jit(lambda x, y: x)(x, y))).uses(CONV) == 1
    assert flow(lambda x: (norm(y := conv(x)), jax.lax.cond(True, jnp.sin, jnp.cos, y))).uses(CONV) == 2
    assert flow(lambda x: norm(conv(x)) + x).uses(CONV) == 1


def test_calls():
    jitted = jax.jit(conv)  # one jaxpr for both
    assert len(flow(lambda x: jitted(x) + jitted(x)).calls[CONV]) == 2
    loop = lambda x: jax.lax.fori_loop(0, 2, lambda _, x: conv(x), x)
    assert not flow(loop).once(CONV)
    assert not flow(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: norm(conv(x)), x)).once(NORM)
    found = flow(lambda x: jax.lax.cond(x.sum() > 0, conv, functools.partial(conv, layer=OTHER), x))
    assert found.once(CONV) and found.once(OTHER) and not found.once(NORM)


def test_a_mark_changes_nothing():
    call = Call(0, X.shape)
    f = lambda x: (mark(x, call) ** 2).sum()
    np.testing.assert_array_equal(jax.grad(f)(X), 2 * X)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: mark(x, call)))(X), X)
    np.testing.assert_array_equal(jax.hessian(f)(X[0]), 2 * jnp.eye(3))
