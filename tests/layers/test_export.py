"""jax.export: a symbolic batch, and programs for platforms other than the one that traces."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from convnorm_jax import ConvNorm, ConvNormTranspose
from convnorm_jax.layers.method import METHODS
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

LAYERS = {
    'convolution': functools.partial(ConvNorm, 24, (3, 3), (2, 1), 1),
    'transposed': functools.partial(ConvNormTranspose, 24, (4, 4), (2, 2)),
    '1x1': functools.partial(ConvNorm, 24, (1, 1), (2, 2)),
}
SHAPE = (8, 6, 24)


@functools.lru_cache
def program(name, method):
    """(output, update and gradients of a training pass as a function of parameters and x; the parameters)."""
    layer = LAYERS[name](method=method)
    variables = jax.jit(lambda x: layer.init(jax.random.key(0), x, True))(jnp.zeros((1, *SHAPE)))

    def run(params, x):
        def output(params, x):
            return layer.apply({**variables, 'params': params}, x, False, mutable=['batch_stats'])

        y, back, update = jax.vjp(output, params, x, has_aux=True)
        return y, update, back(jnp.sin(3 * y))

    return jax.jit(run), variables['params']


def images(batch):
    return jnp.asarray(np.random.default_rng(0).standard_normal((batch, *SHAPE)).astype(np.float32))


def exported(name, method, platforms, batch='b'):
    run, params = program(name, method)
    shape = export.symbolic_shape(f'{batch}, {", ".join(map(str, SHAPE))}')
    return export.export(run, platforms=platforms)(params, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.covering(1)
@pytest.mark.parametrize('platforms', [('cpu',), ('cpu', 'cuda', 'tpu')], ids=', '.join)
@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('method', [None, *METHODS])
def test_a_symbolic_batch(name, method, platforms):
    run, params = program(name, method)
    there = exported(name, method, platforms)
    assert there.platforms == platforms
    for batch in (8, 9) if len(platforms) == 1 else (9,):
        found, expected = there.call(params, images(batch)), run(params, images(batch))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * max(1, np.abs(b).max()))


def has(module, operation):
    return f'stablehlo.{operation}' in module.mlir_module()


@pytest.mark.covering(1)
@pytest.mark.parametrize('batch', ['b', '16'])
@pytest.mark.parametrize('name', ['convolution', 'transposed'])
def test_a_program_holds_the_form_of_its_platform(name, batch):
    # Traced on this CPU in every case.
    cpu = exported(name, None, ('cpu',), batch)
    assert not has(cpu, 'convolution') and has(cpu, 'dot_general')  # in the frequency domain, this being large enough
    for platform in ('cuda', 'rocm', 'tpu'):
        other = exported(name, None, (platform,), batch)
        assert has(other, 'convolution')
        assert not has(other, 'fft') and not has(cpu, 'fft')
    both = exported(name, None, ('cpu', 'cuda'), batch)
    assert has(both, 'convolution') and has(both, 'case')


@pytest.mark.slow
@pytest.mark.parametrize('name', few(LAYERS, 'convolution'))
def test_a_method_that_was_asked_for_holds_everywhere(name):
    for platform in ('cpu', 'cuda', 'tpu'):
        if name != '1x1':  # whose spectrum is flat: one product by any method
            frequency = exported(name, 'frequency', (platform,))
            assert not has(frequency, 'convolution') and not has(frequency, 'fft')
            assert has(exported(name, 'reference', (platform,)), 'fft')
        assert has(exported(name, 'spatial', (platform,)), 'convolution') or (name, platform) == ('1x1', 'cpu')


@pytest.mark.parametrize('name', few(LAYERS, 'convolution'))
def test_what_only_xla_for_a_cpu_needs_is_in_no_other_program(name):
    # `materialize` divides by a one that the compiler cannot know: x == x ? 1 : NaN.
    unknown_ones = lambda platform: len(
        re.findall(r'stablehlo.compare +EQ, (%\w+), \1,', exported(name, None, (platform,)).mlir_module())
    )
    assert unknown_ones('cuda') == unknown_ones('tpu') == 0 < unknown_ones('cpu')
