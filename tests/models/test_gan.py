"""Generators and discriminators: shapes, sizes, golden values of torch_mimicry's SNGAN-32, every layer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.layers import DENSE_LAYERS, LAYERS
from convnorm_jax.models import GANS, create_gan
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

SIZES = [('sngan', n) for n in (8, 16, 32, 48, 64)] + [('dcgan', n) for n in (8, 16, 32, 64)]
LATENT = 6


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tiny(name, size, channels=3, **options):
    """A narrow GAN; the widths of SNGAN-48 and -64 are multiples of 16."""
    widths = (16, 16) if name == 'sngan' and size > 32 else (4, 4) if name == 'sngan' else (2, 2)
    defaults = dict(latent=LATENT, generator_width=widths[0], discriminator_width=widths[1])
    return create_gan(name, picture_shape=(size, size, channels), **{**defaults, **options})


def init(net, x, labels=None):
    return jax.jit(lambda x: net.init(jax.random.key(0), x, labels, train=False))(x)


def train(net, variables, x, labels=None):
    """(output, variables after the update) of one training pass."""
    y, update = jax.jit(lambda v, x, y: net.apply(v, x, y, train=True, mutable=['batch_stats']))(variables, x, labels)
    return y, {**variables, **update}


def evaluate(net, variables, x, labels=None):
    return jax.jit(lambda v, x, y: net.apply(v, x, y, train=False))(variables, x, labels)


def shapes(net, *x):
    """Variables, and the output in training, as shapes."""
    variables = jax.eval_shape(lambda *x: net.init(jax.random.key(0), *x, train=False), *x)
    y, _ = jax.eval_shape(lambda v, *x: net.apply(v, *x, train=True, mutable=['batch_stats']), variables, *x)
    return variables, y


def size_of(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.covering(1)
@pytest.mark.parametrize('num_classes', [0, 3])
@pytest.mark.parametrize('name,size', SIZES)
def test_shapes(name, size, num_classes):
    generator, discriminator = tiny(name, size, channels=1 if size == 8 else 3, num_classes=num_classes)
    picture_shape = (size, size, 1 if size == 8 else 3)
    labels = jnp.zeros((2,), jnp.int32)
    for given in [labels] if num_classes else [None, labels]:  # without classes, labels are not looked at
        _, images = shapes(generator, jnp.zeros((2, LATENT)), given)
        assert (images.shape, images.dtype) == ((2, *picture_shape), jnp.float32)
        _, logits = shapes(discriminator, jnp.zeros((2, *picture_shape)), given)
        assert (logits.shape, logits.dtype) == ((2,), jnp.float32)


@pytest.mark.parametrize('name', few(GANS, 'dcgan'))
def test_a_forward_pass(name):
    generator, discriminator = tiny(name, 8, num_classes=3)
    labels, z = jnp.array([0, 1, 2, 0]), random(0, 4, LATENT)
    made = init(generator, z, labels)
    images, _ = train(generator, made, z, labels)
    assert -1 <= images.min() < images.max() <= 1
    assert np.std(images) > 1e-3
    judged = init(discriminator, images, labels)
    logits, _ = train(discriminator, judged, images, labels)
    assert np.all(np.isfinite(logits)) and np.std(logits) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    'size,num_classes,generator_parameters,discriminator_parameters',
    [
        (32, 0, 4276739, 1053825),
        (48, 0, 4878083, 10141441),
        (64, 0, 12220675, 10141441),
        (32, 10, 4304387, 1055105),  # cGAN-PD
    ],
)
def test_parameters_of_the_reference(size, num_classes, generator_parameters, discriminator_parameters):
    # Counted in torch_mimicry's nets.
    generator, discriminator = create_gan('sngan', picture_shape=(size, size, 3), num_classes=num_classes)
    labels = jnp.zeros((1,), jnp.int32)
    assert size_of(shapes(generator, jnp.zeros((1, 128)), labels)[0]['params']) == generator_parameters
    assert size_of(shapes(discriminator, jnp.zeros((1, size, size, 3)), labels)[0]['params']) == (
        discriminator_parameters
    )


def test_parameters_of_dcgan():
    """The paper's generator, 1024 to 128 channels, counted by hand."""
    generator, discriminator = create_gan('dcgan', picture_shape=(64, 64, 3), latent=100)
    channels = (100, 1024, 512, 256, 128, 3)
    taps = sum(16 * a * b + b for a, b in itertools.pairwise(channels))
    batch_norm = 2 * sum(channels[1:-1])
    assert size_of(shapes(generator, jnp.zeros((1, 100)))[0]['params']) == taps + batch_norm
    channels = (3, 64, 128, 256, 512)
    taps = sum(16 * a * b + b for a, b in itertools.pairwise(channels))
    assert size_of(shapes(discriminator, jnp.zeros((1, 64, 64, 3)))[0]['params']) == taps + 16 * 512 + 1


