"""The classifiers: what is built, how large it is, and what a pass does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.layers import LAYERS, make_layer
from convnorm_jax.models import MODELS, create_model
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

CIFAR = (1, 32, 32, 3)
BLOCKS = {
    'resnet18': (2, 2, 2, 2),
    'resnet34': (3, 4, 6, 3),
    'resnet50': (3, 4, 6, 3),
    'resnet101': (3, 4, 23, 3),
    'resnet152': (3, 8, 36, 3),
}
# Output channels in the order of the published lists; pools left out.
VGG = {
    'vgg11': '64 128 256 256 512 512 512 512',
    'vgg13': '64 64 128 128 256 256 512 512 512 512',
    'vgg16': '64 64 128 128 256 256 256 512 512 512 512 512 512',
    'vgg19': '64 64 128 128 256 256 256 256 512 512 512 512 512 512 512 512',
}


def shapes(model, input_shape=CIFAR, train=False):
    """(logits, variables) as shapes and dtypes, nothing computed."""
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=train),
        jax.ShapeDtypeStruct(input_shape, jnp.float32),
    )


def parameters(model, input_shape=CIFAR):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, input_shape)[1]['params']))


def convolutions(name, stem=3):
    """(k, cin, cout) of every convolution of a published ResNet: stem, stages, shortcuts."""
    bottleneck, found, cin = name in ('resnet50', 'resnet101', 'resnet152'), [(stem, 3, 64)], 64
    for stage, blocks in enumerate(BLOCKS[name]):
        width = 64 * 2**stage
        cout = 4 * width if bottleneck else width
        for _ in range(blocks):
            found += (
                [(1, cin, width), (3, width, width), (1, width, cout)]
                if bottleneck
                else [(3, cin, width), (3, width, width)]
            )
            if cin != cout:
                found.append((1, cin, cout))
            cin = cout
    return found, cin


# --- sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name,expected',
    [  # as counted for the well-known CIFAR ResNets of PyTorch
        ('resnet18', 11_173_962),
        ('resnet34', 21_282_122),
        ('resnet50', 23_520_842),
        ('resnet101', 42_512_970),
        ('resnet152', 58_156_618),
    ],
)
def test_resnet_parameters(name, expected):
    found, last = convolutions(name)
    by_hand = sum(k * k * cin * cout + 2 * cout for k, cin, cout in found) + last * 10 + 10
    assert by_hand == expected
    assert parameters(create_model(name, num_classes=10, layer='batchnorm')) == expected


@pytest.mark.parametrize('name,expected', [('resnet18', 11_689_512), ('resnet50', 25_557_032)])  # torchvision's
def test_imagenet_resnet_parameters(name, expected):
    found, last = convolutions(name, stem=7)
    assert sum(k * k * cin * cout + 2 * cout for k, cin, cout in found) + last * 1000 + 1000 == expected
    model = create_model(name, num_classes=1000, layer='batchnorm', stem='imagenet')
    assert parameters(model, (1, 224, 224, 3)) == expected


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_resnet_parameters_with_convnorm(name):
    found, last = convolutions(name)
    # A channel-wise k x k kernel and bias beside BatchNorm's scale and bias.
    by_hand = sum(k * k * cin * cout + (k * k + 1) * cout + 2 * cout for k, cin, cout in found) + last * 10 + 10
    assert parameters(create_model(name, num_classes=10, layer='convnorm')) == by_hand


@pytest.mark.parametrize('name', VGG)
@pytest.mark.parametrize('layer', ['batchnorm', 'convnorm', 'none'])
def test_vgg_parameters(name, layer):
    widths = [int(w) for w in VGG[name].split()]
    # Plain convolutions have a bias; ConvNorm has that of its channel-wise convolution.
    per_channel = {'batchnorm': 1 + 2, 'convnorm': 9 + 1 + 2, 'none': 1}[layer]
    by_hand = sum(9 * cin * cout + per_channel * cout for cin, cout in zip([3, *widths], widths)) + 512 * 10 + 10
    assert parameters(create_model(name, num_classes=10, layer=layer)) == by_hand


def test_small_nets_parameters():
    widths = [8, 8, 16, 16, 32, 32]
    by_hand = sum(9 * a * b + 3 * b for a, b in zip([3, *widths], widths)) + 512 * 10 + 10
    assert parameters(create_model('simple_cnn', num_classes=10, layer='batchnorm')) == by_hand
    by_hand = sum(k * k * a * b + 2 * b for k, a, b in [(5, 3, 6), (3, 6, 16), (3, 16, 20), (3, 20, 32)]) + 32 * 10 + 10
    assert parameters(create_model('simple_cnn2', num_classes=10, layer='batchnorm')) == by_hand


@pytest.mark.covering(1)
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('layer', LAYERS)
def test_every_name_builds(name, layer):
    if name in ('resnet101', 'resnet152', 'resnet34', 'vgg16', 'vgg19'):
        # The same blocks, more of them: one of each stage.
        stages = 4 if name.startswith('resnet') else 5
        model = create_model(name, num_classes=7, layer=layer, depth=(1,) * stages)
    else:
        model = create_model(name, num_classes=7, layer=layer)
    logits, variables = shapes(model)
    assert logits.shape == (1, 7) and logits.dtype == jnp.float32
    assert set(variables) <= {'params', 'batch_stats'}


@pytest.mark.parametrize('layer', ['convnorm', 'batchnorm'])
def test_training_and_evaluation_have_the_same_variables(layer):
    model = create_model('resnet50', num_classes=10, layer=layer, depth=(1, 1), width=4)
    assert shapes(model, train=True)[1] == shapes(model, train=False)[1]


def test_imagenet_stem_with_convnorm_at_its_own_size():
    # 7x7 at 224x224: a grid of 230x230. Nothing may be quadratic in it; see tests/layers/test_spectral.py.
    model = create_model('resnet18', num_classes=10, layer='convnorm', stem='imagenet', depth=(1,), width=4)
    _, variables = shapes(model, (1, 64, 64, 3))
    assert variables['batch_stats']['conv1']['preconditioner'].shape == (70, 70, 4)
    assert variables['batch_stats']['layer1_0']['conv1']['preconditioner'].shape == (18, 18, 4)


# --- overrides -----------------------------------------------------------------------------


def test_resnet_width_and_depth():
    model = create_model('resnet18', num_classes=10, layer='none', width=4, depth=(1, 2))
    _, variables = shapes(model)
    params = variables['params']
    assert set(params) == {'conv1', 'layer1_0', 'layer2_0', 'layer2_1', 'linear'}
    assert params['conv1']['conv']['kernel'].shape == (3, 3, 3, 4)
    assert params['layer2_0']['conv1']['conv']['kernel'].shape == (3, 3, 4, 8)
    assert params['layer2_0']['shortcut']['conv']['kernel'].shape == (1, 1, 4, 8)
    assert 'shortcut' not in params['layer1_0'] and 'shortcut' not in params['layer2_1']
    assert params['linear']['kernel'].shape == (8, 10)


def test_plain_width_and_depth():
    _, variables = shapes(create_model('vgg11', num_classes=10, layer='none', width=4, depth=[2, 1]))
    params = variables['params']
    assert set(params) == {'conv1_1', 'conv1_2', 'conv2_1', 'linear'}
    assert params['conv2_1']['conv']['kernel'].shape == (3, 3, 4, 8)
    assert params['linear']['kernel'].shape == (8 * 8 * 8, 10)


def test_simple_cnn2_width_keeps_the_proportion():
    _, variables = shapes(create_model('simple_cnn2', num_classes=10, layer='none', width=12))
    assert [variables['params'][f'conv{i}']['conv']['kernel'].shape[-1] for i in (1, 2, 3, 4)] == [12, 32, 40, 64]


def test_layer_options_reach_the_layers():
    model = create_model('resnet18', num_classes=10, layer='convnorm', width=4, depth=(1,), use_batch_norm=False)
    _, variables = shapes(model)
    assert set(variables['batch_stats']['conv1']) == {'preconditioner', 'count'}


def test_a_constructor_in_place_of_a_name():
    ours = create_model('resnet18', num_classes=10, layer=make_layer('groupnorm', groups=2), width=4, depth=(1,))
    named = create_model('resnet18', num_classes=10, layer='groupnorm', groups=2, width=4, depth=(1,))
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(named.init)(jax.random.key(0), x)
    np.testing.assert_array_equal(jax.jit(ours.apply)(variables, x), jax.jit(named.apply)(variables, x))


@pytest.mark.parametrize('name,places', [('resnet18', 2), ('resnet50', 4), ('vgg11', 1), ('simple_cnn2', 4)])
def test_shifted_relu(name, places):
    options = {} if name == 'simple_cnn2' else dict(width=4, depth=(1,))
    _, variables = shapes(create_model(name, num_classes=10, layer='none', activation='shifted_relu', **options))
    leaves = jax.tree_util.tree_flatten_with_path(variables['params'])[0]
    assert sum(path[-1].key == 'shift' for path, _ in leaves) == places


# --- passes --------------------------------------------------------------------------------


@functools.cache
def small(name, layer, dtype='float32'):
    """(model, variables, images, jitted apply) of a small net."""
    depth = None if name == 'simple_cnn2' else (1, 1)
    size = 32 if name == 'simple_cnn2' else 8
    model = create_model(name, num_classes=5, layer=layer, width=4, depth=depth, dtype=dtype)
    images = np.random.default_rng(1).standard_normal((4, size, size, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    apply = jax.jit(lambda v, x, train: model.apply(v, x, train=train, mutable=['batch_stats']), static_argnums=2)
    return model, variables, images, apply


SMALL = [
    ('resnet18', 'convnorm'),
    pytest.param('resnet50', 'batchnorm', marks=pytest.mark.slow),
    pytest.param('vgg11', 'convnorm', marks=pytest.mark.slow),
    pytest.param('simple_cnn2', 'convnorm', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('name,layer', SMALL)
def test_training_changes_the_state_and_evaluation_never(name, layer):
    _, variables, images, apply = small(name, layer)
    logits, update = apply(variables, images, True)
    assert logits.shape == (4, 5) and np.all(np.isfinite(logits))
    assert jax.tree.structure(update['batch_stats']) == jax.tree.structure(variables['batch_stats'])
    for path, leaf in jax.tree_util.tree_flatten_with_path(update['batch_stats'])[0]:
        before = functools.reduce(lambda tree, k: tree[k.key], path, variables['batch_stats'])
        if path[-1].key in ('mean', 'var', 'count'):  # the first update's spectrum is the initial one
            assert np.any(np.asarray(leaf) != before), path
    trained = {**variables, **update}
    _, after = apply(trained, images, False)
    jax.tree.map(np.testing.assert_array_equal, after['batch_stats'], trained['batch_stats'])


@pytest.mark.parametrize('name,layer', SMALL)
def test_evaluation_of_an_image_does_not_see_the_others(name, layer):
    _, variables, images, apply = small(name, layer)
    logits, _ = apply(variables, images, False)
    mixed = np.concatenate([images[:1], 3 * images[:0:-1] + 1])
    again, _ = apply(variables, mixed, False)
    # The same float32 operations on another batch.
    np.testing.assert_allclose(again[0], logits[0], rtol=1e-5, atol=1e-6)
    assert np.abs(again[1] - logits[1]).max() > 1e-4
    in_training = [apply(variables, x, True)[0][0] for x in (images, mixed)]
    assert np.abs(in_training[0] - in_training[1]).max() > 1e-3  # BatchNorm does


def test_train_is_off_by_default():
    model, variables, images, apply = small('resnet18', 'convnorm')
    expected, _ = apply(variables, images, False)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name,layer', [('resnet18', 'convnorm'), ('vgg11', 'batchnorm')])
def test_bfloat16(name, layer):
    _, variables, images, apply = small(name, layer, 'bfloat16')
    for leaf in jax.tree.leaves(variables):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    logits, update = apply(variables, images, True)
    exact, _ = small(name, layer)[3](variables, images, True)
    assert logits.dtype == jnp.float32
    # Some five layers of about ten roundings of 2^-9 each, over values that BatchNorm keeps of order
    # one: a few per cent. No rounding at all would say that the computation was not in bfloat16.
    assert 1e-4 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()
    assert jax.tree.map(lambda a: a.dtype, update['batch_stats']) == jax.tree.map(
        lambda a: a.dtype, variables['batch_stats']
    )


@pytest.mark.parametrize('layer', few(LAYERS, 'convnorm', 'oni', 'spectralnorm', 'switchnorm'))
def test_every_parameter_of_a_net_learns(layer):
    model = create_model('resnet18', num_classes=5, layer=layer, width=4, depth=(1, 1))
    images = np.random.default_rng(2).standard_normal((4, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = model.apply({**variables, 'params': params}, images, train=True, mutable=['batch_stats'])
            return jax.nn.logsumexp(logits, axis=-1).sum() - logits[:, 0].sum()

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(variables['params']))[0]:
        assert np.all(np.isfinite(leaf)), path
        before_batch_norm = path[-1].key == 'affine_bias' or (path[-2].key, path[-1].key) == ('conv', 'scale')
        if not before_batch_norm:  # which undoes it: the gradient is zero but for rounding
            assert np.abs(leaf).max() > 1e-6, path


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(name='resnet20'), 'resnet20.*resnet18.*vgg19.*simple_cnn'),
        (dict(layer='conv'), "layer='conv'.*convnorm.*batchnorm"),
        (dict(layer='batchnorm', use_affine=False), "layer='batchnorm'.*'use_affine'"),
        (dict(activation='gelu'), "activation='gelu'.*shifted_relu"),
        (dict(dtype='float16'), "dtype='float16'.*float32.*bfloat16"),
        (dict(stem='tiny'), "stem='tiny'.*cifar.*imagenet"),
        (dict(name='vgg11', stem='cifar'), "stem='cifar'.*vgg11"),
        (dict(num_classes=1), 'num_classes=1'),
        (dict(width=0), 'width=0'),
        (dict(depth=()), r'depth=\(\)'),
        (dict(depth=(1, 0)), r'depth=\(1, 0\)'),
        (dict(depth=(1,) * 5), r'depth=\(1, 1, 1, 1, 1\).*1 to 4'),
        (dict(name='simple_cnn', depth=(1,) * 4), r'depth=.*1 to 3'),
        (dict(name='simple_cnn2', depth=(1,)), 'depth=.*simple_cnn2'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{'name': 'resnet18', 'num_classes': 10, 'layer': 'batchnorm', **options})


@pytest.mark.slow
@pytest.mark.parametrize('name,depth', [('resnet18', (1, 2)), ('simple_cnn', (1, 2)), ('simple_cnn2', None)])
@pytest.mark.parametrize(
    'layer,option', [('spectralnorm', 'iterations'), ('groupnorm', 'groups'), ('oni', 'iterations')]
)
@pytest.mark.parametrize('kind', [np.int64, np.uint8])
def test_numpy_integers_are_taken(name, depth, layer, option, kind):
    sizes = {'num_classes': 10, 'width': 6, option: 6}
    given = {name: kind(size) for name, size in sizes.items()} | {'depth': depth and np.array(depth, kind)}
    expected, found = (
        shapes(create_model(name, layer=layer, **options)) for options in (sizes | {'depth': depth}, given)
    )
    assert expected == found


@pytest.mark.parametrize('options', [{'width': True}, {'num_classes': np.float64(10)}, {'depth': (True, 1)}])
def test_what_is_no_integer(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))}=.*expected'):
        create_model('resnet18', **{'num_classes': 10, 'layer': 'batchnorm', **options})


def test_options_beside_a_constructor_are_not_dropped():
    with pytest.raises(ValueError, match='groups'):
        create_model('resnet18', num_classes=10, layer=make_layer('groupnorm'), groups=2)


@pytest.mark.parametrize(
    'name,size,message',
    [('vgg11', 16, '16x16.*32x32'), ('simple_cnn', 4, '4x4.*8x8'), ('simple_cnn2', 28, '28x28.*32x32')],
)
def test_pictures_too_small(name, size, message):
    with pytest.raises(ValueError, match=message):
        shapes(create_model(name, num_classes=10, layer='none'), (1, size, size, 3))
