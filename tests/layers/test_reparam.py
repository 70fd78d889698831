"""Reparametrized convolutions: golden values, float64 NumPy, finite differences, their state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax.layers import orthogonal, spectral_norm
from convnorm_jax.layers.reparam import ONIConv, OWNConv, SpectralNormConv, WeightNormConv

pytestmark = pytest.mark.usefixtures('quick_compilation')

# The worst that is seen against the published float32 code is 1e-6 of the largest value.
GOLDEN_TOLERANCE = 1e-5

CONVOLUTIONS = {
    'spectral': SpectralNormConv(8, padding=1),
    'spectral_conv': SpectralNormConv(8, padding=1, mode='conv'),
    'oni': ONIConv(8, padding=1),
    'own': OWNConv(8, padding=1, learn_scale=True),
    'weight': WeightNormConv(8, padding=1),
}
PADDINGS = [
    ('CIRCULAR', (1, 1)),
    ('SAME', (1, 1)),
    ('SAME', (2, 2)),
    ('VALID', (1, 1)),
    (((2, 0), (1, 1)), (1, 2)),
    ('CIRCULAR', (2, 1)),
]


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(actual, expected, tolerance):
    """|actual - expected| <= tolerance * the largest expected value."""
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


def hwio(w):
    return np.ascontiguousarray(w.transpose(2, 3, 1, 0))


def rows_of(kernel):
    """float64 [cout, fan_in] in PyTorch's order, by itself of the library."""
    return np.asarray(kernel, np.float64).transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1)