@pytest.mark.slow
@pytest.mark.parametrize('name', GANS)
def test_statistics_move_in_training_only(name):
    _, discriminator = tiny(name, 8)
    x = random(1, 2, 8, 8, 3)
    variables = init(discriminator, x)
    assert set(variables) == {'params', 'batch_stats'}
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(variables['batch_stats'])}
    assert names == {'u', 'v'}  # spectral norm of every layer, no BatchNorm
    evaluated = jax.jit(lambda v: discriminator.apply(v, x, mutable=['batch_stats']))(variables)[1]
    jax.tree.map(np.testing.assert_array_equal, evaluated['batch_stats'], variables['batch_stats'])
    _, after = train(discriminator, variables, x)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after['batch_stats'], variables['batch_stats'])
    assert any(jax.tree.leaves(moved))


@pytest.mark.slow
@pytest.mark.parametrize('name', GANS)
def test_the_label_changes_the_output(name):
    generator, discriminator = tiny(name, 8, num_classes=2)
    zeros, ones = jnp.zeros((2,), jnp.int32), jnp.ones((2,), jnp.int32)
    z, x = random(2, 2, LATENT), random(3, 2, 8, 8, 3)
    made, judged = init(generator, z, zeros), init(discriminator, x, zeros)
    # Classes start equal in the conditional BatchNorm.
    made = jax.tree.map(lambda a: a + 0.5 * random(4, *a.shape), made)
    made['batch_stats'] = jax.tree.map(np.abs, made['batch_stats'])
    for net, variables, given in [(generator, made, z), (discriminator, judged, x)]:
        first, second = (evaluate(net, variables, given, labels) for labels in (zeros, ones))
        assert np.abs(first - second).max() > 1e-3


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('name', GANS)
@pytest.mark.parametrize('dense', DENSE_LAYERS)
def test_projection_term(name, dense):
    """logit = linear(features) + <embedding[label], pooled features>, against NumPy."""
    _, discriminator = tiny(name, 8, num_classes=3, dense=dense)
    x, labels = random(5, 3, 8, 8, 3), jnp.array([2, 0, 1])
    variables = init(discriminator, x, labels)
    head = variables['params']['head']
    logits, state = discriminator.apply(
        variables, x, labels, mutable=['intermediates'], capture_intermediates=lambda m, _: m.name == 'head'
    )
    assert np.array_equal(state['intermediates']['head']['__call__'][0], logits)
    zeroed = jax.tree.map(lambda a: a, variables)
    zeroed['params']['head']['embedding']['kernel'] = jnp.zeros_like(head['embedding']['kernel'])
    # The pooled features, by the derivative of the linear projection with respect to the unnormalized embedding.
    embedding = np.asarray(head['embedding']['kernel'], np.float64)
    scale = 1.0
    if dense == 'spectralnorm':
        stats = variables['batch_stats']['head']['embedding']
        scale = 1 / float(np.asarray(stats['v'], np.float64) @ embedding @ np.asarray(stats['u'], np.float64))
    last = 'block3' if name == 'sngan' else 'conv1'
    features = discriminator.apply(
        variables, x, labels, mutable=['intermediates'], capture_intermediates=lambda m, _: m.name == last
    )[1]['intermediates'][last]['__call__'][0]
    features = np.asarray(features, np.float64)
    pooled = np.where(features > 0, features, 0 if name == 'sngan' else 0.2 * features).sum((1, 2))
    difference = logits - evaluate(discriminator, zeroed, x, labels)
    expected = (embedding[np.asarray(labels)] * scale * pooled).sum(-1)
    np.testing.assert_allclose(difference, expected, atol=2e-5 * np.abs(pooled).max())


