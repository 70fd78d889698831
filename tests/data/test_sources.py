"""Digits, TFDS-prepared folders, what is said when nothing is there, and the cache."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from convnorm_jax import files
from convnorm_jax.data import cache, location, sources

REAL_CIFAR10 = Path(__file__).parents[3] / 'shared' / 'data' / 'tfds'
SIZES = {'train': 30, 'test': 12}


def make_tfds(root, name='cifar10', version='3.0.2', shape=(32, 32, 3), file_format='array_record', classes=10):
    """A tiny folder as TFDS prepares it; returns (version folder, {split: (images, labels)})."""
    tfds = pytest.importorskip('tensorflow_datasets')
    folder = root / name / version
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            'id': tfds.features.Text(),
            'image': tfds.features.Image(shape=shape, encoding_format='png'),
            'label': tfds.features.ClassLabel(names=[f'c{i}' for i in range(classes)]),
        }
    )
    features.save_config(str(folder))
    truth = {split: write_records(folder, name, split, size, features, shape) for split, size in SIZES.items()}
    (folder / 'dataset_info.json').write_text(
        json.dumps(
            {
                'name': name,
                'version': version,
                'fileFormat': file_format,
                'splits': [
                    {
                        'name': split,
                        'numBytes': '1',
                        'shardLengths': [str(size)],
                        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
                    }
                    for split, size in SIZES.items()
                ],
            }
        )
    )
    return folder, truth


def write_records(folder, name, split, size, features, shape):
    from array_record.python import array_record_module
    from PIL import Image

    rng = np.random.default_rng(size)
    images = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
    labels = rng.integers(0, 10, size)
    writer = array_record_module.ArrayRecordWriter(
        str(folder / f'{name}-{split}.array_record-00000-of-00001'), 'group_size:1'
    )
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image.squeeze()).save(png, 'PNG')
        png.seek(0)
        example = features.encode_example({'id': f'{split}_{i}', 'image': png, 'label': int(label)})
        writer.write(features.serialize_example(example))
    writer.close()
    return images, labels


def assert_holds(source, truth):
    for split, (images, labels) in truth.items():
        np.testing.assert_array_equal(getattr(source, split).images, images)
        np.testing.assert_array_equal(getattr(source, split).labels, labels)
        assert getattr(source, split).labels.dtype == np.int32


def test_digits():
    source = sources.load_source('digits')
    assert source.train.images.shape == (1437, 8, 8, 1) and source.test.images.shape == (360, 8, 8, 1)
    assert source.train.images.dtype == np.uint8 and source.train.labels.dtype == np.int32
    assert source.train.images.min() == 0 and source.train.images.max() == 255
    train, test = np.bincount(source.train.labels), np.bincount(source.test.labels)
    assert np.all(np.abs(test / (train + test) - 0.2) < 0.01)
    pixels = source.train.images / 255
    assert source.mean == pytest.approx((pixels.mean(),)) and source.std == pytest.approx((pixels.std(),))
    assert source.class_names == tuple('0123456789') and source.num_classes == 10
    again = sources.load_source('digits', data_dir='/no/such/folder')
    np.testing.assert_array_equal(source.test.images, again.test.images)


def test_digits_splits_are_disjoint_and_whole():
    from sklearn.datasets import load_digits

    source = sources.load_source('digits')
    got = np.concatenate([source.train.images, source.test.images]).reshape(1797, 64)
    want = np.round(load_digits().data * 255 / 16)
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, want.tolist()))


@pytest.mark.parametrize(
    ('name', 'folder', 'shape'),
    [
        ('cifar10', 'cifar10', (32, 32, 3)),
        ('svhn', 'svhn_cropped', (32, 32, 3)),
        ('fashion_mnist', 'fashion_mnist', (28, 28, 1)),
    ],
)
def test_tfds_folder(tmp_path, name, folder, shape, monkeypatch):
    _, truth = make_tfds(tmp_path / 'tfds', folder, shape=shape)
    monkeypatch.setattr(sources, '_CHUNK', 7)  # several chunks, the last one short
    before = 'tensorflow' in sys.modules
    source = sources.load_source(name, tmp_path / 'tfds')
    assert_holds(source, truth)
    assert source.name == name and source.class_names == tuple(f'c{i}' for i in range(10))
    assert len(source.mean) == len(source.std) == shape[-1]
    assert ('tensorflow' in sys.modules) == before


def test_default_folder_is_that_of_tfds(tmp_path, monkeypatch):
    _, truth = make_tfds(tmp_path / 'tfds')
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
    assert_holds(sources.load_source('cifar10'), truth)
    assert_holds(sources.load_source('cifar10', ''), truth)


def test_newest_version_is_read_whatever_tfds_expects(tmp_path):
    make_tfds(tmp_path / 'tfds', version='3.0.2')
    folder, _ = make_tfds(tmp_path / 'tfds', version='3.0.10')
    (folder / 'PROVENANCE.md').write_text('Stored as JPEG (quality 90).')
    assert sources.load_source('cifar10', tmp_path / 'tfds').description == 'CIFAR-10 (JPEG q90)'


@pytest.mark.parametrize(
    ('text', 'suffix'),
    [
        (None, ''),
        ('the pictures are lossy JPEG copies\n(quality 75, 4:2:0), kept', ' (JPEG q75)'),
        ('Say "CIFAR-10 (JPEG q60)" beside it', ' (JPEG q60)'),
        ('Kept as PNG. It was a copy of high quality.', ' (not the official build: see its PROVENANCE.md)'),
        ('Some are JPEG. Others have quality 30.', ' (not the official build: see its PROVENANCE.md)'),
    ],
)
def test_provenance(tmp_path, text, suffix):
    if text is not None:
        (tmp_path / 'PROVENANCE.md').write_text(text)
    assert location.provenance(tmp_path) == suffix


def one_line(error):
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'svhn', 'fashion_mnist'])
@pytest.mark.parametrize('call', [sources.check_available, sources.load_source])
def test_nothing_there(tmp_path, name, call):
    start = time.perf_counter()  # TFDS's own download attempt takes 200 s
    with pytest.raises(ValueError, match=r'data_dir=.*--config\.data\.data_dir.*--config\.data\.name=digits') as error:
        call(name, tmp_path)
    assert time.perf_counter() - start < 5
    message = one_line(error)
    assert f'name={name!r}' in message and '`tfds build ' in message
    assert (f'{name.replace("cifar", "cifar-")}-python.tar.gz' in message) == name.startswith('cifar')
    assert '(no such folder)' not in message
    with pytest.raises(ValueError, match=r'\(no such folder\)'):
        call(name, tmp_path / 'absent')


def test_unknown_name_and_digits_always_there():
    with pytest.raises(ValueError, match="name='mnist': expected one of digits, cifar10") as error:
        sources.check_available('mnist', None)
    one_line(error)
    with pytest.raises(ValueError, match="name='mnist'"):
        sources.load_source('mnist')
    assert sources.check_available('digits', '/no/such/folder') is None


def test_wrong_file_format_is_told_without_reading(tmp_path):
    make_tfds(tmp_path, file_format='tfrecord')
    with pytest.raises(ValueError, match=r'says tfrecord; prepare it again .*--file_format=array_record') as error:
        sources.check_available('cifar10', tmp_path)
    one_line(error)


def test_unreadable_dataset_info(tmp_path):
    folder, _ = make_tfds(tmp_path)
    (folder / 'dataset_info.json').write_text('{')
    with pytest.raises(ValueError, match='says nothing readable'):
        sources.check_available('cifar10', tmp_path)


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'no_features'])
def test_damaged_tfds_folder(tmp_path, damage):
    folder, _ = make_tfds(tmp_path)
    shard = folder / 'cifar10-test.array_record-00000-of-00001'
    if damage == 'missing':
        shard.unlink()
    elif damage == 'truncated':
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        (folder / 'features.json').unlink()
    with pytest.raises(ValueError, match=r'intact TFDS-prepared folder cifar10/3\.0\.2, but reading failed') as error:
        sources.load_source('cifar10', tmp_path)
    one_line(error)


@pytest.mark.skipif(not (REAL_CIFAR10 / 'cifar10').is_dir(), reason='the real CIFAR-10 is not on this machine')
def test_real_cifar10(monkeypatch):
    monkeypatch.setattr(cache, 'write_arrays', lambda folder, arrays: None)  # 180 MB for each run of the tests
    source = sources.load_source('cifar10', REAL_CIFAR10)
    assert source.description == 'CIFAR-10 (JPEG q75)'
    assert np.bincount(source.train.labels).tolist() == [5000] * 10
    assert np.bincount(source.test.labels).tolist() == [1000] * 10
    np.testing.assert_allclose(source.train.images[::7].mean((0, 1, 2)) / 255, source.mean, atol=3e-3)


# --- the cache ---------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    _, truth = make_tfds(tmp_path / 'tfds')
    return tmp_path / 'tfds', truth


def cached_folder():
    (folder,) = cache.cache_root().iterdir()
    return folder


def test_second_read_comes_from_the_cache(prepared, monkeypatch):
    data_dir, truth = prepared
    first = sources.load_source('cifar10', data_dir)
    assert not [f for f in cached_folder().iterdir() if f.suffix != '.npy']  # no temporary file is left
    monkeypatch.setattr(sources, '_decode', lambda found: pytest.fail('decoded twice'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        second = sources.load_source('cifar10', data_dir)
    assert_holds(second, truth)
    assert (first.class_names, first.description) == (second.class_names, second.description)


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'foreign', 'mismatch'])
def test_corrupt_cache_is_decoded_again(prepared, damage):
    data_dir, truth = prepared
    sources.load_source('cifar10', data_dir)
    path = cached_folder() / 'train_images.npy'
    content = path.read_bytes()
    path.write_bytes({'truncated': content[:-1], 'empty': b'', 'foreign': b'PK\x03\x04 nonsense'}.get(damage, b''))
    if damage == 'mismatch':
        np.save(path, np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.warns(RuntimeWarning, match='is ignored'):
        assert_holds(sources.load_source('cifar10', data_dir), truth)
    assert path.read_bytes() == content  # repaired


def test_cache_that_cannot_be_written(prepared, tmp_path, monkeypatch):
    data_dir, truth = prepared
    (tmp_path / 'a_file').write_text('')
    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'a_file' / 'cache'))
    with pytest.warns(RuntimeWarning, match='set CONVNORM_CACHE to a writable folder'):
        assert_holds(sources.load_source('cifar10', data_dir), truth)


def test_changed_source_is_decoded_anew(prepared):
    data_dir, _ = prepared
    sources.load_source('cifar10', data_dir)
    shard = next(data_dir.rglob('*train*'))
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    sources.load_source('cifar10', data_dir)
    shutil.copytree(data_dir, data_dir.parent / 'copy')
    sources.load_source('cifar10', data_dir.parent / 'copy')
    assert len(list(cache.cache_root().iterdir())) == 3


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'x.npy'
    files.write_atomically(path, lambda f: f.write(b'old'))

    def fail(file):
        file.write(b'half')
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        files.write_atomically(path, fail)
    assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['x.npy']


def test_two_processes_at_once(prepared):
    data_dir, truth = prepared
    code = (
        'import sys, warnings; warnings.simplefilter("error", RuntimeWarning)\n'
        'from convnorm_jax.data.sources import load_source\n'
        'print(int(load_source("cifar10", sys.argv[1]).train.images.astype(int).sum()))'
    )
    running = [
        subprocess.Popen(
            [sys.executable, '-c', code, str(data_dir)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    assert [int(p.communicate(timeout=60)[0]) for p in running] == [truth['train'][0].astype(int).sum()] * 2


def test_import_is_light():
    code = (
        'import sys, convnorm_jax.data, convnorm_jax.data.sources, convnorm_jax.data.splits\n'
        'print([m for m in ("tensorflow_datasets", "sklearn", "tensorflow") if m in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == '[]'
