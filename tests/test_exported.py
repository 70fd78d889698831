"""Exported nets: the file gives what the net gives, in a process without the net's code, or says why not."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

from convnorm_jax import (
    ConvNorm,
    ConvNormTranspose,
    fold_for_inference,
    load_exported,
    save_exported,
    save_exported_generator,
)
from convnorm_jax.errors import UserError
from convnorm_jax.exported import container
from convnorm_jax.layers.folding import without_originals
from convnorm_jax.models import create_gan, create_model
from convnorm_jax.steps.classify import make_logits_fn
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def shaken(variables, seed=0):
    """Variables with every number moved: statistics and scales that are not those of the start."""
    random = np.random.default_rng(seed)

    def move(path, leaf):
        leaf = np.asarray(leaf * random.uniform(0.7, 1.3, leaf.shape).astype(leaf.dtype) + leaf.dtype.type(0.05))
        if path[-1].key == 'preconditioner':  # of a real filter: even
            axes = tuple(range(leaf.ndim - 1))
            leaf = (leaf + np.roll(np.flip(leaf, axes), 1, axes)) / 2
        return leaf

    return jax.tree_util.tree_map_with_path(move, variables)


def initial(model, shape, dtype=np.float32):
    return shaken(jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(np.zeros((1, *shape), dtype)))


def pixels(batch, shape, dtype=np.float32):
    return np.random.default_rng(batch).random((batch, *shape)).astype(dtype)


def assert_equal(found, expected, share=1e-5):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = (np.asarray(array, np.float64) for array in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())
    assert np.abs(expected).max() > 0


def assert_equal_for_batches(net, inputs, expected, share=1e-5):
    """For all examples at once, and for the first two."""
    assert_equal(net(*inputs), expected, share)
    assert_equal(net(*(array[:2] for array in inputs)), expected[:2], share)


class Layers(nn.Module):
    """Convolutions by (layer, features, kernel size, options)."""

    layers: tuple

    @nn.compact
    def __call__(self, x, train=False):
        for layer, features, kernel_size, options in self.layers:
            x = nn.relu(layer(features, kernel_size, **dict(options))(x, not train))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def layers(*given):
    return Layers(tuple((layer, features, size, tuple(options.items())) for layer, features, size, options in given))


# --- equal to the net -----------------------------------------------------------------------------

NETS = {
    f'{name}-{layer}': (name, layer, options)
    for name, layer, options in [
        ('simple_cnn', 'convnorm', {'depth': (1, 1)}),
        ('resnet18', 'convnorm', {'depth': (1, 1, 1, 1)}),
        ('vgg11', 'convnorm', {}),
        ('simple_cnn', 'batchnorm', {'depth': (1, 1)}),
        ('resnet18', 'batchnorm', {'depth': (1, 1, 1, 1)}),
        ('simple_cnn', 'oni', {'depth': (1,)}),
    ]
}


@pytest.mark.parametrize('key', few(NETS, 'simple_cnn-convnorm', 'simple_cnn-oni'))
def test_every_net(key, tmp_path):
    name, layer, options = NETS[key]
    model, shape = create_model(name, num_classes=7, layer=layer, width=4, **options), (32, 32, 3)
    variables, path = initial(model, shape), tmp_path / 'net'
    config = {'model': {'name': name, 'depth': [1]}, 'seed': None}
    save_exported(path, model, variables, shape, mean=MEAN, std=STD, config=config)
    net = load_exported(path)
    assert (net.image_shape, net.dtype, net.platforms) == (shape, np.float32, ('cpu', 'cuda', 'tpu'))
    assert net.config == config and net.folded == (layer == 'convnorm') and net.kind == 'classifier'
    assert net.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    assert net.outputs == ({'name': 'logits', 'shape': [7], 'dtype': 'float32'},)
    x = pixels(5, shape)
    assert_equal_for_batches(net, (x,), jax.jit(make_logits_fn(model, MEAN, STD))(variables, x))


CONVNORM = {
    '1-D': (
        (12, 3),
        layers(
            (ConvNorm, 8, (5,), {'strides': 2}),
            (ConvNorm, 8, (3,), {'feature_group_count': 4, 'kernel_dilation': 2, 'padding': 'CIRCULAR'}),
            (ConvNormTranspose, 6, (4,), {}),
        ),
    ),
    '2-D': (
        (9, 8, 4),
        layers(
            (ConvNorm, 8, (3, 3), {'feature_group_count': 4}),
            (ConvNorm, 8, (3, 2), {'kernel_dilation': (2, 1), 'padding': 'VALID', 'use_batch_norm': False}),
            (ConvNorm, 8, (3, 3), {'padding': 'CIRCULAR', 'strides': (1, 2), 'use_affine': False}),
            (ConvNorm, 8, (1, 1), {'strides': 2}),
            (ConvNormTranspose, 6, (4, 4), {'spectrum': 'exact'}),
        ),
    ),
    '3-D': (
        (4, 5, 6, 2),
        layers(
            (ConvNorm, 4, (3, 3, 3), {'strides': (1, 2, 2)}),
            (ConvNorm, 4, (2, 2, 2), {'feature_group_count': 2, 'padding': 'VALID'}),
            (ConvNormTranspose, 3, (2, 2, 2), {'padding': 0}),
        ),
    ),
    'methods': (
        (8, 8, 3),
        layers(*((ConvNorm, 6, (3, 3), {'method': method}) for method in ('frequency', 'spatial', 'reference'))),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CONVNORM)
def test_every_geometry(name, tmp_path):
    shape, model = CONVNORM[name]
    variables, path = initial(model, shape), tmp_path / 'net'
    save_exported(path, model, variables, shape)
    net, x, apply = load_exported(path), pixels(9, shape), jax.jit(model.apply)
    assert net.folded and net.image_shape == shape
    expected = apply(variables, x)
    assert_equal_for_batches(net, (x,), expected, 3e-5)
    # What the program of other platforms takes, by this one's.
    folded = without_originals(fold_for_inference(model, variables, x, platform='cuda'))
    assert_equal(apply(folded, x), expected, 3e-5)


@pytest.mark.parametrize(
    'model_dtype,dtype',
    [
        pytest.param('bfloat16', 'float32', marks=pytest.mark.slow),
        ('bfloat16', 'bfloat16'),
        pytest.param('float32', 'float16', marks=pytest.mark.slow),
    ],
)
def test_other_dtypes(model_dtype, dtype, tmp_path):
    shape = (8, 8, 3)
    model = create_model('simple_cnn', num_classes=5, layer='convnorm', width=4, depth=(1, 1), dtype=model_dtype)
    variables, path = initial(model, shape), tmp_path / 'net'
    save_exported(path, model, variables, shape, mean=MEAN, std=STD, dtype=dtype)
    net, x = load_exported(path), pixels(4, shape, jnp.dtype(dtype))
    assert net.dtype == jnp.dtype(dtype)
    assert_equal(net(x), jax.jit(make_logits_fn(model, MEAN, STD))(variables, x), 5e-2)


def test_64_bits(tmp_path):
    shape, path = (8, 8, 3), tmp_path / 'net'
    with jax.enable_x64(True):
        model = layers((ConvNorm, 6, (3, 3), {'param_dtype': jnp.float64}))
        variables, x = initial(model, shape, np.float64), pixels(3, shape, np.float64)
        save_exported(path, model, variables, shape, dtype='float64')
        assert_equal(load_exported(path)(x), model.apply(variables, x), 1e-12)
    with pytest.raises(UserError, match=r"computes in 64 bits; call jax\.config\.update\('jax_enable_x64', True\)"):
        load_exported(path)
    with pytest.raises(UserError, match='dtype=float64: call jax'):
        save_exported(path, model, variables, shape, dtype='float64')


def test_a_net_exported_in_32_bits_runs_with_64_switched_on(small):
    with jax.enable_x64(True):
        assert_equal(load_exported(small.path)(small.x), small.expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name,layer,classes',
    [
        ('sngan', 'convnorm', 3),
        pytest.param('dcgan', 'convnorm', 0, marks=pytest.mark.slow),
        pytest.param('sngan', 'none', 0, marks=pytest.mark.slow),
    ],
)
def test_a_generator(name, layer, classes, tmp_path):
    generator, _ = create_gan(
        name,
        picture_shape=(16, 16, 3),
        latent=6,
        generator_width=4,
        discriminator_width=4,
        generator_layer=layer,
        num_classes=classes,
    )
    z = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    labels = np.arange(5, dtype=np.int32) % 3 if classes else None
    variables = shaken(jax.jit(lambda z, y: generator.init(jax.random.key(0), z, y, train=False))(z, labels))
    path = tmp_path / 'generator'
    save_exported_generator(path, generator, variables, 6, num_classes=classes)
    net = load_exported(path)
    assert net.kind == 'generator' and net.image_shape == (16, 16, 3) and net.folded == (layer == 'convnorm')
    draw = lambda z, y: (generator.apply(variables, z, y, train=False) + 1) / 2  # of NumPy's arrays, closed over
    expected = jax.jit(draw)(z, labels)
    assert expected.min() >= 0 and expected.max() <= 1
    assert_equal_for_batches(net, (z, labels) if classes else (z,), expected)
    if classes:
        with pytest.raises(UserError, match=r'takes 2 arrays \(z, labels\), got 1'):
            net(z)
        with pytest.raises(UserError, match='got 5 z and 3 labels; expected as many of each'):
            net(z, labels[:3])
        with pytest.raises(UserError, match=r'labels.shape=\(5, 1\), expected \[B\]'):
            net(z, labels[:, None])


# --- the programs and the file --------------------------------------------------------------------


class Small:
    """A small exported net: model, variables, path, images, what the net gives for them."""

    shape = (8, 8, 3)

    def __init__(self, path):
        self.model, self.path = layers((ConvNorm, 24, (3, 3), {}), (ConvNorm, 24, (3, 3), {'strides': 2})), path
        self.variables, self.x = initial(self.model, self.shape), pixels(4, self.shape)
        self.expected = jax.jit(self.model.apply)(self.variables, self.x)
        save_exported(path, self.model, self.variables, self.shape, config={'seed': 3})


@pytest.fixture(scope='module')
def small(quick_compilation, tmp_path_factory):
    return Small(tmp_path_factory.mktemp('small') / 'net')


def programs(path):
    header, blocks = container.read_container(path)
    return header['programs'], {
        name: export.deserialize(bytearray(block)) for name, block in blocks.items() if isinstance(block, bytes)
    }


def test_a_program_for_each_way_to_fold(small):
    groups, found = programs(small.path)
    assert groups == [['cpu'], ['cuda', 'tpu']]
    assert {name: program.platforms for name, program in found.items()} == {
        'folding 0': ('cpu',),
        'program 0': ('cpu',),
        'folding 1': ('cuda', 'tpu'),
        'program 1': ('cuda', 'tpu'),
    }
    # In the frequency domain on a CPU, a convolution elsewhere; for any batch.
    convolves = {name: 'stablehlo.convolution' in found[name].mlir_module() for name in ('program 0', 'program 1')}
    assert convolves == {'program 0': False, 'program 1': True}
    assert all(str(found[f'program {n}'].in_avals[-1].shape) == '(batch, 8, 8, 3)' for n in range(2))
    # The kernels are no arguments of the folded net, the filters are.
    shapes = [aval.shape for aval in found['program 0'].in_avals]
    assert (3, 3, 24, 24) not in shapes and (3, 3, 24, 24) in [aval.shape for aval in found['folding 0'].in_avals]


def test_the_weights_are_there_once(small, tmp_path):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(small.variables))
    _, blocks = container.read_container(small.path)
    held = {name: block for name, block in blocks.items() if isinstance(block, np.ndarray)}
    assert sum(block.nbytes for block in held.values()) == size
    np.testing.assert_array_equal(
        held['weights/params/ConvNorm_0/kernel'], small.variables['params']['ConvNorm_0']['kernel']
    )
    # Nothing else grows with the net: neither constants in the programs, nor folded values.
    wide = layers((ConvNorm, 96, (3, 3), {}), (ConvNorm, 96, (3, 3), {'strides': 2}))
    save_exported(tmp_path / 'wide', wide, initial(wide, small.shape), small.shape)
    rest = lambda path: sum(
        len(block) for block in container.read_container(path)[1].values() if isinstance(block, bytes)
    )
    assert rest(tmp_path / 'wide') < 1.1 * rest(small.path)


def test_one_platform(small, tmp_path):
    save_exported(tmp_path / 'cpu', small.model, small.variables, small.shape, platforms='cpu')
    net = load_exported(tmp_path / 'cpu')
    assert net.platforms == ('cpu',) and programs(tmp_path / 'cpu')[0] == [['cpu']]
    assert_equal(net(small.x), small.expected)
    save_exported(tmp_path / 'tpu', small.model, small.variables, small.shape, platforms=['tpu', 'rocm'])
    with pytest.raises(UserError, match='was exported for tpu, rocm, and this process computes on cpu; export it with'):
        load_exported(tmp_path / 'tpu')


def test_variables_that_are_folded_already(small, tmp_path):
    folded = fold_for_inference(small.model, small.variables, small.x)
    save_exported(tmp_path / 'net', small.model, folded, small.shape, platforms='cpu')
    weights = lambda path: {name for name in container.read_container(path)[1] if name.startswith('weights/')}
    assert weights(tmp_path / 'net') == weights(small.path)
    assert_equal(load_exported(tmp_path / 'net')(small.x), small.expected)


ALONE = """
import sys
for name in ('flax', 'convnorm_jax.layers', 'convnorm_jax.models', 'convnorm_jax.steps', 'optax', 'ml_collections'):
    sys.modules[name] = None  # an import of it fails