@pytest.mark.covering(1)
@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('name', GANS)
def test_every_layer(name, layer):
    generator, discriminator = tiny(name, 8, generator_layer=layer, discriminator_layer=layer)
    _, images = shapes(generator, jnp.zeros((2, LATENT)))
    _, logits = shapes(discriminator, jnp.zeros((2, 8, 8, 3)))
    assert images.shape == (2, 8, 8, 3) and logits.shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize('name', few(GANS, 'sngan'))
def test_convnorm_in_both_nets_trains(name):
    generator, discriminator = tiny(name, 8, generator_layer='convnorm', discriminator_layer='convnorm')
    z = random(6, 4, LATENT)
    made = init(generator, z)
    images, after = train(generator, made, z)
    judged = init(discriminator, images)
    assert not any('batch_norm' in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(judged))

    @jax.jit
    def gradients(made, judged):
        def loss(made_params, judged_params):
            images, _ = generator.apply({**made, 'params': made_params}, z, train=True, mutable=['batch_stats'])
            variables = {**judged, 'params': judged_params}
            return discriminator.apply(variables, images, train=True, mutable=['batch_stats'])[0].sum()

        return jax.grad(loss, (0, 1))(made['params'], judged['params'])

    for leaf in jax.tree.leaves(gradients(after, judged)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize('name', few(GANS, 'dcgan'))
def test_gradient_penalty(name):
    """The gradient of a discriminator's gradient: what a gradient penalty trains on."""
    _, discriminator = tiny(name, 8)
    x = random(7, 2, 8, 8, 3)
    variables = init(discriminator, x)

    @jax.jit
    def penalty_gradient(params):
        def penalty(params):
            judge = lambda x: discriminator.apply({**variables, 'params': params}, x).sum()
            return jnp.square(jax.grad(judge)(x)).sum()

        return jax.grad(penalty)(params)

    leaves = jax.tree.leaves(penalty_gradient(variables['params']))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves) and max(np.abs(leaf).max() for leaf in leaves) > 0


def test_where_dcgan_has_no_normalization():
    _, discriminator = tiny('dcgan', 16, discriminator_layer='batchnorm')
    params = shapes(discriminator, jnp.zeros((2, 16, 16, 3)))[0]['params']
    assert [name for name in params if 'norm' in params[name]] == ['conv2']
    generator, discriminator = tiny('dcgan', 16)
    params = shapes(generator, jnp.zeros((2, LATENT)))[0]['params']
    assert [name for name in params if 'norm' in params[name]] == ['conv1', 'conv2']
    stats = shapes(discriminator, jnp.zeros((2, 16, 16, 3)))[0]['batch_stats']
    assert set(stats) == {'conv1', 'conv2', 'head'}  # spectral norm everywhere


@pytest.mark.parametrize('name', GANS)
def test_use_batch_norm_by_request(name):
    options = dict(discriminator_layer='oni', discriminator_options=dict(use_batch_norm=True))
    for given, expected in [({}, False), (options, True)]:
        params = shapes(tiny(name, 16, **given)[1], jnp.zeros((2, 16, 16, 3)))[0]['params']
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        assert any("'norm'" in name for name in names) == expected


