"""The layer of every library under every transformation of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.front_ends.libraries import LIBRARIES, build, images

pytestmark = [pytest.mark.usefixtures('quick_compilation'), pytest.mark.parametrize('library', LIBRARIES)]


@functools.cache
def layer(library, seed=0):
    """3x3, 4 channels to 4, so that layers follow each other."""
    return build(library, 'plain', seed, features=4)


def close(found, expected, tolerance=1e-5):
    """Relative to the largest entry of each array."""
    within = lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(initial=1e-30))
    jax.tree.map(within, found, jax.tree.map(np.asarray, expected))


def each(function, *stacked):
    """function of every first index, stacked: what a mapped one must give."""
    count = len(jax.tree.leaves(stacked)[0])
    results = [function(*jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(count)]
    return jax.tree.map(lambda *a: jnp.stack(a), *results)


def stack(*trees):
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def loss_of(one):
    return lambda params, state, x: jnp.sin(one.apply(params, state, x, True)[0]).sum()


@pytest.mark.covering(1)
@pytest.mark.parametrize('train', [True, False])
def test_jit(library, train):
    one, x = layer(library), images('plain', 0)
    call = lambda *given: one.apply(*given, train)
    close(jax.jit(call)(one.params, one.state, x), call(one.params, one.state, x))


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('train', [True, False])
def test_vmap_over_layers(library, train):
    layers, x = [layer(library, seed) for seed in range(3)], jnp.stack([images('plain', seed) for seed in range(3)])
    given = stack(*(a.params for a in layers)), stack(*(a.state for a in layers)), x
    call = lambda *given: layers[0].apply(*given, train)
    close(jax.vmap(call)(*given), each(call, *given))
    shared = jax.vmap(call, in_axes=(0, 0, None))(*given[:2], x[0])
    close(shared, each(lambda p, s: call(p, s, x[0]), *given[:2]))
    gradients = lambda *given: jax.grad(loss_of(layers[0]))(*given)
    close(jax.vmap(gradients)(*given), each(gradients, *given), 1e-4)


def test_scan_over_layers(library):
    layers, x = [layer(library, seed) for seed in range(3)], images('plain', 0)
    params, state = (stack(*(getattr(a, part) for a in layers)) for part in ('params', 'state'))

    def through(params, x):
        def body(x, given):
            y, changed = layers[0].apply(*given, x, True)
            return jax.nn.relu(y), changed

        return jax.lax.scan(body, x, (params, state))

    y, changed = jax.jit(through)(params, x)
    expected, after = x, []
    for one in layers:
        expected, new = one.apply(one.params, one.state, expected, True)
        expected = jax.nn.relu(expected)
        after.append(new)
    close((y, changed), (expected, stack(*after)))
    gradient = jax.jit(jax.grad(lambda params, x: through(params, x)[0].sum()))(params, x)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient['kernel']))


def test_remat(library):
    one, x = layer(library), images('plain', 0)
    gradients = lambda loss: jax.jit(jax.grad(loss, (0, 2)))(one.params, one.state, x)
    close(gradients(jax.checkpoint(loss_of(one))), gradients(loss_of(one)), 1e-4)


def test_pmap(library):
    one, x = layer(library), jnp.stack([images('plain', seed) for seed in range(2)])
    call = lambda state, x: one.apply(one.params, state, x, True)
    given = stack(one.state, one.state), x
    close(jax.pmap(call, devices=jax.devices()[:2])(*given), each(call, *given))


@pytest.mark.slow
def test_shard_map(library):
    """Two devices, each with its own half of the batch; gradients of the shared parameters are summed."""
    one, x = layer(library), jnp.stack([images('plain', seed) for seed in range(2)])
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    states = stack(one.state, one.state)
    half = lambda params, state, x: one.apply(params, jax.tree.map(lambda a: a[0], state), x, True)[0]
    each_half = jax.shard_map(half, mesh=mesh, in_specs=(P(), P('data'), P('data')), out_specs=P('data'))
    mapped = lambda params: each_half(params, states, x.reshape(-1, *x.shape[2:]))
    close(jax.jit(mapped)(one.params).reshape(x.shape), each(lambda x: half(one.params, states, x), x))
    gradient = jax.jit(jax.grad(lambda params: jnp.sin(mapped(params)).sum()))(one.params)
    both = [jax.grad(loss_of(one))(one.params, one.state, part) for part in x]
    close(gradient, jax.tree.map(jnp.add, *both), 1e-4)


def test_jvp_and_jacfwd(library):
    one, x = layer(library), images('plain', 0, batch=2)
    random = lambda seed, like: jnp.asarray(np.random.default_rng(seed).standard_normal(like.shape), like.dtype)
    output = lambda params, x: one.apply(params, one.state, x, True)[0]
    tangents = jax.tree.map(functools.partial(random, 5), (one.params, x))

    @jax.jit
    def products(params, x):
        y, back = jax.vjp(output, params, x)
        cotangent = random(6, y)
        moved = jax.jvp(output, (params, x), tangents)[1]
        pairs = zip(jax.tree.leaves(back(cotangent)), jax.tree.leaves(tangents))
        return (moved * cotangent).sum(), sum((a * b).sum() for a, b in pairs)

    np.testing.assert_allclose(*products(one.params, x), rtol=1e-3, atol=1e-3)
    of_tap = lambda tap: output({**one.params, 'affine_kernel': one.params['affine_kernel'].at[0, 0].set(tap)}, x)[:, 0]
    forward, backward = jax.jit(lambda tap: (jax.jacfwd(of_tap)(tap), jax.jacrev(of_tap)(tap)))(jnp.ones((1, 4)))
    close(forward, backward, 1e-4)


@pytest.mark.slow
def test_float64(library):
    with jax.enable_x64(True):
        one = build(library, 'plain', param_dtype=jnp.float64)
        exact = build(library, 'plain', param_dtype=jnp.float64, method='reference')
        x = images('plain', 0, dtype=jnp.float64)
        y, state = one.apply(one.params, one.state, x, True)
        assert y.dtype == jnp.float64
        assert {name: value.dtype.name for name, value in state.items()} == {
            'preconditioner': 'float64', 'count': 'float32', 'mean': 'float64', 'var': 'float64',
        }  # fmt: skip
        close((y, state), exact.apply(one.params, one.state, x, True), 1e-11)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('dtype,tolerance', [(jnp.bfloat16, 0.03), (jnp.float16, 0.004)])
def test_half_precision(library, dtype, tolerance):
    """With parameters of that dtype, too: outputs and gradients are of it, statistics stay float32."""
    one, x = layer(library), images('plain', 0)
    expected, wanted = one.apply(one.params, one.state, x, True)
    params = jax.tree.map(lambda a: a.astype(dtype), one.params)
    y, state = one.apply(params, one.state, x.astype(dtype), True)
    assert y.dtype == dtype and {a.dtype for a in state.values()} == {jnp.dtype(jnp.float32)}
    error = lambda a, b: np.sqrt(np.square(np.asarray(a, np.float32) - b).mean() / np.square(np.asarray(b)).mean())
    assert error(y, expected) < tolerance
    assert all(error(state[name], wanted[name]) < tolerance for name in ('preconditioner', 'var'))
    gradient = jax.grad(
        lambda params: one.apply(params, one.state, x.astype(dtype), True)[0].astype(jnp.float32).std()
    )(params)
    assert all(g.dtype == dtype and np.isfinite(np.asarray(g, np.float32)).all() for g in gradient.values())