def centred(kernel, groups=1):
    rows = rows_of(kernel).reshape(groups, kernel.shape[3] // groups, -1)
    return rows - rows.mean(-1, keepdims=True)


def polar(kernel, groups=1):
    """Orthonormal rows (or columns) nearest to the centred filters, by float64 SVDs: [cout, fan_in]."""
    u, _, vt = np.linalg.svd(centred(kernel, groups), full_matrices=False)
    return (u @ vt).reshape(kernel.shape[3], -1)


def dense_convolution(kernel, image_size, strides, padding):
    """The convolution's matrix, float64 [H' * W' * cout, H * W * cin], entry by entry."""
    kernel = np.asarray(kernel, np.float64)
    kh, kw, cin, cout = kernel.shape
    (h, w), circular = image_size, padding == 'CIRCULAR'
    if circular:
        pads = [((k - 1) // 2, k // 2) for k in (kh, kw)]
    else:
        pads = padding
        if isinstance(padding, str):
            pads = jax.lax.padtype_to_pads(image_size, (kh, kw), strides, padding)
    rows, columns = ((n + sum(p) - k) // s + 1 for n, p, k, s in zip(image_size, pads, (kh, kw), strides))
    matrix = np.zeros((rows, columns, cout, h, w, cin))
    for i, j, a, b in np.ndindex(rows, columns, kh, kw):
        m, n = i * strides[0] + a - pads[0][0], j * strides[1] + b - pads[1][0]
        if circular or (0 <= m < h and 0 <= n < w):
            matrix[i, j, :, m % h, n % w] += kernel[a, b].T
    return matrix.reshape(rows * columns * cout, h * w * cin)


def mode(layer, training):
    """Arguments of a call in training or evaluation."""
    return {'use_running_average': not training} if isinstance(layer, SpectralNormConv) else {}


@functools.partial(jax.jit, static_argnums=(0, 2))
def init(layer, x, training=False):
    return layer.init(jax.random.key(0), x, **mode(layer, training))


def eager_train(layer, variables, x):
    """(output, variables after) of one training pass."""
    y, update = layer.apply(variables, x, mutable=['batch_stats'], **mode(layer, True))
    return y, {**variables, **update}


def eager_evaluate(layer, variables, x):
    return layer.apply(variables, x, **mode(layer, False))


train = jax.jit(eager_train, static_argnums=0)
evaluate = jax.jit(eager_evaluate, static_argnums=0)


# --- golden values -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def golden(load_golden):
    return load_golden('weights')


@pytest.mark.parametrize('case', ['row', 'col', 'pw'])
def test_oni_golden(golden, nhwc, case):
    w, expected, x, y = (golden[f'oni/{case}/{name}'] for name in ('w', 'w_orth', 'x', 'y'))
    kernel = hwio(w)
    close(1.414 * jax.jit(orthogonal.oni)(kernel), hwio(expected), GOLDEN_TOLERANCE)
    layer = ONIConv(w.shape[0], w.shape[2:], padding=w.shape[2] // 2, use_bias=False)
    variables = {'params': {'kernel': kernel, 'scale': np.full(w.shape[0], 1.414, np.float32)}}
    close(evaluate(layer, variables, nhwc(x)), nhwc(y), GOLDEN_TOLERANCE)


@pytest.mark.parametrize('case', ['g1', 'g4'])
def test_own_golden(golden, case):
    w, groups, expected = (golden[f'own/{case}/{name}'] for name in ('w', 'groups', 'w_orth'))
    close(1.414 * orthogonal.own(hwio(w), int(groups)), hwio(expected), GOLDEN_TOLERANCE)
    # The module, by the impulse responses of its filters.
    layer = OWNConv(w.shape[0], w.shape[2:], padding=2, use_bias=False, groups=int(groups))
    impulses = np.eye(w.shape[1], dtype=np.float32)[:, None, None]
    responses = layer.apply({'params': {'kernel': hwio(w)}}, impulses)
    close(responses[:, ::-1, ::-1].transpose(1, 2, 0, 3), hwio(expected), GOLDEN_TOLERANCE)


def test_spectral_norm_golden(golden, nhwc):
    g = {k.removeprefix('sn/'): v for k, v in golden.items() if k.startswith('sn/')}
    layer = SpectralNormConv(16, padding=1, use_bias=False)
    x, v0 = nhwc(g['x']), spectral_norm.normalized(random(0, 72))  # v0 has no part in a training pass
    variables = {'params': {'kernel': hwio(g['w'])}, 'batch_stats': {'u': jnp.asarray(g['u0']), 'v': v0}}
    y, variables = train(layer, variables, x)
    close(y, nhwc(g['y_train']), GOLDEN_TOLERANCE)
    close(variables['batch_stats']['u'], g['u1'], GOLDEN_TOLERANCE)
    close(evaluate(layer, variables, x), nhwc(g['y_eval']), GOLDEN_TOLERANCE)


# --- float64 -------------------------------------------------------------------------------


def test_spectral_norm_converges_to_the_largest_singular_value():
    x, layer = random(0, 2, 6, 6, 3), SpectralNormConv(8, padding=1, iterations=50)
    variables = init(layer, x)
    _, variables = train(layer, variables, x)
    kernel = variables['params']['kernel']
    u, s, vt = np.linalg.svd(rows_of(kernel))
    stats = variables['batch_stats']
    estimate = spectral_norm.norm_estimate(spectral_norm.reshaped_operator(kernel), stats['u'], stats['v'])
    np.testing.assert_allclose(estimate, s[0], rtol=1e-5)
    np.testing.assert_allclose(np.abs(u[:, 0] @ stats['u']), 1, rtol=1e-4)
    np.testing.assert_allclose(np.abs(vt[0] @ stats['v']), 1, rtol=1e-4)


@pytest.mark.parametrize('padding,strides', PADDINGS)
def test_convolution_norm_is_that_of_the_dense_matrix(padding, strides):
    kernel = random(1, 3, 3, 2, 3)
    s = np.linalg.svd(dense_convolution(kernel, (6, 5), strides, padding), compute_uv=False)
    norm = jax.jit(lambda k: spectral_norm.convolution_norm(k, (6, 5), strides, padding, iterations=500))
    np.testing.assert_allclose(norm(kernel), s[0], rtol=1e-4)


@pytest.mark.parametrize('padding,strides', [PADDINGS[0], PADDINGS[4]])
def test_conv_mode_makes_the_layer_norm_one(padding, strides):
    x = random(2, 2, 6, 5, 2)
    layer = SpectralNormConv(3, 3, strides, padding, use_bias=False, mode='conv', init_iterations=300)
    variables = init(layer, x)
    eye = np.eye(60, dtype=np.float32).reshape(60, 6, 5, 2)
    y = np.asarray(evaluate(layer, variables, eye), np.float64).reshape(60, -1)
    np.testing.assert_allclose(np.linalg.svd(y, compute_uv=False)[0], 1, rtol=1e-4)
    # Statistics are of the pictures at initialization: others are taken all the same.
    assert train(layer, variables, random(3, 2, 9, 9, 2))[1]['batch_stats']['v'].shape == (6, 5, 2)


def test_reshaped_norm_is_not_that_of_the_layer():
    # What the docstring says of the two modes, at its extreme: all taps equal.
    kernel = np.ones((3, 3, 1, 1), np.float32)
    norm = jax.jit(lambda k: spectral_norm.convolution_norm(k, (6, 6), padding='CIRCULAR'))(kernel)
    np.testing.assert_allclose(norm, 3 * np.linalg.norm(kernel), rtol=1e-5)


@pytest.mark.parametrize('groups', [1, 2])
def test_oni_rows_are_orthonormal_in_the_limit(groups):
    kernel = random(3, 3, 3, 4, 8)
    w = jax.jit(lambda k: orthogonal.oni(k, iterations=7, groups=groups))(kernel)
    close(rows_of(w), polar(kernel, groups), 1e-4)
    blocks = rows_of(w).reshape(groups, 8 // groups, -1)
    np.testing.assert_allclose(blocks @ blocks.swapaxes(1, 2), np.tile(np.eye(8 // groups), (groups, 1, 1)), atol=1e-4)


def test_oni_columns():
    kernel = random(4, 1, 1, 4, 16) * 0.2
    w = orthogonal.oni(kernel, iterations=7, bounded_columns=True)
    u, s, vt = np.linalg.svd(centred(kernel)[0], full_matrices=False)
    assert s[-1] < 1e-6  # centring took one direction
    close(rows_of(w), u[:, :3] @ vt[:3], 1e-4)
    # As published: orthogonal, of norm ||S||^(-1/2) each.
    published = orthogonal.oni(kernel, iterations=7)
    norm = np.linalg.norm(centred(kernel)[0].T @ centred(kernel)[0])
    close(rows_of(published), u[:, :3] @ vt[:3] / np.sqrt(norm), 1e-4)
    # Where it diverges, and the other does not.
    assert np.abs(orthogonal.oni(10 * kernel)).max() > 1e3
    assert np.abs(orthogonal.oni(10 * kernel, bounded_columns=True)).max() < 1


def test_oni_rows_of_a_tall_kernel():
    layer, x = ONIConv(16, 1, rows_only=True, use_bias=False), random(5, 1, 2, 2, 4)
    params = init(layer, x)['params']
    expected = orthogonal.oni(params['kernel'], rows=True) * 1.414
    np.testing.assert_allclose(layer.apply({'params': params}, x), x @ expected[0, 0], rtol=1e-5, atol=1e-6)
    assert np.abs(expected - 1.414 * orthogonal.oni(params['kernel'])).max() > 0.01


@pytest.mark.parametrize('groups', [1, 2, 8])
def test_own_rows_are_orthonormal(groups):
    kernel = random(6, 3, 3, 2, 8)
    w = orthogonal.own(kernel, groups)
    close(rows_of(w), polar(kernel, groups), 1e-5)
    np.testing.assert_allclose(rows_of(w).sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize(
    'features,kernel_size,cin,groups', [(128, 3, 64, 2), (64, 3, 3, 4), (64, 1, 64, 2), (12, 1, 2, 12), (8, 3, 8, 1)]
)
def test_own_default_groups(features, kernel_size, cin, groups):
    layer, x = OWNConv(features, kernel_size, use_bias=False), random(7, 1, 3, 3, cin)
    assert layer._group_count(kernel_size**2 * cin) == groups
    if features < 64:
        kernel = init(layer, x)['params']['kernel']
        close(rows_of(orthogonal.own(kernel, groups)), polar(kernel, groups), 1e-4)


def test_weight_norm_at_first_is_the_plain_convolution():
    x = random(8, 2, 6, 6, 3)
    variables = init(WeightNormConv(8, padding=1), x)
    plain = {'params': {k: v for k, v in variables['params'].items() if k != 'scale'}}
    close(WeightNormConv(8, padding=1).apply(variables, x), nn.Conv(8, (3, 3), padding=1).apply(plain, x), 1e-6)
    scaled = orthogonal.weight_norm(variables['params']['kernel'], np.arange(8.0))
    np.testing.assert_allclose(orthogonal.filter_norms(scaled), np.arange(8.0), rtol=1e-6)


@pytest.mark.parametrize('padding,strides', PADDINGS)
def test_convolves_as_flax(padding, strides):
    x = random(9, 2, 6, 5, 2)
    variables = init(WeightNormConv(3, (3, 2), strides, 'SAME'), x)
    plain = {'params': {k: v for k, v in variables['params'].items() if k != 'scale'}}
    pairs = ((1, 0), (1, 1)) if not isinstance(padding, str) else padding
    expected = nn.Conv(3, (3, 2), strides, pairs).apply(plain, x)
    close(WeightNormConv(3, (3, 2), strides, pairs).apply(variables, x), expected, 1e-6)


# --- gradients -----------------------------------------------------------------------------

REPARAMETRIZATIONS = {
    'oni rows': orthogonal.oni,
    'oni columns': lambda k: orthogonal.oni(0.1 * k, rows=False),
    'oni bounded': lambda k: orthogonal.oni(k, rows=False, bounded_columns=True),
    'own': functools.partial(orthogonal.own, groups=2),
    'weight norm': lambda k: orthogonal.weight_norm(k, jnp.arange(1.0, 5.0)),
    'convolution norm': lambda k: spectral_norm.convolution_norm(k, (4, 4), iterations=300),
}


@pytest.mark.parametrize('name', REPARAMETRIZATIONS)
def test_gradients_are_finite_differences(name):
    kernel, direction = random(10, 2, 2, 3, 4), random(11, 2, 2, 3, 4)
    f = REPARAMETRIZATIONS[name]
    cotangent = random(12, *jax.eval_shape(f, kernel).shape)
    loss = lambda k: (f(k) * cotangent).sum()
    slope = (jax.jit(jax.grad(loss))(kernel) * direction).sum()
    step = 1e-2
    above, below = (np.float64(jax.jit(loss)(kernel + sign * step * direction)) for sign in (1, -1))
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=5e-3, atol=5e-3)


def test_spectral_norm_gradient_has_constant_singular_vectors():
    kernel, u, v = (
        random(13, 3, 3, 2, 4),
        spectral_norm.normalized(random(14, 4)),
        spectral_norm.normalized(random(15, 18)),
    )
    cotangent = random(16, 3, 3, 2, 4)

    def loss(kernel):
        return (kernel / spectral_norm.norm_estimate(spectral_norm.reshaped_operator(kernel), u, v) * cotangent).sum()

    w, c = rows_of(kernel), rows_of(cotangent)
    sigma = np.float64(u) @ w @ np.float64(v)
    expected = c / sigma - (c * w).sum() / sigma**2 * np.outer(u, v)
    close(rows_of(jax.grad(loss)(kernel)), expected, 1e-5)


def test_inverse_sqrt_with_repeated_eigenvalues():
    # s = q diag(4, 4, 4, 1) q^T, where the derivative of the eigenvectors does not exist.
    q, _ = np.linalg.qr(np.random.default_rng(17).standard_normal((4, 4)))
    s = (q * np.array([4, 4, 4, 1.0])) @ q.T
    direction = np.random.default_rng(18).standard_normal((4, 4))
    direction += direction.T

    def exact(s):
        values, vectors = np.linalg.eigh(s)
        return (vectors * values**-0.5) @ vectors.T

    expected = (exact(s + 1e-5 * direction) - exact(s - 1e-5 * direction)) / 2e-5
    s = np.float32(s)
    value, slope = jax.jit(lambda s, ds: jax.jvp(orthogonal.inverse_sqrt, (s,), (ds,)))(s, np.float32(direction))
    close(value, exact(s), 1e-6)
    close(slope, expected, 1e-5)
    gradient = jax.jit(jax.grad(lambda s: (orthogonal.inverse_sqrt(s) * direction).sum()))(s)
    np.testing.assert_allclose((gradient * direction).sum(), (expected * direction).sum(), rtol=1e-4)


def test_own_gradient_of_orthonormal_filters():
    # All eigenvalues are the same.
    kernel = np.float32(polar(random(19, 3, 3, 2, 8))).reshape(8, 2, 3, 3).transpose(2, 3, 1, 0)
    gradient = jax.jit(jax.grad(lambda k: (orthogonal.own(k) * random(20, 3, 3, 2, 8)).sum()))(kernel)
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0.1


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_degenerate_kernels_are_finite(name):
    layer, x = CONVOLUTIONS[name], random(21, 2, 6, 6, 3)
    variables = init(layer, x)
    w = np.array(variables['params']['kernel'])

    @jax.jit
    def run(variables):
        def loss(params):
            y, after = train(layer, {**variables, 'params': params}, x)
            return jnp.square(y).sum(), after

        (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(variables['params'])
        return value, gradients, after, evaluate(layer, after, x)

    cases = {'zeros': 0 * w, 'one dead filter': w * (np.arange(8) > 0), 'equal filters': 0 * w + w[..., :1]}
    for case, kernel in cases.items():
        results = run({**variables, 'params': {**variables['params'], 'kernel': kernel}})
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results)), case
        for leaf in jax.tree.leaves(results[2].get('batch_stats', {})):  # nor do the vectors vanish
            np.testing.assert_allclose(np.linalg.norm(leaf), 1, rtol=1e-5, err_msg=case)


# --- the modules in a training loop ----------------------------------------------------------


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_parameters_and_statistics(name):
    layer, x = CONVOLUTIONS[name], random(22, 2, 6, 6, 3)
    variables = init(layer, x, True)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, jax.eval_shape(lambda: init(layer, x)))
    shapes = {'kernel': (3, 3, 3, 8), 'bias': (8,)}
    if not name.startswith('spectral'):
        shapes['scale'] = (8,)
        assert set(variables) == {'params'}
    else:
        expected = {'u': (8,), 'v': (27,)} if name == 'spectral' else {'u': (6, 6, 8), 'v': (6, 6, 3)}
        assert {k: v.shape for k, v in variables['batch_stats'].items()} == expected
        for leaf in variables['batch_stats'].values():
            np.testing.assert_allclose(np.linalg.norm(leaf), 1, rtol=1e-5)
    assert {k: v.shape for k, v in variables['params'].items()} == shapes
    assert np.abs(variables['params']['kernel']).max() <= 27**-0.5
    assert np.abs(variables['params']['kernel']).max() > 0.9 * 27**-0.5
    assert np.abs(variables['params']['bias']).max() <= 27**-0.5
    if name in ('oni', 'own'):
        np.testing.assert_array_equal(variables['params']['scale'], np.float32(1.414))


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_jitted_and_eager_agree(name):
    layer, x = CONVOLUTIONS[name], random(23, 2, 6, 6, 3)
    variables = init(layer, x)
    y, after = eager_train(layer, variables, x)
    jitted, jitted_after = train(layer, variables, x)
    close(jitted, y, 1e-5)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), jitted_after, after)
    close(evaluate(layer, after, x), eager_evaluate(layer, after, x), 1e-5)


@pytest.mark.parametrize('name', ['spectral', 'spectral_conv'])
def test_statistics_move_in_training_only(name):
    layer, x = CONVOLUTIONS[name], random(24, 2, 6, 6, 3)
    variables = init(layer.copy(init_iterations=0), x)
    _, once = train(layer, variables, x)
    _, twice = train(layer.copy(iterations=2), variables, x)
    _, again = train(layer, once, x)
    for key in ('u', 'v'):
        assert np.abs(once['batch_stats'][key] - variables['batch_stats'][key]).max() > 1e-3
        close(again['batch_stats'][key], twice['batch_stats'][key], 1e-5)
    _, update = layer.apply(once, x, use_running_average=True, mutable=['batch_stats'])
    jax.tree.map(np.testing.assert_array_equal, update['batch_stats'], once['batch_stats'])


@pytest.mark.slow
def test_initial_singular_vectors():
    x = random(25, 1, 6, 6, 3)
    stats = [init(SpectralNormConv(64, init_iterations=n), x) for n in (0, 15)]
    operator = spectral_norm.reshaped_operator(stats[0]['params']['kernel'])
    drawn, warm = (spectral_norm.norm_estimate(operator, **s['batch_stats']) for s in stats)
    exact = np.linalg.norm(rows_of(stats[0]['params']['kernel']), 2)
    assert abs(drawn) < 0.5 * exact and 0.9 * exact < warm <= exact * (1 + 1e-6)
    # Two layers draw their own; parameters alone are enough to make statistics.
    other = SpectralNormConv(64, init_iterations=0).init(jax.random.key(1), x, use_running_average=True)
    assert np.abs(other['batch_stats']['u'] - stats[0]['batch_stats']['u']).max() > 0.01
    params = {'params': stats[0]['params']}
    _, made = SpectralNormConv(64).apply(params, x, use_running_average=True, mutable=['batch_stats'])
    assert 0.9 * exact < spectral_norm.norm_estimate(operator, **made['batch_stats']) <= exact * (1 + 1e-6)


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_bfloat16(name):
    layer, x = CONVOLUTIONS[name], random(26, 2, 6, 6, 3)
    variables = init(layer, x)
    y, after = train(layer, variables, x)
    half, half_after = train(layer.copy(dtype=jnp.bfloat16), variables, x)
    assert half.dtype == jnp.bfloat16
    close(half, y, 0.02)
    # Statistics are of the float32 kernel, to the last bits.
    jax.tree.map(lambda a, b: close(a, b, 1e-5), half_after, after)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half_after))
    assert train(layer, variables, x.astype(jnp.bfloat16))[0].dtype == jnp.float32  # as nn.Conv promotes


@pytest.mark.parametrize('layer', [ONIConv(8), OWNConv(8)], ids=['oni', 'own'])
def test_constant_scale(layer):
    x = random(27, 1, 4, 4, 3)
    variables = init(layer.copy(learn_scale=False), x)
    assert set(variables['params']) == {'kernel', 'bias'}
    learned = {'params': {**variables['params'], 'scale': np.full(8, 1.414, np.float32)}}
    expected = layer.copy(learn_scale=True).apply(learned, x)
    np.testing.assert_array_equal(layer.copy(learn_scale=False).apply(variables, x), expected)
    doubled = layer.copy(learn_scale=False, init_scale=2.828, use_bias=False).apply(variables, x)
    close(doubled, 2 * (expected - variables['params']['bias']), 1e-5)


@pytest.mark.parametrize(
    'layer,message',
    [
        (SpectralNormConv(8, mode='exact'), r"mode='exact': expected one of \('reshaped', 'conv'\)"),
        (SpectralNormConv(8, iterations=0), 'iterations=0: expected an int of 1 or more'),
        (SpectralNormConv(8, init_iterations=-1), 'init_iterations=-1: expected an int of 0 or more'),
        (ONIConv(8, groups=3), 'groups=3: expected a divisor of features=8'),
        (ONIConv(8, iterations=-1), 'iterations=-1: expected 0 or more'),
        (OWNConv(8, groups=3), 'groups=3: expected a divisor of features=8'),
        (OWNConv(64, groups=1), 'groups=1 with features=64: at most 26 centred filters of 27 weights'),
        (WeightNormConv(0), 'features=0: expected a positive int'),
        (WeightNormConv(8, kernel_size=0), 'kernel_size=0'),
        (WeightNormConv(8, strides=(1, 2, 3)), r'strides=\(1, 2, 3\)'),
        (WeightNormConv(8, padding='same'), "padding='same': expected 'SAME', 'VALID', 'CIRCULAR'"),
        (ONIConv(8, padding=3), 'padding=3'),
    ],
)
def test_mistakes_are_told(layer, message):
    with pytest.raises(ValueError, match=message) as error:
        layer.init(jax.random.key(0), random(0, 1, 6, 6, 3), **mode(layer, False))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('layer', [ONIConv(8, 1), OWNConv(8, 1)], ids=['oni', 'own'])
def test_a_filter_of_one_weight(layer):
    with pytest.raises(ValueError, match=r'kernel_size=\(1, 1\) with one input channel'):
        layer.init(jax.random.key(0), random(0, 1, 6, 6, 1))


def test_training_or_evaluation_must_be_said():
    with pytest.raises(ValueError, match='use_running_average'):
        SpectralNormConv(8).init(jax.random.key(0), random(0, 1, 6, 6, 3))


def test_images_without_a_batch():
    with pytest.raises(ValueError, match=r'x\.shape=\(6, 6, 3\)'):
        WeightNormConv(8).init(jax.random.key(0), random(0, 6, 6, 3))


# --- PyTorch, where it is installed ----------------------------------------------------------


@pytest.mark.parametrize('strides', [1, 2])
def test_spectral_norm_is_torch(strides):
    torch = pytest.importorskip('torch')
    torch.manual_seed(0)
    reference = torch.nn.utils.spectral_norm(torch.nn.Conv2d(3, 8, 3, stride=strides, padding=1))
    layer = SpectralNormConv(8, strides=strides, padding=1)
    params = {'kernel': hwio(reference.weight_orig.detach().numpy()), 'bias': reference.bias.detach().numpy()}
    stats = {'u': reference.weight_u.numpy().copy(), 'v': reference.weight_v.numpy().copy()}
    variables = {'params': params, 'batch_stats': stats}
    for step in range(3):
        x = random(step, 2, 3, 6, 6)
        ours = x.transpose(0, 2, 3, 1)
        expected = reference(torch.from_numpy(x))
        reference.zero_grad()
        torch.square(expected).sum().backward()

        def loss(params, variables=variables, ours=ours):
            y, after = train(layer, {**variables, 'params': params}, ours)
            return jnp.square(y).sum(), (y, after)

        gradients, (y, variables) = jax.grad(loss, has_aux=True)(variables['params'])
        close(y, expected.detach().numpy().transpose(0, 2, 3, 1), 1e-5)
        close(gradients['kernel'], hwio(reference.weight_orig.grad.numpy()), 1e-4)
        close(variables['batch_stats']['u'], reference.weight_u.numpy(), 1e-5)
        close(variables['batch_stats']['v'], reference.weight_v.numpy(), 1e-5)
    reference.eval()
    close(evaluate(layer, variables, ours), reference(torch.from_numpy(x)).detach().numpy().transpose(0, 2, 3, 1), 1e-5)


def test_weight_norm_is_torch():
    torch = pytest.importorskip('torch')
    torch.manual_seed(0)
    reference = torch.nn.utils.weight_norm(torch.nn.Conv2d(3, 8, 3, padding=1), dim=0)
    with torch.no_grad():
        reference.weight_g.mul_(torch.linspace(0.5, 2, 8)[:, None, None, None])
    x = random(0, 2, 3, 6, 6)
    expected = reference(torch.from_numpy(x))
    torch.square(expected).sum().backward()
    params = {
        'kernel': hwio(reference.weight_v.detach().numpy()),
        'bias': reference.bias.detach().numpy(),
        'scale': reference.weight_g.detach().numpy().reshape(-1),
    }
    layer = WeightNormConv(8, padding=1)

    def loss(params):
        y = layer.apply({'params': params}, x.transpose(0, 2, 3, 1))
        return jnp.square(y).sum(), y

    gradients, y = jax.grad(loss, has_aux=True)(params)
    close(y, expected.detach().numpy().transpose(0, 2, 3, 1), 1e-5)
    close(gradients['kernel'], hwio(reference.weight_v.grad.numpy()), 1e-4)
    close(gradients['scale'], reference.weight_g.grad.numpy().reshape(-1), 1e-4)


def test_numpy_integers_are_taken():
    x = random(0, 2, 4, 4, 3)
    layer = ONIConv(np.int64(4), (3, 3), iterations=np.int64(2), groups=np.int64(2))
    assert layer.init_with_output(jax.random.key(0), x)[0].shape == (2, 4, 4, 4)
    layer = SpectralNormConv(np.int32(4), (3, 3), iterations=np.int64(1))
    assert layer.init_with_output(jax.random.key(0), x, use_running_average=True)[0].shape == (2, 4, 4, 4)