@pytest.mark.parametrize('name', GANS)
def test_bfloat16(name):
    generator, discriminator = tiny(name, 8, num_classes=2, dtype='bfloat16')
    labels = jnp.zeros((2,), jnp.int32)
    for net, x in [(generator, jnp.zeros((2, LATENT))), (discriminator, jnp.zeros((2, 8, 8, 3)))]:
        variables, y = shapes(net, x, labels)
        assert y.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
        jaxpr = str(jax.make_jaxpr(lambda v, x: net.apply(v, x, labels))(variables, x))  # noqa: B023
        assert 'bf16' in jaxpr


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(name='biggan'), "model.name='biggan'.*sngan.*dcgan"),
        (dict(picture_shape=(28, 28, 1)), 'picture_shape=.28, 28, 1.*8, 16, 32, 48, 64'),
        (dict(picture_shape=(48, 48, 3), name='dcgan'), 'picture_shape=.48.*8, 16, 32, 64'),
        (dict(picture_shape=(32, 16, 3)), 'picture_shape='),
        (dict(picture_shape=(32, 32)), 'picture_shape='),
        (dict(picture_shape=(48, 48, 3), generator_width=12), 'generator_width=12: expected a multiple of 8'),
        (dict(picture_shape=(64, 64, 3), discriminator_width=24), 'discriminator_width=24.*multiple of 16'),
        (dict(generator_width=0), 'generator_width=0'),
        (dict(discriminator_width=2.5), 'discriminator_width=2.5'),
        (dict(latent=0), 'latent=0'),
        (dict(num_classes=-1), 'num_classes=-1'),
        (dict(dense='batchnorm'), "dense='batchnorm'.*none.*spectralnorm"),
        (dict(dtype='float16'), "dtype='float16'.*float32.*bfloat16"),
        (dict(discriminator_layer='spectral'), "layer='spectral'"),
        (dict(generator_layer='spectral'), "layer='spectral'"),
        (dict(discriminator_options=dict(colour=1)), "no option 'colour'"),
        (dict(name='dcgan', generator_layer='spectralnorm', generator_options=dict(mode='conv')), "mode='conv'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_gan(**{'name': 'sngan', 'picture_shape': (32, 32, 3), **options})


@pytest.mark.parametrize('name', GANS)
def test_numpy_integers_are_taken(name):
    sizes = {'latent': LATENT, 'num_classes': 2, 'generator_width': 8, 'discriminator_width': 8}
    options = {'iterations': 2}

    def found(kind):
        given = {key: kind(value) for key, value in sizes.items()}
        nets = create_gan(
            name,
            picture_shape=tuple(map(kind, (8, 8, 3))),
            discriminator_layer='spectralnorm',
            discriminator_options={key: kind(value) for key, value in options.items()},
            **given,
        )
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, LATENT), (2, 8, 8, 3))]
        labels = jax.ShapeDtypeStruct((2,), jnp.int32)
        init = lambda net: lambda *given: net.init(jax.random.key(0), *given, train=False)
        return [jax.eval_shape(init(net), x, labels) for net, x in zip(nets, inputs)]

    assert found(int) == found(np.int64)


@pytest.mark.parametrize('name', GANS)
def test_wrong_inputs(name):
    generator, discriminator = tiny(name, 8, num_classes=2)
    z, x, labels = jnp.zeros((2, LATENT)), jnp.zeros((2, 8, 8, 3)), jnp.zeros((2,), jnp.int32)
    for net, given, message in [
        (generator, (z[:, :-1], labels), 'z.shape='),
        (generator, (z, None), 'labels.shape=None'),
        (generator, (z, labels[:1]), 'labels.shape=.1,'),
        (discriminator, (x[:, :4], labels), 'images.shape='),
        (discriminator, (x, None), 'labels.shape=None'),
    ]:
        with pytest.raises(ValueError, match=message):
            shapes(net, *given)


# --- golden values ---------------------------------------------------------------------------

# torch_mimicry's names of a block's and a net's parts -> ours.
PARTS = {
    'c1': ('conv1', 'conv'),
    'c2': ('conv2', 'conv'),
    'c_sc': ('shortcut', 'conv'),
    'c5': ('to_picture', 'conv'),
    'b1': ('norm1',),
    'b2': ('norm2',),
    'b5': ('norm',),
    'l1': ('linear',),
    'l5': ('head', 'linear'),
    'l_y': ('head', 'embedding'),
}


def channels_last(a):
    """The first layer's outputs, [..., 4 channels x 4 x 4] -> [..., 4 x 4 x 4 channels]."""
    return np.moveaxis(a.reshape(*a.shape[:-1], 4, 4, 4), -3, -1).reshape(a.shape)