from convnorm_jax import load_exported
import numpy as np
net = load_exported(sys.argv[1])
np.save(sys.argv[2], net(np.load(sys.argv[3])))
print(net.config, net)
"""


def test_another_process_runs_it_without_the_code_of_the_net(small, tmp_path):
    np.save(tmp_path / 'x.npy', small.x)
    command = [sys.executable, '-c', ALONE, str(small.path), str(tmp_path / 'y.npy'), str(tmp_path / 'x.npy')]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    assert done.returncode == 0, done.stderr
    assert_equal(np.load(tmp_path / 'y.npy'), small.expected)
    said = f"Exported({str(small.path)!r}, classifier of images float32[B, 8, 8, 3], platforms=('cpu', 'cuda', 'tpu'))"
    assert done.stdout.strip() == f"{{'seed': 3}} {said}"


def test_within_jit_and_without_derivatives(small):
    net = load_exported(small.path)
    assert_equal(jax.jit(lambda x: 2 * net(x))(small.x), 2 * small.expected)
    with pytest.raises(ValueError, match='No VJP'):
        jax.grad(lambda x: net(x).sum())(small.x)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda x: x[:, :7], 'images.shape=(4, 7, 8, 3), expected [B, 8, 8, 3]'),
        (lambda x: x[..., :1], 'images.shape=(4, 8, 8, 1), expected [B, 8, 8, 3]'),
        (lambda x: x[0], 'images.shape=(8, 8, 3), expected [B, 8, 8, 3]; images[None] makes a batch of one'),
        (lambda x: x[None], 'images.shape=(1, 4, 8, 8, 3), expected [B, 8, 8, 3]'),
        (lambda x: x[:0], 'images.shape=(0, 8, 8, 3) is an empty batch'),
        (lambda x: x.astype(np.float64), "images.dtype=float64, expected float32; convert by images.astype('float32')"),
        (lambda x: x.astype(jnp.bfloat16), 'images.dtype=bfloat16, expected float32'),
        (lambda x: (255 * x).astype(np.uint8), "by images.astype('float32'), and / 255 of bytes"),
        (lambda x: x[0, 0, 0, 0], 'images.shape=(), expected [B, 8, 8, 3]'),
    ],
)
def test_other_images_are_refused(small, change, words):
    net = load_exported(small.path)
    for call in (net, jax.jit(net)):
        if call is net or change(small.x).dtype != np.float64:  # which `jit` makes float32
            with pytest.raises(UserError) as caught:
                call(change(small.x))
            assert words in str(caught.value) and '\n' not in str(caught.value)


def test_33x32_where_32x32_was_folded(tmp_path):
    # By the frequency domain 34 and 35 rows of a grid have equally many products.
    model, shape = layers((ConvNorm, 24, (3, 3), {'strides': 2})), (32, 32, 3)
    path = tmp_path / 'net'
    save_exported(path, model, initial(model, shape), shape, platforms='cpu')
    net = load_exported(path)
    assert net(pixels(2, shape)).shape == (2, 5)
    for size in ((33, 32), (32, 33), (31, 32)):
        with pytest.raises(UserError, match=r'images.shape=\(2, 3., 3., 3\), expected \[B, 32, 32, 3\]'):
            net(pixels(2, (*size, 3)))
    with pytest.raises(UserError, match='running spectrum is of'):
        save_exported(path, model, initial(model, shape), (33, 32, 3))


def test_damage_is_refused(small, tmp_path):
    content, path = small.path.read_bytes(), tmp_path / 'net'
    end = content.index(b'\n', len(container.MAGIC) + 100)
    random = np.random.default_rng(0)
    places = [
        *range(0, 200, 7),
        *random.integers(0, end, 30),
        *random.integers(end, len(content), 60),
        len(content) - 1,
    ]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r'is damaged|is not an exported net|is of format'):
            load_exported(path)
    for length in (len(content) - 1, len(content) // 2, 90, 30):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match='is damaged or incomplete'):
            load_exported(path)
    path.write_bytes(content + b'x')
    with pytest.raises(UserError, match='is damaged'):
        load_exported(path)


def test_other_files_are_refused(small, tmp_path):
    path = tmp_path / 'net'
    for content in (b'', b'\x93NUMPY', small.path.read_bytes()[1:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match='is not an exported net; expected a file that save_exported has written'):
            load_exported(path)
    path.write_bytes(small.path.read_bytes().replace(b'net 1\n', b'net 12\n', 1))
    with pytest.raises(UserError, match='is of format 12, this version reads up to 1; install a newer convnorm_jax'):
        load_exported(path)
    with pytest.raises(UserError, match='nowhere: cannot be read'):
        load_exported(tmp_path / 'nowhere')


@pytest.mark.parametrize('name', ['program 0', 'folding 0'])
@pytest.mark.parametrize('part', ['all', 'module'])
def test_a_program_that_this_jax_cannot_read(small, tmp_path, name, part):
    header, blocks = container.read_container(small.path)
    header['versions'] = {**header['versions'], 'jax': '9.9'}
    program = export.deserialize(bytearray(blocks[name]))
    # As of jax 0.11's programs in jax 0.10: they are read, and the StableHLO in them is not.
    program = dataclasses.replace(program, mlir_module_serialized=b'of another time')
    blocks[name] = bytes(program.serialize()) if part == 'module' else b'of another time'
    container.write_container(tmp_path / 'net', header, blocks)
    with pytest.raises(UserError, match=rf'jax {jax.__version__} cannot read this program of jax 9.9 .*install that'):
        load_exported(tmp_path / 'net')(small.x)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'platforms': ()}, 'platforms=: expected some of cpu, cuda, tpu, rocm'),
        ({'platforms': ('cpu', 'gpu')}, 'platforms=cpu,gpu: expected some of'),
        ({'platforms': ('cpu', 'cpu')}, 'platforms=cpu,cpu: expected some of'),
        ({'mean': MEAN}, 'give both, or neither'),
        ({'mean': (0.5,), 'std': (0.5,)}, 'expected 3 values each'),
        ({'dtype': 'uint8'}, 'dtype=uint8: expected that of floats'),
        ({'image_shape': (8, 0, 3)}, 'image_shape=[8, 0, 3]: expected positive ints [H, W, C]'),
        ({'image_shape': 8}, 'image_shape=[8]: expected'),
        ({'path': '/nowhere/net'}, "path='/nowhere/net': cannot be written"),
    ],
)
def test_a_mistake_in_saving_is_one_line(small, tmp_path, options, words):
    given = {'path': tmp_path / 'net', 'image_shape': small.shape, **options}
    with pytest.raises(UserError) as caught:
        save_exported(given.pop('path'), small.model, small.variables, given.pop('image_shape'), **given)
    assert words in str(caught.value) and not os.listdir(tmp_path)


def test_without_flatbuffers(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'flatbuffers', None)
    words = r"need the package flatbuffers: pip install 'convnorm_jax\[export\]'"
    with pytest.raises(UserError, match=words):
        save_exported(tmp_path / 'net', small.model, small.variables, small.shape)
    with pytest.raises(UserError, match=words):
        load_exported(small.path)


def test_the_head_of_a_file_can_be_read(small):
    first, digest, header, _ = small.path.read_bytes().split(b'\n', 3)
    assert first == b'convnorm_jax exported net 1' and len(digest) == 64
    assert json.loads(header)['versions']['jax'] == jax.__version__
