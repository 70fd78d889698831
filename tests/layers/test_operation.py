"""The forms of ConvNorm's operation agree: those of an accelerator, too, run here on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import ConvNorm, ConvNormTranspose
from convnorm_jax.layers import (
    channelwise,
    channelwise_norm,
    convolution,
    derivatives,
    filters,
    materialize,
    operation,
    reference,
    spectral,
)
from convnorm_jax.layers import geometry as geometry_of
from convnorm_jax.layers.method import METHODS
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of_convolution(size, kernel_size=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1))):
    return geometry_of.of_convolution(size, kernel_size, strides, padding)


def of_transposed(size, kernel_size=(4, 4), strides=(2, 2), padding=((1, 1), (1, 1))):
    return geometry_of.of_transposed_convolution(size, kernel_size, strides, padding)


GEOMETRIES = {
    'dense': of_convolution((7, 6)),
    'separable': of_convolution((9, 12)),
    'strided': of_convolution((9, 8), strides=(2, 2)),
    'even kernel': of_convolution((6, 9), (2, 4), (1, 2), ((0, 1), (3, 0))),
    'flat kernel': of_convolution((8, 9), (1, 3), (2, 1), ((0, 0), (2, 0))),
    'wide kernel': of_convolution((7, 7), (5, 5), padding=((4, 1), (0, 2))),
    'one row': of_convolution((1, 8), padding=((2, 2), (1, 1))),
    'transposed': of_transposed((4, 5)),
    'transposed, odd': of_transposed((5, 3), (3, 3), (2, 1), ((1, 0), (1, 1))),
    'transposed, gaps': of_transposed((3, 4), (2, 2), (3, 3), ((0, 0), (0, 0))),
    'transposed, stride 1': of_transposed((5, 5), (3, 3), (1, 1)),
    'transposed, one row': of_transposed((1, 6)),
}
FORMS = {
    'accelerator': operation._Spatial,
    'spatial on the CPU': operation._SpatialOnCpu,
    'frequency': operation._Frequency,
}


@functools.lru_cache
def case(name, dtype):
    """(x, kernel, v, cotangent; output and both gradients of the reference in float32, by JAX)."""
    geometry = GEOMETRIES[name]
    x = jnp.asarray(random(0, 3, *map(len, geometry.inputs), 4), dtype)
    kernel = jnp.asarray(random(1, *map(len, geometry.taps), 4, 5))
    v = spectral.preconditioner(kernel, geometry.grid, lambda k, _: reference.power_spectrum(k, geometry))
    cotangent = jnp.asarray(random(2, 3, *map(len, geometry.kept), 5), dtype)

    @jax.jit
    def exact(x, kernel, cotangent):
        function = lambda x, kernel: operation.normalized_convolution(x, kernel, v, geometry, 'reference')
        y, back = jax.vjp(function, x.astype(jnp.float32), kernel)
        return y, *back(cotangent.astype(jnp.float32))

    return (x, kernel, v, cotangent), exact(x, kernel, cotangent)


def error(found, expected):
    """Root mean square of the difference, of that of the expected."""
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    assert found.shape == expected.shape
    return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))


@pytest.mark.covering(1)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', GEOMETRIES)
# bfloat16 rounds to 2^-9 = 0.2 %: x or the cotangent (exact here), the kernel, two or three products, V weighs them.
@pytest.mark.parametrize('dtype,tolerance', [('float32', 1e-5), ('bfloat16', 0.015)])
def test_forms_agree_with_the_reference(name, form, dtype, tolerance):
    (x, kernel, v, cotangent), (y, by_x, by_kernel) = case(name, dtype)
    geometry, form = GEOMETRIES[name], FORMS[form]

    @jax.jit
    def results(x, kernel, cotangent):
        gradients = lambda *wanted: form.gradients(x, kernel, v, cotangent, wanted, geometry, None)
        return form.forward(x, kernel, v, geometry, None), gradients(0, 1), gradients(0), gradients(1)

    found, both, *alone = results(x, kernel, cotangent)
    assert found.dtype == dtype and error(found, y) < tolerance
    assert [g.dtype for g in both] == [x.dtype, kernel.dtype]
    assert error(both[0], by_x) < tolerance and error(both[1], by_kernel) < tolerance
    for i in (0, 1):
        assert error(alone[i][0], both[i]) < 1e-6 or dtype == 'bfloat16'


@pytest.mark.parametrize('name', GEOMETRIES)
def test_power_spectra_agree(name):
    geometry = GEOMETRIES[name]
    kernel = jnp.asarray(random(3, *map(len, geometry.taps), 3, 4))

    @jax.jit
    def spectra(kernel):
        return (
            reference.power_spectrum(kernel, geometry),
            filters.power_spectrum(kernel, geometry.grid),
            spectral.power_spectrum(kernel, geometry.grid),
            operation.frequency.power_spectrum(kernel, geometry),
        )

    exact, *others = spectra(kernel)
    assert all(error(other, exact) < 1e-6 for other in others)


# --- the whole layer, as an accelerator computes it ----------------------------------------------------------------


@pytest.fixture(params=['gpu', 'tpu'])
def as_on_an_accelerator(request, monkeypatch):
    """A function after whose call each choice by platform takes the form of a GPU or a TPU, all being traced again."""
    is_tpu = request.param == 'tpu'

    def form(*arguments, cpu, accelerator, tpu=None):
        del cpu
        return (tpu if is_tpu and tpu is not None else accelerator)(*arguments)

    forget = (operation._rule, channelwise_norm._rule, convolution._pointwise, derivatives._differentiable)

    def clear():
        for cached in forget:
            cached.cache_clear()
        jax.clear_caches()

    def switch():
        clear()
        for module in (operation, channelwise, channelwise_norm, derivatives, filters, materialize):
            monkeypatch.setattr(module, 'by_platform', form)

    yield switch
    monkeypatch.undo()
    clear()


LAYERS = {
    'convolution': functools.partial(ConvNorm, 5, (3, 3), (2, 1), 1),
    'even kernels': functools.partial(ConvNorm, 5, (2, 4), padding=1),
    '1x1': functools.partial(ConvNorm, 5, (1, 1), (2, 2)),
    '1x1 without BatchNorm': functools.partial(ConvNorm, 5, (1, 1), (2, 2), use_batch_norm=False),
    'transposed': functools.partial(ConvNormTranspose, 5, (4, 4), (2, 2)),
    'transposed without BatchNorm': functools.partial(ConvNormTranspose, 5, (3, 3), (1, 2), use_batch_norm=False),
}


def results(layer, variables, x):
    """Output, statistics and gradients of a pass in training."""

    @jax.jit
    def run(params, x):
        def output(params, x):
            return layer.apply({**variables, 'params': params}, x, False, mutable=['batch_stats'])

        y, back, update = jax.vjp(output, params, x, has_aux=True)
        return y, update, back(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

    return run(variables['params'], x)


def with_variables(name, method, dtype):
    layer, x = LAYERS[name](method=method, dtype=dtype), jnp.asarray(random(4, 4, 7, 6, 3))
    variables = jax.jit(lambda x: layer.init(jax.random.key(0), x, True))(x)
    shaken = jax.tree.map(lambda p: p + 0.1 * random(5, *p.shape), variables['params'])
    return layer, {**variables, 'params': shaken}, x


@pytest.mark.covering(1)
@pytest.mark.parametrize('name', few(LAYERS, 'convolution', '1x1', 'transposed'))
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_the_layer_of_an_accelerator(name, dtype, as_on_an_accelerator):
    expected = results(*with_variables(name, 'reference', None))
    as_on_an_accelerator()
    text = (
        jax.jit(lambda v, x: with_variables(name, None, dtype)[0].apply(v, x, True))
        .lower(*with_variables(name, None, dtype)[1:])
        .as_text()
    )
    assert 'stablehlo.convolution' in text and 'fft' not in text
    found = results(*with_variables(name, None, dtype))
    assert found[0].dtype == (dtype or 'float32')
    # What is left of sums that cancel, as a 1x1 filter's gradient in front of BatchNorm: on the scale of the largest.
    size = lambda a: np.sqrt(np.mean(np.square(np.asarray(a, np.float64))))
    largest = max(size(g) for g in jax.tree.leaves(expected[2][0]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        scale = size(b) if size(b) > 0.05 * largest else 0.5 * largest
        assert size(difference) < (0.04 if dtype else 1e-5) * scale


# --- normalization after the channel-wise convolution --------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (2, 4), (4, 1)], ids=str)
@pytest.mark.parametrize('circular', [False, True])
@pytest.mark.parametrize('dtype,tolerance', [('float32', 2e-5), ('bfloat16', 0.01)])
def test_the_forms_of_the_normalization(kernel_size, circular, dtype, tolerance, as_on_an_accelerator):
    z = jnp.asarray(1 + random(6, 4, 6, 5, 3), dtype)
    others = [jnp.asarray(random(7, *kernel_size, 3)), *(jnp.asarray(1 + 0.3 * random(i, 3)) for i in (8, 9, 10))]

    @jax.jit
    def ordinary(z, *others):
        function = channelwise_norm._rule(1e-5, 'float32', circular).ordinary
        exact, back = jax.vjp(function, z.astype(jnp.float32), *others)
        cotangents = [jnp.asarray(random(11 + i, *y.shape)) for i, y in enumerate(exact)]
        return exact, cotangents, back(tuple(cotangents))

    exact, cotangents, expected = jax.device_get(ordinary(z, *others))
    on_the_cpu = jax.jit(channelwise_norm._rule(1e-5, dtype, circular).function)(z, *others)
    as_on_an_accelerator()
    accelerated = jax.jit(channelwise_norm._rule(1e-5, dtype, circular).function)(z, *others)
    for outputs in (on_the_cpu, accelerated):
        assert outputs[0].dtype == dtype and all(error(a, b) < tolerance for a, b in zip(outputs, exact))
    given = (z, *others, *exact[1:], jnp.asarray(cotangents[0], dtype), *cotangents[1:])
    largest = max(np.abs(g).max() for g in expected)
    each = (0, 1, 2, 3, 4), (0,), (1, 3)
    for form in (channelwise_norm._gradients, channelwise_norm._gradients_cpu):
        results = jax.jit(lambda *a, form=form: [form(wanted, 1e-5, circular, *a) for wanted in each])(*given)
        for wanted, found in zip(each, results):
            for i, gradient in zip(wanted, found, strict=True):
                scale = max(np.abs(expected[i]).max(), 0.01 * largest)
                assert gradient.dtype == (z, *others)[i].dtype
                assert np.abs(np.asarray(gradient, np.float64) - expected[i]).max() < 3 * tolerance * scale


def test_every_method_has_a_form_for_every_platform():
    assert set(METHODS) == {'reference', *operation._CPU} == {'reference', *operation._ACCELERATOR}