def published(golden, net, first_block):
    """The published state of one net as ((collection, *path), array) of ours."""
    for key, value in golden.items():
        if not key.startswith(f'{net}/state/'):
            continue
        *block, part, kind = key.removeprefix(f'{net}/state/').replace('embed.weight', 'embed').split('.')
        path = (*(f'block{int(name[5:]) - first_block + 1}' for name in block), *PARTS[part])
        kind = kind.removesuffix('_orig')
        if kind == 'embed':  # scales, then biases
            yield from zip([('params', *path, name) for name in ('scale', 'bias')], np.split(value, 2, axis=1))
        elif part in ('b1', 'b2', 'b5'):
            yield ('params', *path, 'batch_norm', 'scale' if kind == 'weight' else 'bias'), value
        elif kind in ('weight_u', 'weight_v'):
            # An embedding's matrix is our kernel itself, a linear layer's is its transpose.
            swapped = {'u': 'v', 'v': 'u'} if part == 'l_y' else {'u': 'u', 'v': 'v'}
            yield ('batch_stats', *path, swapped[kind[-1]]), value
        elif kind == 'bias':
            yield ('params', *path, 'bias'), channels_last(value) if part == 'l1' else value
        else:
            kernel = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value if part == 'l_y' else value.T
            yield ('params', *path, 'kernel'), channels_last(kernel) if part == 'l1' else kernel


def load(variables, state):
    """The variables with the given leaves; every parameter and singular vector must be given."""
    leaves = {tuple(k.key for k in path): a for path, a in jax.tree_util.tree_leaves_with_path(variables)}
    given = dict(state)
    assert {path: a.shape for path, a in given.items()} == {
        path: a.shape for path, a in leaves.items() if path[-1] not in ('mean', 'var')
    }
    return jax.tree_util.tree_map_with_path(lambda path, a: given.get(tuple(k.key for k in path), a), variables)


@pytest.fixture(scope='module', params=[pytest.param('plain', marks=pytest.mark.slow), 'classes'])
def golden_gan(request, load_golden, nhwc):
    """(golden values of one GAN by name, generator, discriminator, latents, pictures NHWC, labels or None)."""
    golden = load_golden('sngan32')
    classes = request.param == 'classes'
    labels = jnp.asarray(golden['labels']) if classes else None
    nets = create_gan(
        'sngan',
        picture_shape=(32, 32, 3),
        latent=8,
        num_classes=5 if classes else 0,
        generator_width=4,
        discriminator_width=4,
    )
    own = {key.removeprefix(f'{request.param}/'): a for key, a in golden.items() if key.startswith(request.param)}
    return own, *nets, golden['z'], nhwc(golden['images']), labels


def test_golden_generator(golden_gan, nhwc):
    golden, generator, _, z, _, labels = golden_gan
    variables = load(init(generator, z, labels), published(golden, 'generator', 2))
    images, variables = train(generator, variables, z, labels)
    np.testing.assert_allclose(images, nhwc(golden['generator/train']), atol=1e-4)
    images = evaluate(generator, variables, z, labels)
    np.testing.assert_allclose(images, nhwc(golden['generator/eval']), atol=1e-4)


def test_golden_discriminator(golden_gan, nhwc):
    golden, _, discriminator, _, x, labels = golden_gan
    variables = load(init(discriminator, x, labels), published(golden, 'discriminator', 1))
    logits, variables = train(discriminator, variables, x, labels)
    scale = np.abs(golden['discriminator/train']).max()
    np.testing.assert_allclose(logits, golden['discriminator/train'][:, 0], atol=1e-4 * scale)
    for kind in ('', '_rectified'):
        net = discriminator.clone(rectified_shortcuts=bool(kind))

        def total(params, x, net=net):
            logits = net.apply({**variables, 'params': params}, x, labels)
            return logits.sum(), logits

        (by_params, by_images), logits = jax.jit(jax.grad(total, (0, 1), has_aux=True))(variables['params'], x)
        for ours, theirs in [
            (logits, golden[f'discriminator/eval{kind}'][:, 0]),
            (by_images, nhwc(golden[f'discriminator/grad_images{kind}'])),
            (by_params['head']['linear']['kernel'], golden[f'discriminator/grad_linear{kind}'].T),
        ]:
            np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
