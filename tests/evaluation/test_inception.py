"""The 2015 Inception against its PyTorch port, block by block, and the reader of its weight file."""

import io
import json
import os
import pickle
import urllib.error
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.evaluation import inception_weights
from convnorm_jax.evaluation.inception import SIZE, InceptionV3, preprocess, resize_matrix
from convnorm_jax.evaluation.inception_weights import find_weights, import_weights, read_state_dict

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def golden(load_golden):
    return load_golden('inception')


@pytest.fixture(scope='module')
def state_dict(golden):
    """Weights drawn as tests/golden/README.md says."""
    random, state = np.random.default_rng(int(golden['seed'])), {}
    for name, shape in json.loads(str(golden['spec'])):
        a = random.standard_normal(shape)
        if name.endswith('running_var'):
            a = np.exp(0.2 * a)
        elif name.endswith('bn.weight'):
            a = 1 + 0.1 * a
        elif len(shape) >= 2:
            a = a * np.sqrt(2 / np.prod(shape[1:]))
        else:
            a = 0.1 * a
        state[name] = a.astype(np.float32)
    return state


@pytest.fixture(scope='module')
def outputs(golden, state_dict, nhwc):
    """(outputs of the blocks by name, NCHW; features; logits) of the golden input."""
    x = np.random.default_rng(int(golden['seed']) + 1).uniform(-1, 1, golden['shape']).astype(np.float32)
    model, variables = InceptionV3(), import_weights(state_dict)

    def run(variables, x):
        top = lambda module, _: len(module.path) == 1 and module.name != 'fc'
        (features, logits), state = model.apply(variables, x, capture_intermediates=top)
        return {name: out['__call__'][0] for name, out in state['intermediates'].items()}, features, logits

    blocks, features, logits = jax.tree.map(np.asarray, jax.jit(run)(variables, nhwc(x)))
    return {name: out.transpose(0, 3, 1, 2) for name, out in blocks.items()}, features, logits


def sample(array, count=256):
    flat = np.asarray(array).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(count, flat.size)).astype(int)]


@pytest.mark.slow
def test_every_block_against_pytorch(golden, outputs):
    blocks = outputs[0]
    names = [key.removeprefix('block/') for key in golden if key.startswith('block/')]
    assert sorted(names) == sorted(blocks) and len(names) == 16
    for name in names:
        error = np.abs(sample(blocks[name]) - golden[f'block/{name}']).max() / golden[f'peak/{name}']
        assert error < 1e-5, name


def test_features_and_logits_against_pytorch(golden, outputs, state_dict):
    _, features, logits = outputs
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    np.testing.assert_allclose(sample(features), golden['features'], atol=1e-5 * golden['peak_features'])
    peak = np.abs(golden['logits']).max()
    np.testing.assert_allclose(sample(logits), golden['logits'], atol=1e-5 * peak)
    # With its bias the logits are PyTorch's; the Inception score leaves it out.
    np.testing.assert_allclose(sample(logits + state_dict['fc.bias']), golden['logits_bias'], atol=1e-5 * peak)


def test_import_with_the_bias_and_counters(state_dict):
    counters = {'Mixed_5b.branch1x1.bn.num_batches_tracked': np.int64(3)}
    params = import_weights({**state_dict, **counters}, InceptionV3(logits_bias=True))['params']
    np.testing.assert_array_equal(params['fc']['bias'], state_dict['fc.bias'])


def test_import_says_what_does_not_fit(state_dict):
    rest = {name: a for name, a in state_dict.items() if name != 'Mixed_6a.branch3x3.bn.bias'}
    with pytest.raises(ValueError, match=r'missing Mixed_6a\.branch3x3\.bn\.bias, left over AuxLogits\.fc\.weight'):
        import_weights({**rest, 'AuxLogits.fc.weight': np.zeros(3)})
    with pytest.raises(ValueError, match=r'fc\.weight as \(2048, 1000\), expected \(2048, 1008\)'):
        import_weights({**state_dict, 'fc.weight': np.zeros((1000, 2048), np.float32)})


def test_resize_without_half_pixel_centres():
    # By hand: output i lies at i / 2 of the input, the last one is repeated.
    np.testing.assert_allclose(resize_matrix(2, 4, False) @ [0, 1], [0, 0.5, 1, 1])
    np.testing.assert_allclose(resize_matrix(2, 4, True) @ [0, 1], [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(resize_matrix(6, 4, False) @ np.arange(6.0), [0, 1.5, 3, 4.5])
    np.testing.assert_array_equal(resize_matrix(SIZE, SIZE, False), np.eye(SIZE))


def test_preprocess_as_tensorflow():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 20, 3), np.uint8)
    expected = np.empty((2, SIZE, SIZE, 3))
    for y in range(SIZE):
        for x in range(SIZE):
            top, left = y * 32 / SIZE, x * 20 / SIZE
            i, j = int(top), int(left)
            a, b = top - i, left - j
            below, right = min(i + 1, 31), min(j + 1, 19)
            upper = pixels[:, i, j] * (1 - b) + pixels[:, i, right] * b
            lower = pixels[:, below, j] * (1 - b) + pixels[:, below, right] * b
            expected[:, y, x] = ((upper * (1 - a) + lower * a) - 128) / 128
    np.testing.assert_allclose(preprocess(jnp.asarray(pixels)), expected, atol=1e-5)
    np.testing.assert_allclose(preprocess(jnp.asarray(pixels / np.float32(255))), expected, atol=1e-5)


