"""Every geometry: dimensions, dilation, groups, circular, transposed."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies

from benchmarks import geometries
from convnorm_jax import ConvNorm, ConvNormTranspose, fold_for_inference
from convnorm_jax.errors import UserError
from convnorm_jax.layers import geometry as geometry_of
from convnorm_jax.layers import operation
from convnorm_jax.layers.method import METHODS
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('draws', few([8, 300], 8))
def test_random_geometries_against_dense_matrices(draws):
    """`benchmarks.geometries` draws 5,000."""

    @hypothesis.settings(
        max_examples=draws,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(data=strategies.data())
    def check(data):
        one = geometries.draw(lambda count: data.draw(strategies.integers(0, count - 1)))
        hypothesis.assume(one is not None)
        for name, error in geometries.errors(one).items():
            assert error < geometries.TOLERANCES[one.dtype], (name, error, one)

    check()


# --- without the filter it is flax's convolution --------------------------------------------------

SIZES = {1: ((9,), (3,)), 2: ((7, 9), (3, 2)), 3: ((5, 4, 6), (2, 3, 1))}


@pytest.mark.covering(1)
@pytest.mark.parametrize('padding', ['SAME', 'VALID', 'CIRCULAR', 1])
@pytest.mark.parametrize('rank,strides,dilation,groups', [
    (1, 1, 1, 1), (1, 2, 2, 2), (2, 1, 2, 1), (2, 2, 1, 4), (2, (1, 3), (2, 1), 2), (3, 1, 1, 1), (3, 2, 1, 2),
])  # fmt: skip
def test_without_the_filter_it_is_a_convolution(rank, strides, dilation, groups, padding):
    size, kernel_size = SIZES[rank]
    strides, dilation = (geometry_of.ints_for_axes(value, '', rank) for value in (strides, dilation))
    if padding == 1:
        padding = [(0, min(1, k - 1)) for k in kernel_size]
    conv = nn.Conv(
        8, kernel_size, strides, padding, kernel_dilation=dilation, feature_group_count=groups, use_bias=False
    )
    x = random(1, 2, *size, 4)
    variables = jax.jit(conv.init)(jax.random.key(0), x)
    spans = geometry_of.dilated_size(kernel_size, dilation)
    pads = geometry_of.canonical_padding(padding, size, spans, strides)
    place = geometry_of.of_convolution(size, kernel_size, strides, pads, dilation, groups)
    expected = jax.jit(conv.apply)(variables, x)
    methods = [None, 'reference'] + ['spatial'] * (rank < 3) + ['frequency'] * (rank < 3 and groups == 1)

    @jax.jit
    def outputs(x, kernel):
        v = jnp.ones((*place.grid, 8))
        return [operation.normalized_convolution(x, kernel, v, place, method) for method in methods]

    for y in outputs(x, variables['params']['kernel']):
        np.testing.assert_allclose(y, expected, atol=2e-6)


@pytest.mark.covering(1)
@pytest.mark.parametrize('rank', [1, 2, 3])
@pytest.mark.parametrize('groups,dilation', [(1, 1), (2, 1), (4, 2)])
def test_a_circular_layer_has_a_flat_spectrum(rank, groups, dilation):
    """The paper's theory, exact where the image is periodic: sum_i |H[i, o](w)|^2 = 1 at every frequency."""
    size = SIZES[rank][0]
    layer = ConvNorm(
        8,
        (3, 2, 3)[:rank],
        padding='CIRCULAR',
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_affine=False,
        use_batch_norm=False,
    )
    impulses = np.zeros((4, *size, 4), np.float32)
    for channel in range(4):
        impulses[(channel, *(0,) * rank, channel)] = 1
    responses, _ = jax.jit(lambda x: layer.init_with_output(jax.random.key(1), x, use_running_average=True))(impulses)
    spectra = np.fft.fftn(np.asarray(responses, np.float64), axes=range(1, 1 + rank))
    # A channel of one filter alone has frequencies where that filter is nearly 0.
    np.testing.assert_allclose((np.abs(spectra) ** 2).sum(axis=0), 1, rtol=1e-3 if groups == 4 else 2e-5)


# --- the layer -------------------------------------------------------------------------------------

LAYERS = {
    'sequence': (ConvNorm(6, (3,), strides=2), (2, 9, 4)),
    'volume': (ConvNorm(6, (3, 2, 3)), (2, 4, 5, 6, 4)),
    'dilated': (ConvNorm(6, (3, 3), kernel_dilation=2), (2, 9, 8, 4)),
    'grouped': (ConvNorm(6, (3, 3), feature_group_count=2), (2, 9, 8, 4)),
    'depthwise': (ConvNorm(4, (3, 3), feature_group_count=4, use_batch_norm=False), (2, 9, 8, 4)),
    'circular': (ConvNorm(6, (3, 3), padding='CIRCULAR', strides=2), (9, 9, 8, 4)),
    'grouped, 1x1': (ConvNorm(6, (1, 1), feature_group_count=2, strides=2), (2, 9, 8, 4)),
    'sequence, 1': (ConvNorm(6, (1,), strides=2), (2, 9, 4)),
    'transposed sequence': (ConvNormTranspose(6, (4,)), (2, 9, 4)),
    'transposed volume': (ConvNormTranspose(6, (2, 2, 2), padding=0), (2, 2, 3, 4, 4)),
    'transposed, grouped': (ConvNormTranspose(6, feature_group_count=2, kernel_dilation=2), (2, 4, 3, 4)),
    'transposed, grouped, 1x1': (ConvNormTranspose(6, (1, 1), padding=0, feature_group_count=2), (2, 4, 3, 4)),
}


