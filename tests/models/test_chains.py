"""The depthwise-separable and the 1-D net: sizes, options, and their numbers against NumPy's in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import fold_for_inference
from convnorm_jax.layers import LAYERS
from convnorm_jax.models import create_model
from convnorm_jax.torch_import import import_state_dict
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

NETS = ('mobilenet', 'sequence_cnn')
SHAPE = (8, 6, 2)


def shapes(model, input_shape=(1, 32, 32, 3)):
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False),
        jax.ShapeDtypeStruct(input_shape, jnp.float32),
    )


def parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)[1]['params']))


@functools.cache
def small(name, layer, **options):
    """(model, variables as after some training passes, images)."""
    model = create_model(name, num_classes=5, layer=layer, width=4, depth=(1, 2), **options)
    images = np.random.default_rng(1).standard_normal((4, *SHAPE)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    train = jax.jit(lambda v: {**v, **model.apply(v, images, train=True, mutable=['batch_stats'])[1]})
    for _ in range(3):
        variables = train(variables)
        variables['params'] = jax.tree.map(
            lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), variables['params']
        )
    return model, variables, images


# --- sizes and options -----------------------------------------------------------------------


def mobilenet_layers():
    """(k, input channels of a filter, output channels) of the published net."""
    found, cin = [(3, 3, 32)], 32
    for cout in (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024):  # the paper's table 1
        found += [(3, 1, cin), (1, cin, cout)]
        cin = cout
    return found


def test_mobilenets_parameters():
    found = mobilenet_layers()
    plain = sum(k * k * cin * cout for k, cin, cout in found)
    linear = 1024 * 10 + 10
    # As counted for the well-known CIFAR MobileNet of PyTorch.
    assert plain + sum(2 * cout for *_, cout in found) + linear == 3_217_226
    assert parameters(create_model('mobilenet', num_classes=10, layer='batchnorm')) == 3_217_226
    affine = sum((k * k + 3) * cout for k, _, cout in found)
    assert parameters(create_model('mobilenet', num_classes=10, layer='convnorm')) == plain + affine + linear


def test_the_sequence_nets_parameters():
    widths = [32, 32, 64, 64, 128, 128]
    plain = sum(3 * a * b for a, b in zip([32 * 3, *widths], widths))
    for layer, each in {'none': 1, 'batchnorm': 3, 'convnorm': 6}.items():  # 3 taps, a bias, BatchNorm's two
        expected = plain + each * sum(widths) + 128 * 10 + 10
        assert parameters(create_model('sequence_cnn', num_classes=10, layer=layer)) == expected


def test_mobilenets_width_and_depth():
    logits, variables = shapes(create_model('mobilenet', num_classes=7, layer='none', width=4, depth=[1, 2]))
    kernels = {name: tree['conv']['kernel'].shape for name, tree in variables['params'].items() if 'conv' in tree}
    assert kernels == {
        'conv1': (3, 3, 3, 4),
        'depthwise1_1': (3, 3, 1, 4),
        'pointwise1_1': (1, 1, 4, 8),
        'depthwise2_1': (3, 3, 1, 8),
        'pointwise2_1': (1, 1, 8, 16),
        'depthwise2_2': (3, 3, 1, 16),
        'pointwise2_2': (1, 1, 16, 16),
    }
    assert logits.shape == (1, 7) and variables['params']['linear']['kernel'].shape == (16, 7)


def test_the_sequence_nets_width_and_depth():
    logits, variables = shapes(create_model('sequence_cnn', num_classes=7, layer='none', width=4, depth=(2, 1)))
    kernels = {name: tree['conv']['kernel'].shape for name, tree in variables['params'].items() if 'conv' in tree}
    assert kernels == {'conv1_1': (3, 96, 4), 'conv1_2': (3, 4, 4), 'conv2_1': (3, 4, 8)}
    assert logits.shape == (1, 7) and variables['params']['linear']['kernel'].shape == (8, 7)


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize(
    'options,message',
    [
        (dict(depth=(1,) * 6), r'depth=\(1, 1, 1, 1, 1, 1\): expected 1 to [35] whole'),
        (dict(depth=(0,)), r'depth=\(0,\)'),
        (dict(width=0), 'width=0'),
        (dict(stem='cifar'), "stem='cifar' with model.name"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, num_classes=5, layer='none', **options)


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (5, 1), (7, 3)])
def test_images_of_any_size(name, size):
    model = create_model(name, num_classes=5, layer='convnorm', width=4, depth=(1, 1, 1))
    assert shapes(model, (2, *size, 3))[0].shape == (2, 5)


@pytest.mark.parametrize('layer,option', [('oni', 'groups'), ('own', 'groups')])
def test_filters_that_cannot_be_grouped(layer, option):
    model = create_model('mobilenet', num_classes=5, layer=layer, width=4, depth=(1,), **{option: 2})
    with pytest.raises(ValueError, match='groups=2: expected a divisor of the 1 filters of each of the 4 groups'):
        shapes(model)


@pytest.mark.parametrize('name', NETS)
def test_there_are_no_published_weights(name):
    model = create_model(name, num_classes=5, layer='batchnorm', width=4, depth=(1,))
    with pytest.raises(ValueError, match='was not published: there are weights of ResNets'):
        import_state_dict(model, {'conv1.weight': np.zeros((4, 3, 3, 3))}, (8, 8, 3))


# --- numbers ---------------------------------------------------------------------------------


def full_convolution(x, kernel, groups):
    """The cross-correlation with k-1 zeros on each side, tap by tap, of [B, *spatial, cin] in float64."""
    *taps, inside, cout = kernel.shape
    grid = [n + k - 1 for n, k in zip(x.shape[1:-1], taps)]
    x = np.pad(x, [(0, 0), *((k - 1, k - 1) for k in taps), (0, 0)])
    y = np.zeros((x.shape[0], *grid, cout))
    for tap in itertools.product(*map(range, taps)):
        view = x[(slice(None), *(slice(t, t + n) for t, n in zip(tap, grid)))]
        for o in range(cout):
            first = o // (cout // groups) * inside
            y[..., o] += view[..., first : first + inside] @ kernel[(*tap, slice(None), o)]
    return y


def cropped(y, taps, strides):
    """With a padding of (k-1)//2."""
    return y[(slice(None), *(slice(k // 2, n - k // 2, s) for k, n, s in zip(taps, y.shape[1:-1], strides)))]


def batch_norm(y, params, stats):
    return (y - stats['mean']) / np.sqrt(stats['var'] + 1e-5) * params['scale'] + params['bias']


def reference_layer(layer, params, stats, x, strides, groups):
    """A layer at inference, by the paper's lines."""
    if layer != 'convnorm':
        kernel = params['conv']['kernel']
        y = cropped(full_convolution(x, kernel, groups), kernel.shape[:-2], strides) + params['conv'].get('bias', 0)
        return batch_norm(y, params['norm'], stats['norm']) if layer == 'batchnorm' else y
    kernel, taps = params['kernel'], params['kernel'].shape[:-2]
    y, axes = full_convolution(x, kernel, groups), tuple(range(1, x.ndim - 1))
    y = np.fft.ifftn(np.fft.fftn(y, axes=axes) * stats['preconditioner'], axes=axes).real
    y = cropped(y, taps, strides)
    y = cropped(full_convolution(y, params['affine_kernel'], y.shape[-1]), taps, [1] * len(taps))
    return batch_norm(y + params['affine_bias'], params['batch_norm'], stats['batch_norm'])


def reference(name, layer, variables, images):
    """Logits of `small` nets."""
    variables = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    params, stats = variables['params'], variables.get('batch_stats', {})

    def apply(x, place, stride, groups=1):
        strides = (stride,) * (x.ndim - 2)
        return np.maximum(reference_layer(layer, params[place], stats.get(place), x, strides, groups), 0)

    x = images.astype(np.float64)
    if name == 'sequence_cnn':
        x = np.stack([[np.concatenate(row) for row in image] for image in x])  # [B, H, W * C]
        x = apply(apply(apply(x, 'conv1_1', 1), 'conv2_1', 2), 'conv2_2', 1)
    else:
        x = apply(x, 'conv1', 1)
        for place, stride in {'1_1': 1, '2_1': 2, '2_2': 1}.items():
            x = apply(apply(x, f'depthwise{place}', stride, x.shape[-1]), f'pointwise{place}', 1)
    features = x.reshape(len(x), -1, x.shape[-1]).mean(1)
    return features @ params['linear']['kernel'] + params['linear']['bias']


@pytest.mark.covering(1)
@pytest.mark.parametrize('layer', ['none', 'batchnorm', 'convnorm'])
@pytest.mark.parametrize('name', NETS)
def test_logits_against_numpy(name, layer):
    model, variables, images = small(name, layer)
    logits = jax.jit(model.apply)(variables, images)
    expected = reference(name, layer, variables, images)
    assert logits.dtype == jnp.float32 and np.ptp(expected, axis=0).min() > 1e-3
    # Seven layers of float32 sums, which ConvNorm's V amplifies where a filter has little power.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('name', NETS)
def test_a_folded_net_is_the_same(name):
    model, variables, images = small(name, 'convnorm')
    folded = fold_for_inference(model, variables, images)
    expected = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(jax.jit(model.apply)(folded, images), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize('layer', few(LAYERS, 'convnorm'))
@pytest.mark.parametrize('name', NETS)
def test_every_parameter_learns(name, layer):
    # Not at the start: with biases of 0 a depthwise layer and its BatchNorm undo the scale before them.
    model, variables, images = small(name, layer)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = model.apply({**variables, 'params': params}, images, train=True, mutable=['batch_stats'])
            return jax.nn.logsumexp(logits, axis=-1).sum() - logits[:, 0].sum()

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(variables['params']))[0]:
        assert np.all(np.isfinite(leaf)), path
        names = [part.key for part in path]
        # BatchNorm undoes a bias and a factor before it: the gradient is zero but for rounding.
        undone = names[-1] == 'affine_bias' or names[-2:] in (['conv', 'scale'], ['conv', 'bias'])
        undone |= names[-1] == 'affine_kernel' and leaf.shape[:2] == (1, 1)
        if not undone:
            assert np.abs(leaf).max() > 1e-6, path


@pytest.mark.slow
@pytest.mark.parametrize('name', NETS)
def test_bfloat16(name):
    model, variables, images = small(name, 'convnorm')
    half = create_model(name, num_classes=5, layer='convnorm', width=4, depth=(1, 2), dtype='bfloat16')
    apply = lambda m: jax.jit(functools.partial(m.apply, train=True, mutable=['batch_stats']))(variables, images)
    (logits, update), (exact, _) = apply(half), apply(model)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype('float32')}
    assert 1e-4 < np.abs(logits - exact).max() < 0.2 * np.abs(exact).max()
