"""The layer under JAX's transformations: derivatives of every mode and order, vmap, remat, scan, pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from convnorm_jax import ConvNorm, ConvNormTranspose
from convnorm_jax.layers import derivatives, reference, spectral
from convnorm_jax.layers.channelwise import channelwise_convolution
from convnorm_jax.layers.method import METHODS
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

EVERY = (None, *METHODS)
SIZE, CIN = (5, 4), 2
LAYERS = {
    'convolution': functools.partial(ConvNorm, 3, (3, 3), (2, 1), 1),
    'even kernel': functools.partial(ConvNorm, 3, (2, 4), padding=1),
    'transposed': functools.partial(ConvNormTranspose, 3, (4, 3), (2, 1)),
    '1x1': functools.partial(ConvNorm, 3, (1, 1), (2, 2)),
}


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def outputs(layer, variables, params, x):
    """Of a pass in training."""
    return layer.apply({**variables, 'params': params}, x, False, mutable=['batch_stats'])[0]


def plain(layer, params, x):
    """The same from ordinary operations alone, which JAX differentiates."""
    kernel = params['kernel']
    size, geometry = kernel.shape[:2], layer.settings.geometry(x.shape[1:3])
    v = spectral.preconditioner(kernel, geometry.grid, lambda k, _: reference.power_spectrum(k, geometry))
    y = reference.normalized_convolution(x, kernel, v, geometry)
    pads = [((k - 1) // 2, k // 2) for k in size]
    y = jax.lax.conv_general_dilated(
        y, params['affine_kernel'], (1, 1), pads, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=layer.features,
    )  # fmt: skip
    y = y + params['affine_bias']
    y = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + layer.batch_norm_epsilon)
    return y * params['batch_norm']['scale'] + params['batch_norm']['bias']


@functools.lru_cache
def case(name, method):
    """(outputs of params and x, the same by `plain`, params, x)."""
    layer = LAYERS[name](method=method)
    x = random(0, 3, *SIZE, CIN)
    variables = jax.jit(lambda x: layer.init(jax.random.key(1), x, True))(x)
    params = jax.tree.map(lambda p: p + 0.1 * random(2, *p.shape), variables['params'])
    return functools.partial(outputs, layer, variables), functools.partial(plain, layer), params, x


def close(found, expected, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = max(1.0, float(np.abs(np.asarray(b, np.float64)).max()))
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance * scale)


def loss(function, params, x):
    y = function(params, x)
    return (jnp.sin(y) * random(3, *y.shape)).sum()


# --- every mode ----------------------------------------------------------------------------------------


def modes(function, params, x):
    """Output, jvp, gradient, jvp of the gradient (a Hessian-vector product), gradient of the jvp."""
    direction = jax.tree.map(lambda p: random(4, *p.shape), (params, x))
    gradient = jax.grad(functools.partial(loss, function), (0, 1))
    along = lambda params, x: jax.jvp(functools.partial(loss, function), (params, x), direction)[1]
    return {
        'jvp': jax.jvp(function, (params, x), direction),
        'gradient': gradient(params, x),
        'forward over reverse': jax.jvp(gradient, (params, x), direction)[1],
        'reverse over forward': jax.grad(along, (0, 1))(params, x),
    }


@pytest.mark.covering(1)
@pytest.mark.parametrize('name', few(LAYERS, 'convolution', 'transposed'))
@pytest.mark.parametrize('method', few(EVERY, None, 'spatial'))
def test_every_mode(name, method):
    ours, ordinary, params, x = case(name, method)
    found, expected = (jax.jit(functools.partial(modes, f))(params, x) for f in (ours, ordinary))
    for mode in expected:
        close(found[mode], expected[mode], 3e-4 if 'over' in mode else 5e-5)


class Small(nn.Module):
    """Two layers and a sum: few enough parameters for a whole Hessian."""

    method: str | None

    @nn.compact
    def __call__(self, x, train):
        x = jnp.tanh(ConvNorm(2, (2, 2), padding=1, method=self.method)(x, not train))
        return ConvNorm(1, (1, 1), use_batch_norm=False, method=self.method)(x, not train).mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize('method', few(EVERY, None))
def test_hessian_and_jacobians(method):
    net, x = Small(method), random(5, 2, 3, 3, 1)
    variables = jax.jit(lambda x: net.init(jax.random.key(0), x, False))(x)
    flat, back = ravel_pytree(variables['params'])
    function = lambda flat: net.apply({**variables, 'params': back(flat)}, x, True, mutable=['batch_stats'])[0]
    value = lambda flat: jnp.square(function(flat)).sum()

    @jax.jit
    def derivatives(flat):
        hessians = jax.hessian(value)(flat), jax.jacrev(jax.grad(value))(flat)
        return *hessians, jax.jacfwd(function)(flat), jax.jacrev(function)(flat), function(flat), jax.grad(value)(flat)

    hessian, by_reverse, forward, reverse, y, gradient = derivatives(flat)
    close(hessian, hessian.T)
    assert np.abs(hessian).max() > 0.1
    close(hessian, by_reverse)
    close(forward, reverse)
    close(gradient, 2 * y @ forward)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('name', ['convolution', 'transposed'])
@pytest.mark.parametrize('method', few(EVERY, None))
def test_check_grads_in_float64(name, method):
    # Issue 13.9: numerical differences in float64 agree to 1e-6 only if nothing on the way is float32.
    with jax.enable_x64(True):
        layer = LAYERS[name](method=method, param_dtype=jnp.float64)
        x = jnp.asarray(np.random.default_rng(6).standard_normal((2, *SIZE, CIN)))
        variables = layer.init(jax.random.key(1), x, True)
        v = variables['params']

        def function(x, affine_kernel, scale):  # V is a constant to differentiation, so not of the kernel
            params = {**v, 'affine_kernel': affine_kernel, 'batch_norm': {**v['batch_norm'], 'scale': scale}}
            return outputs(layer, variables, params, x)

        arguments = x, v['affine_kernel'], v['batch_norm']['scale']
        check_grads(jax.jit(function), arguments, order=1, modes=['fwd'], atol=1e-7, rtol=1e-7, eps=1e-5)
        check_grads(jax.jit(function), arguments, order=2, modes=['rev'], atol=1e-6, rtol=1e-6, eps=1e-5)


def test_the_gradient_is_the_one_written_by_hand():
    # Once in reverse, whatever comes before or after; forward mode does not touch it.
    calls = []

    def gradient(arguments, kept, cotangents, wanted):
        calls.append(wanted)
        return [{0: 2 * cotangents[0], 1: 3 * cotangents[0]}[i] for i in wanted]

    rule = derivatives.Rule(lambda x, y: (2 * x + 3 * y,), gradient, lambda x, y: (2 * x + 3 * y,))
    function = lambda x, y: derivatives.call(rule, x, y)[0]
    assert jax.grad(function, (0, 1))(1.0, 1.0) == (2, 3) and calls == [(0, 1)]
    assert jax.grad(function, 1)(1.0, 1.0) == 3 and calls == [(0, 1), (1,)]
    assert jax.jvp(function, (1.0, 1.0), (1.0, 1.0)) == (5, 5) and len(calls) == 2


# --- other transformations --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('name', ['convolution', 'transposed'])
@pytest.mark.parametrize('method', EVERY)
def test_gradients_of_each_example(name, method):
    layer, x = LAYERS[name](method=method), random(7, 3, *SIZE, CIN)
    variables = jax.jit(lambda x: layer.init(jax.random.key(1), x, True))(x)

    def gradient(params, x):  # at inference, as an example alone has no statistics
        value = lambda params: jnp.square(layer.apply({**variables, 'params': params}, x[None], True)).sum()
        return jax.grad(value)(params)

    found = jax.jit(jax.vmap(gradient, (None, 0)))(variables['params'], x)
    close(found, jax.tree.map(lambda *g: jnp.stack(g), *(jax.jit(gradient)(variables['params'], a) for a in x)))


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('name', ['convolution', 'even kernel'])
@pytest.mark.parametrize('method', EVERY)
def test_an_ensemble_of_parameters(name, method):
    function, _, params, x = case(name, method)
    several = jax.tree.map(lambda p: jnp.stack([p, p + 0.3 * random(8, *p.shape)]), params)
    alone = [jax.tree.map(lambda p, i=i: p[i], several) for i in range(2)]
    gradient = jax.value_and_grad(functools.partial(loss, function), (0, 1))
    found = jax.jit(jax.vmap(gradient, (0, None)))(several, x)
    close(found, jax.tree.map(lambda *g: jnp.stack(g), *(jax.jit(gradient)(p, x) for p in alone)))
    # And the derivative of what is mapped: the sum over the ensemble of the gradients with respect to x.
    mapped = jax.grad(lambda x: jax.vmap(functools.partial(loss, function), (0, None))(several, x).sum())
    close(jax.jit(mapped)(x), found[1][1].sum(0))


@pytest.mark.parametrize('method', few(EVERY, None))
def test_jvp_of_what_is_mapped(method):
    function, _, params, x = case('convolution', method)
    several = jnp.stack([x, 2 + random(9, *x.shape)])
    direction = random(10, *several.shape)
    mapped = jax.vmap(functools.partial(function, params))
    found = jax.jit(lambda x: jax.jvp(mapped, (x,), (direction,)))(several)
    alone = jax.jit(lambda x, direction: jax.jvp(functools.partial(function, params), (x,), (direction,)))
    parts = [alone(*pair) for pair in zip(several, direction)]
    close(found, jax.tree.map(lambda *a: jnp.stack(a), *parts))


@pytest.mark.parametrize('method', few(EVERY, None))
def test_jit_checkpoint_and_eager_agree(method):
    function, _, params, x = case('convolution', method)
    gradient = lambda f: jax.value_and_grad(functools.partial(loss, f), (0, 1))
    expected = gradient(function)(params, x)
    close(jax.jit(gradient(function))(params, x), expected)
    close(jax.jit(gradient(jax.checkpoint(function)))(params, x), expected)


class Block(nn.Module):
    """As nn.scan wants it: (carry, input) -> (carry, output)."""

    method: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x, train):
        layer = nn.remat(ConvNorm, static_argnums=(2,)) if self.remat else ConvNorm
        return jnp.tanh(layer(CIN, method=self.method, name='norm')(x, not train)), None


class Scanned(nn.Module):
    method: str | None
    remat: bool

    @nn.compact
    def __call__(self, x, train):
        axes = {'params': 0, 'batch_stats': 0}
        body = nn.scan(Block, variable_axes=axes, split_rngs={'params': True}, in_axes=nn.broadcast, length=3)
        return body(self.method, self.remat, name='block')(x, train)[0]


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('method', EVERY)
def test_layers_in_a_scan(method, remat):
    net, x = Scanned(method, remat), random(11, 2, *SIZE, CIN)
    variables = jax.jit(lambda x: net.init(jax.random.key(0), x, False))(x)

    def by_scan(params, x):
        return net.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])

    def by_loop(params, x):
        updates = []
        for i in range(3):
            one = jax.tree.map(lambda a, i=i: a[i], {**variables, 'params': params})
            one = {name: tree['block'] for name, tree in one.items()}
            (x, _), update = Block(method).apply(one, x, True, mutable=['batch_stats'])
            updates.append(update)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *updates)

    results = []
    for function in (by_scan, by_loop):
        value = lambda params, x, f=function: (jnp.square(f(params, x)[0]).sum(), f(params, x)[1])
        results.append(jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(variables['params'], x))
    close(*results)


def test_pmap():
    function, _, params, _ = case('convolution', None)
    x = random(12, 2, 3, *SIZE, CIN)
    gradient = lambda params, x: jax.lax.pmean(jax.grad(functools.partial(loss, function))(params, x), 'devices')
    found = jax.pmap(gradient, 'devices', in_axes=(None, 0), devices=jax.devices()[:2])(params, x)
    each = [jax.jit(jax.grad(functools.partial(loss, function)))(params, a) for a in x]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    close(found, jax.tree.map(lambda g: jnp.stack([g, g]), mean))


def test_the_channelwise_convolution_in_forward_mode():
    x, kernel = random(13, 2, 4, 5, 3), random(14, 2, 3, 3)
    changed = random(15, *x.shape), random(16, *kernel.shape)
    _, found = jax.jvp(channelwise_convolution, (x, kernel), changed)
    close(found, channelwise_convolution(changed[0], kernel) + channelwise_convolution(x, changed[1]), 1e-6)