# One of each number of axes, with each option.
SOME = few(LAYERS, 'sequence', 'volume', 'grouped, 1x1', 'depthwise', 'transposed, grouped')


class Net(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        return self.layer(x, use_running_average=not train)


@pytest.mark.parametrize('name', SOME)
def test_trained_and_folded(name):
    layer, shape = LAYERS[name]
    net, x = Net(layer), random(2, *shape)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    train = jax.jit(lambda variables, x: net.apply(variables, x, train=True, mutable=['batch_stats'])[1])
    for seed in range(3):
        variables = {**variables, **train(variables, random(seed, *shape))}
    expected = jax.jit(net.apply)(variables, x)
    folded = fold_for_inference(net, variables, x)
    nothing = jax.tree.map(np.zeros_like, variables)
    y = jax.jit(net.apply)({**nothing, 'folded': folded['folded']}, x)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    other = random(3, shape[0], *(n + 1 for n in shape[1:-1]), shape[-1])
    if 1 not in layer.kernel_size[:1]:
        for given in (variables, folded):
            with pytest.raises(UserError, match='images'):
                net.apply(given, other)


@pytest.mark.parametrize('name', SOME)
def test_jit_vmap_and_forward_mode(name):
    layer, shape = LAYERS[name]
    x = random(4, *shape)
    variables = jax.jit(lambda x: layer.init(jax.random.key(0), x, use_running_average=False))(x)
    output = lambda x: layer.apply(variables, x, use_running_average=False, mutable=['batch_stats'])[0]
    expected = output(x)
    tangent, cotangent = random(5, *shape), random(6, *expected.shape)

    @jax.jit
    def results(x):
        moved = jax.jvp(output, (x,), (tangent,))[1]
        return output(x), jax.vmap(output)(x[None])[0], moved, *jax.vjp(output, x)[1](cotangent)

    jitted, mapped, moved, back = results(x)
    np.testing.assert_allclose(jitted, expected, atol=1e-5)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)
    np.testing.assert_allclose((moved * cotangent).sum(), (back * tangent).sum(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    'name',
    few(
        ['dilated', 'grouped', 'depthwise', 'circular', 'sequence', 'volume', 'transposed, grouped'],
        'grouped', 'sequence',
    ),
)  # fmt: skip
def test_strict_promotion(name):
    layer, shape = LAYERS[name]
    with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
        variables = layer.init(jax.random.key(0), random(4, *shape), use_running_average=False)
        output = lambda v, x: layer.apply(v, x, use_running_average=False, mutable=['batch_stats'])[0].sum()
        gradient = jax.jit(jax.grad(output))(variables, random(4, *shape))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient['params']))


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize('layer,shape,message', [
    (ConvNorm(6, (3,)), (2, 9, 9, 4), r'x.shape=.*\[batch, width, channels\] with kernel_size=\(3,\)'),
    (ConvNorm(6, (3, 3, 3)), (2, 9, 9, 4), r'x.shape=.*depth'),
    (ConvNorm(6, (3, 3, 3, 3)), (2, 9, 9, 4), r'kernel_size=\(3, 3, 3, 3\)'),
    (ConvNorm(6, (3, 3), feature_group_count=3), (2, 9, 9, 4), 'feature_group_count=3 with 4 channels'),
    (ConvNorm(6, (3, 3), feature_group_count=4), (2, 9, 9, 4), 'feature_group_count=4 with 4 .*features=6'),
    (ConvNorm(6, (3, 3), kernel_dilation=0), (2, 9, 9, 4), 'kernel_dilation=0'),
    (ConvNorm(6, (3, 3), feature_group_count=2, method='frequency'), (2, 9, 9, 4), "method='frequency' with 2 groups"),
    (ConvNorm(6, (3, 3, 3), method='spatial'), (2, 4, 4, 4, 4), "method='spatial'.*3 spatial"),
    (ConvNorm(6, (3,), padding=(1, 1)), (2, 9, 4), r'padding=\(1, 1\)'),
    (ConvNormTranspose(6, padding='CIRCULAR'), (2, 9, 9, 4), "padding='CIRCULAR'"),
])  # fmt: skip
def test_refused(layer, shape, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros(shape), use_running_average=True))


def test_every_method_is_drawn():
    rng = np.random.default_rng(0)
    drawn = list(filter(None, (geometries.draw(lambda count: int(rng.integers(count))) for _ in range(400))))
    assert {d.method for d in drawn} == {None, *METHODS}
    kinds = {(len(d.size), d.transposed, d.groups > 1, d.padding == 'CIRCULAR') for d in drawn}
    possible = set(itertools.product((1, 2, 3), (False, True), (False, True), (False, True)))
    assert kinds >= {kind for kind in possible if not (kind[1] and kind[3])}
