"""Each geometry of the libraries' convolutions: `convnormalize` filters what the library computes, as NumPy does."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convnorm_jax.nnx

eqx = pytest.importorskip('equinox')
from convnorm_jax import equinox as convnorm_eqx  # noqa: E402
from tests.selection import few  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compilation')

# name: (size, kernel size, NNX's arguments)
NNX = {
    'same': ((6, 7), (3, 3), {}),
    'same_even_strided': ((7, 6), (4, 2), {'strides': (2, 3)}),
    'valid': ((6, 7), (3, 2), {'padding': 'VALID', 'strides': None}),
    'same_lower': ((7, 6), (4, 2), {'strides': (2, 1), 'padding': 'SAME_LOWER'}),
    'small_letters': ((6, 7), (3, 3), {'padding': 'same', 'strides': 2}),
    'pairs': ((6, 7), (4, 3), {'padding': [(3, 1), 2], 'strides': 2}),
    'dilated': ((8, 8), (3, 3), {'padding': 2, 'kernel_dilation': 2}),
    'groups': ((5, 5), (3, 3), {'feature_group_count': 2}),
    'depthwise': ((5, 5), (3, 3), {'feature_group_count': 4, 'strides': 2}),
    'pointwise': ((5, 5), (1, 1), {'strides': 2}),
    'circular': ((6, 7), (3, 4), {'padding': 'CIRCULAR', 'strides': 2}),
    'sequence': ((9,), 3, {'strides': 2}),
    'volume': ((4, 3, 5), (3, 2, 3), {}),
    'up_same': ((4, 5), (4, 4), {'strides': (2, 2)}),
    'up_same_odd': ((4, 5), (3, 5), {'strides': (2, 2)}),
    'up_valid': ((4, 5), (3, 3), {'strides': (2, 1), 'padding': 'VALID'}),
    'up_pairs': ((4, 5), (3, 3), {'strides': (2, 2), 'padding': [(1, 2), (0, 2)]}),
    'up_dilated': ((4, 5), (2, 3), {'strides': (2, 2), 'kernel_dilation': (2, 1), 'padding': 'VALID'}),
    'up_transposed_kernel': ((4, 5), (3, 4), {'strides': (2, 2), 'transpose_kernel': True}),
    'up_sequence': ((5,), (4,), {'strides': 2}),
}
# name: (size, kernel size, Equinox's arguments)
EQUINOX = {
    'none': ((6, 7), (3, 2), {}),
    'same_even_strided': ((7, 6), (4, 2), {'stride': (2, 3), 'padding': 'SAME'}),
    'same_lower': ((7, 6), (4, 2), {'stride': (2, 1), 'padding': 'SAME_LOWER'}),
    'pairs': ((6, 7), (4, 3), {'padding': [(3, 1), (2, 2)], 'stride': 2}),
    'dilated': ((8, 8), (3, 3), {'padding': 2, 'dilation': 2}),
    'depthwise': ((5, 5), (3, 3), {'groups': 4, 'padding': 1}),
    'pointwise': ((5, 5), (1, 1), {'stride': 2}),
    'circular': ((6, 7), (3, 5), {'padding': (1, 2), 'padding_mode': 'CIRCULAR', 'stride': 2}),
    'circular_same': ((6, 7), (4, 3), {'padding': 'SAME', 'padding_mode': 'CIRCULAR'}),
    'mode_without_padding': ((6, 7), (3, 3), {'padding_mode': 'REFLECT'}),
    'sequence': ((9,), (3,), {'padding': 1}),
    'volume': ((4, 3, 5), (3, 2, 3), {'padding': 1}),
    'up': ((4, 5), (4, 3), {'stride': 2, 'padding': 1}),
    'up_none': ((4, 5), (3, 3), {'stride': (2, 1)}),
    'up_output_padding': ((4, 5), (3, 3), {'stride': 2, 'padding': 1, 'output_padding': 1}),
    'up_same': ((4, 5), (4, 3), {'stride': 2, 'padding': 'SAME'}),
    'up_same_lower': ((4, 5), (4, 3), {'stride': (2, 1), 'padding': 'SAME_LOWER'}),
    'up_valid': ((4, 5), (3, 3), {'stride': 2, 'padding': 'VALID'}),
    'up_groups_dilated': ((4, 5), (3, 2), {'stride': 2, 'groups': 2, 'dilation': 2}),
    'up_sequence': ((5,), (4,), {'stride': 2, 'padding': 1}),
}


def filtered(full, kernel, spans):
    """irfft(V * rfft(full)) over the spatial axes; kernel [*k, cin / groups, cout], V of its dilated taps."""
    axes, grid = tuple(range(1, full.ndim - 1)), full.shape[1:-1]
    taps = np.zeros((*grid, *kernel.shape[-2:]))
    steps = [(s - 1) // (k - 1) if k > 1 else 1 for s, k in zip(spans, kernel.shape)]
    for tap in itertools.product(*map(range, kernel.shape[:-2])):
        taps[tuple(t * s % n for t, s, n in zip(tap, steps, grid))] += kernel[tap]
    power = (np.abs(np.fft.fftn(taps, axes=tuple(range(len(grid))))) ** 2).sum(-2)
    v = power[..., : grid[-1] // 2 + 1, :] ** -0.5
    return np.fft.irfftn(np.fft.rfftn(full, axes=axes) * v, s=grid, axes=axes)


def window(full, part, strides, circular):
    """The indices of `part` in `full` along each axis, found by trying."""
    found = []
    for starts in itertools.product(*(range(n) for n in full.shape[1:-1])):
        places = [[start + s * i for i in range(n)] for start, s, n in zip(starts, strides, part.shape[1:-1])]
        if circular:
            places = [[p % n for p in axis] for axis, n in zip(places, full.shape[1:-1])]
        elif any(axis[-1] >= n for axis, n in zip(places, full.shape[1:-1])):
            continue
        if np.allclose(full[np.ix_(range(len(full)), *places, range(full.shape[-1]))], part, atol=1e-5):
            found.append(places)
    assert len(found) == 1
    return np.ix_(range(len(full)), *found[0], range(full.shape[-1]))


def check(y, part, full, kernel, spans, strides, circular=False):
    part, full, kernel = (np.asarray(a, np.float64) for a in (part, full, kernel))
    expected = filtered(full, kernel, spans)[window(full, part, strides, circular)]
    assert y.shape == part.shape
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())


def images(size):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 4)), jnp.float32)


def ones(value, rank):
    return value if isinstance(value, tuple) else (value or 1,) * rank


SOME = (
    'valid',
    'same_even_strided',
    'depthwise',
    'circular',
    'volume',
    'up',
    'up_pairs',
    'up_same',
    'up_transposed_kernel',
)


@pytest.mark.parametrize('name', few(NNX, *SOME))
def test_nnx(name):
    size, kernel_size, options = NNX[name]
    up, x, rank = name.startswith('up'), images(size), len(size)
    kind = nnx.ConvTranspose if up else nnx.Conv
    conv = kind(4, 8, kernel_size, use_bias=False, **options, rngs=nnx.Rngs(0))
    layer, report = convnorm_jax.nnx.convnormalize(conv, x, rngs=nnx.Rngs(1), use_affine=False)
    assert report.replaced, str(report)
    full, circular = nnx.clone(conv), conv.padding == 'CIRCULAR'
    spans = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, ones(conv.kernel_dilation, rank))]
    if not up:
        full.strides = 1
    if not circular:
        full.padding = [(k - 1, k - 1) for k in spans]
    kernel = conv.kernel[...]
    if options.get('transpose_kernel'):
        kernel = kernel.swapaxes(-1, -2)
    steps = (1,) * rank if up else ones(conv.strides, rank)
    check(layer(x), conv(x), full(x), kernel, spans, steps, circular)


@pytest.mark.parametrize('name', few(EQUINOX, *SOME))
def test_equinox(name):
    size, kernel_size, options = EQUINOX[name]
    up, rank = name.startswith('up'), len(size)
    x = jnp.moveaxis(images(size), -1, 1)
    kind = eqx.nn.ConvTranspose if up else eqx.nn.Conv
    conv = kind(rank, 4, 8, kernel_size, use_bias=False, **options, key=jax.random.key(0))
    layer, state, report = convnorm_eqx.convnormalize(conv, None, x, key=jax.random.key(1), use_affine=False)
    assert report.replaced and state is None, str(report)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, conv.dilation)]
    changed, circular = {'stride': 1}, name.startswith('circular')
    if up:
        changed = {'padding': 0, 'output_padding': 0}
    elif not circular:
        changed |= {'padding': [(k - 1, k - 1) for k in spans], 'padding_mode': 'ZEROS'}
    full = kind(rank, 4, 8, kernel_size, use_bias=False, **{**options, **changed}, key=jax.random.key(0))
    run = lambda layer: jnp.moveaxis(jax.vmap(layer)(x), 1, -1)
    kernel = np.moveaxis(np.asarray(conv.weight), (0, 1), (-1, -2))
    steps = (1,) * rank if up else conv.stride
    check(run(layer), run(conv), run(full), kernel, spans, steps, circular)


REFUSED = {
    'reflected': (False, {'padding': 1, 'padding_mode': 'REFLECT'}, "padding_mode='REFLECT'"),
    'circular': (False, {'padding': 2, 'padding_mode': 'CIRCULAR'}, r'that of a ConvNorm is \[\(1, 1\), \(1, 1\)\]'),
    'wide': (False, {'padding': 3}, 'expected between 0 and kernel_size - 1'),
    'up_circular': (True, {'padding': 'SAME', 'padding_mode': 'CIRCULAR'}, "'CIRCULAR' of a transposed convolution"),
    'up_beyond': (True, {'stride': 4, 'output_padding': 3}, 'beyond the full transposed convolution'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_equinox_refused(name):
    up, options, reason = REFUSED[name]
    make = eqx.nn.ConvTranspose2d if up else eqx.nn.Conv2d
    conv = make(4, 4, 3, **options, key=jax.random.key(0))
    x = jnp.moveaxis(images((6, 6)), -1, 1)
    new, _, report = convnorm_eqx.convnormalize(conv, None, x, key=jax.random.key(1))
    assert type(new) is type(conv) and not report.replaced
    assert re.search(reason, report.left[0].reason)


def test_no_geometry_has_a_wrong_crop_of_same():
    """SAME of transposed convolutions is computed by each library itself; ours must crop the same for any stride."""
    for k, s in itertools.product(range(1, 6), range(1, 6)):
        conv = nnx.ConvTranspose(1, 1, (k,), strides=s, rngs=nnx.Rngs(0))
        x = jax.ShapeDtypeStruct((1, 4, 1), jnp.float32)
        new, report = convnorm_jax.nnx.convnormalize(conv, x, rngs=nnx.Rngs(1), use_affine=False)
        assert bool(report.replaced) == (s <= k), (k, s)
        assert jax.eval_shape(new, x).shape == (1, 4 * s, 1)