@pytest.mark.parametrize(('name', 'size'), [('small', (5, 7)), ('large', (400, 310))])
def test_preprocess_as_pytorch(golden, name, size):
    pixels = np.random.default_rng(int(golden['seed']) + 2).integers(0, 256, (1, *size, 3), np.uint8)
    out = np.asarray(preprocess(jnp.asarray(pixels), 'pytorch_fid')).transpose(0, 3, 1, 2)
    # PyTorch computes where a pixel lies in float32, which leaves 2e-5 of one at row 400.
    np.testing.assert_allclose(sample(out, 1000), golden[f'resize/{name}'], atol=5e-5)


def test_preprocess_of_grey_pictures_and_mistakes():
    grey = jnp.full((1, 8, 8, 1), 64, jnp.uint8)
    np.testing.assert_allclose(preprocess(grey), np.full((1, SIZE, SIZE, 3), -0.5), atol=1e-6)
    with pytest.raises(ValueError, match='expected one of tensorflow1, pytorch_fid'):
        preprocess(grey, 'pytorch')
    with pytest.raises(ValueError, match=r'\(1, 8, 8, 2\): expected \[B, H, W, 3\]'):
        preprocess(jnp.zeros((1, 8, 8, 2)))


@pytest.mark.parametrize('kind', ['zip', 'pickles'])
def test_reads_what_torch_writes(golden_dir, kind):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        'base': base,
        'transposed': base.T,
        'slice': base[1:3, 1::2],
        'half': (np.arange(5) / 4).astype(np.float16),
        'count': np.array(7),
        'double': np.array([[1 / 3, 2.5]]),
        'mask': np.array([True, False]),
        'empty': np.zeros((0, 3), np.float32),
    }
    tensors = read_state_dict(golden_dir / f'tensors_{kind}.pth')
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


class _Command:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ('exit 1',)


def as_zip(data, **storages):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('archive/data.pkl', data)
        for key, content in storages.items():
            archive.writestr(f'archive/data/{key}', content)
    return file.getvalue()


def as_pickles(data):
    system = {'little_endian': True}
    return b''.join(pickle.dumps(p) for p in (inception_weights._MAGIC, 1001, system)) + data + pickle.dumps([])


@pytest.mark.parametrize('wrap', [as_zip, as_pickles])
def test_refuses_to_run_anything(tmp_path, wrap):
    path = tmp_path / 'weights.pth'
    path.write_bytes(wrap(pickle.dumps({'a': _Command()})))
    with pytest.raises(ValueError, match=r'asks for (posix|nt|os)\.system, which is not permitted'):
        read_state_dict(path)
    path.write_bytes(wrap(pickle.dumps({'a': 3})))
    with pytest.raises(ValueError, match='holds no dict of tensors'):
        read_state_dict(path)


def test_refuses_tensors_beyond_their_numbers(golden_dir, tmp_path):
    path = tmp_path / 'weights.pth'
    with zipfile.ZipFile(golden_dir / 'tensors_zip.pth') as archive:
        names = [name for name in archive.namelist() if '/data/' in name]
        folder = names[0].split('/')[0]
        content = {name.split('/')[-1]: archive.read(name) for name in names}
        data = archive.read(f'{folder}/data.pkl')
    path.write_bytes(as_zip(data, **{key: c[: len(c) // 8 * 4] for key, c in content.items()}))
    with pytest.raises(ValueError, match='is larger than its 12 numbers'):
        read_state_dict(path)


@pytest.mark.parametrize('kind', ['zip', 'pickles'])
def test_damaged_files_are_named(golden_dir, tmp_path, kind):
    content = (golden_dir / f'tensors_{kind}.pth').read_bytes()
    path = tmp_path / 'weights.pth'
    for cut in (0, 3, len(content) // 2, len(content) - 9):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"weights\.pth': expected a state dict saved by torch"):
            read_state_dict(path)


def test_another_file_is_no_fid(tmp_path):
    path = tmp_path / 'weights.pth'
    with pytest.raises(ValueError, match='cannot be read'):
        find_weights(path)
    path.write_bytes(b'other')
    with pytest.raises(ValueError, match='expected 6726825d: scores of other weights are not FID'):
        find_weights(path)


def test_downloads_once(tmp_path, monkeypatch):
    content, asked = b'the weights', []

    def download(url, timeout):
        asked.append(url)
        assert timeout <= 10
        return io.BytesIO(content)

    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(inception_weights.urllib.request, 'urlopen', download)
    with pytest.raises(ValueError, match='downloaded Inception weights have the sha256'):
        find_weights()
    assert not (tmp_path / 'cache').exists()
    monkeypatch.setattr(inception_weights, '_SHA256', inception_weights.hashlib.sha256(content).hexdigest()[:8])
    path, digest = find_weights()
    assert (path, digest) == find_weights() == find_weights(path)
    assert path.read_bytes() == content and path.name in asked[-1] and len(asked) == 2
    path.write_bytes(b'damaged')
    with pytest.warns(RuntimeWarning, match='it is downloaded again'):
        assert find_weights() == (path, digest)
    assert path.read_bytes() == content


def test_without_a_network(tmp_path, monkeypatch):
    def download(url, timeout):
        raise urllib.error.URLError(OSError(-2, 'Name or service not known'))

    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path))
    monkeypatch.setattr(inception_weights.urllib.request, 'urlopen', download)
    with pytest.raises(ValueError, match=r'cannot be downloaded \(.*Name or service not known\): download https') as e:
        find_weights()
    assert '\n' not in str(e.value)
