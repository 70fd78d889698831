"""Archives in the official layouts, generated small, read back and damaged."""

import collections
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest

from convnorm_jax.data import archives, sources

CIFAR10_NAMES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
CIFAR100_NAMES = tuple(f'class{i:03d}' for i in range(100))
PER_FILE = 20


class Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2 wrote its str, as in the published files."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_str(self, text):
        data = text if isinstance(text, bytes) else text.encode('latin1')
        self.write(pickle.BINSTRING + struct.pack('<i', len(data)) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_str

    def save_global(self, obj, name=None):
        if getattr(obj, '__name__', '') == '_reconstruct':
            self.write(b'cnumpy.core.multiarray\n_reconstruct\n')
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch[type(np.empty(0).__reduce__()[0])] = save_global
    dispatch[type] = save_global


def python2_pickle(obj):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(obj)
    return file.getvalue()


def make_files(name, form):
    """({relative file name: bytes}, {split: (images NHWC, labels)}) in one of the published forms."""
    rng = np.random.default_rng(3)
    classes = 10 if name == 'cifar10' else 100
    batches = [f'data_batch_{i}' for i in range(1, 6)] if name == 'cifar10' else ['train']
    tests = ['test_batch'] if name == 'cifar10' else ['test']
    files, parts = {}, collections.defaultdict(list)
    for file in batches + tests:
        pixels = rng.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        fine, coarse = rng.integers(0, classes, PER_FILE), rng.integers(0, 20, PER_FILE)
        parts['test' if file in tests else 'train'].append((pixels, fine))
        if form == 'python':
            labels = (
                {'labels': fine.tolist()}
                if name == 'cifar10'
                else {'fine_labels': fine.tolist(), 'coarse_labels': coarse.tolist()}
            )
            files[file] = python2_pickle({'data': pixels, 'batch_label': file, **labels})
        else:
            head = [fine] if name == 'cifar10' else [coarse, fine]
            files[f'{file}.bin'] = np.column_stack([*head, pixels]).astype(np.uint8).tobytes()
    files.update(make_names(name, form))
    truth = {}
    for split, batch in parts.items():
        pixels, labels = (np.concatenate(column) for column in zip(*batch, strict=True))
        # Red plane first, then green, then blue, each row by row: the published order, written out.
        planes = [pixels[:, c * 1024 : (c + 1) * 1024].reshape(-1, 32, 32) for c in range(3)]
        truth[split] = (np.stack(planes, -1), labels)
    return files, truth


def make_names(name, form):
    if form == 'binary':
        file, names = (
            ('batches.meta.txt', CIFAR10_NAMES) if name == 'cifar10' else ('fine_label_names.txt', CIFAR100_NAMES)
        )
        return {file: ('\n'.join(names) + '\n\n').encode()}
    if name == 'cifar10':
        return {'batches.meta': python2_pickle({'label_names': list(CIFAR10_NAMES), 'num_vis': 3072})}
    return {'meta': python2_pickle({'fine_label_names': list(CIFAR100_NAMES), 'coarse_label_names': ['x'] * 20})}


def names_of(name, form):
    number = name.removeprefix('cifar')
    folder = (
        f'cifar-{number}-'
        + {
            'cifar10python': 'batches-py',
            'cifar10binary': 'batches-bin',
            'cifar100python': 'python',
            'cifar100binary': 'binary',
        }[name + form]
    )
    return f'cifar-{number}-{form}.tar.gz', folder


def put(root, name, form, packing, files):
    """Write the files as a folder or as a .tar.gz, and return the path of what was written."""
    archive, folder = names_of(name, form)
    root.mkdir(exist_ok=True)
    if packing == 'folder':
        (root / folder).mkdir()
        for file, content in files.items():
            (root / folder / file).write_bytes(content)
        return root / folder
    with tarfile.open(root / archive, 'w:gz') as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f'{folder}/{file}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root / archive


def test_python2_pickle_has_the_published_opcodes():
    data = python2_pickle({'data': np.zeros((2, 3072), np.uint8)})
    assert b'cnumpy.core.multiarray\n_reconstruct' in data and b'_codecs' not in data
    assert pickle.BINSTRING in data


@pytest.mark.parametrize('packing', ['folder', 'tar'])
@pytest.mark.parametrize('form', ['python', 'binary'])
@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_reads_every_published_form(tmp_path, name, form, packing):
    files, truth = make_files(name, form)
    path = put(tmp_path / 'data', name, form, packing, files)
    for data_dir in (tmp_path / 'data', path):  # the folder around it, or the thing itself
        sources.check_available(name, data_dir)
        source = sources.load_source(name, data_dir)
        for split in ('train', 'test'):
            got = getattr(source, split)
            np.testing.assert_array_equal(got.images, truth[split][0])
            np.testing.assert_array_equal(got.labels, truth[split][1])
            assert got.images.dtype == np.uint8 and got.labels.dtype == np.int32
    assert source.class_names == (CIFAR10_NAMES if name == 'cifar10' else CIFAR100_NAMES)
    assert source.description == {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100'}[name]
    assert source.num_classes == len(source.class_names)


def test_reads_a_pickle_that_python_3_wrote(tmp_path):
    files, truth = make_files('cifar10', 'python')
    again = {f: pickle.dumps(pickle.loads(c, encoding='bytes'), protocol=2) for f, c in files.items()}
    put(tmp_path / 'data', 'cifar10', 'python', 'folder', again)
    np.testing.assert_array_equal(sources.load_source('cifar10', tmp_path / 'data').train.images, truth['train'][0])


class Evil:
    def __reduce__(self):
        return print, ('this must not run',)


DAMAGES = {
    ('python', 'data_batch_3'): [
        (lambda c: c[: len(c) // 2], 'cannot be unpickled'),
        (lambda c: b'hello', 'cannot be unpickled'),
        (lambda c: pickle.dumps(Evil()), r'builtins\.print, which is not permitted'),
        (lambda c: pickle.dumps([1, 2]), 'holds a list, not a dict'),
        (lambda c: python2_pickle({'labels': [1]}), 'does not hold .data.'),
        (lambda c: python2_pickle({'labels': [1, 2], 'data': np.zeros((1, 3072), np.uint8)}), 'does not hold .data.'),
        (
            lambda c: python2_pickle({'labels': [10], 'data': np.zeros((1, 3072), np.uint8)}),
            r'not integers in \[0, 10\)',
        ),
    ],
    ('python', 'batches.meta'): [(lambda c: python2_pickle({'label_names': ['cat']}), 'names 1 classes')],
    ('binary', 'test_batch.bin'): [
        (lambda c: c[:-100], 'bytes are not a number of 3073-byte records'),
        (lambda c: b'', '0 bytes'),
        (lambda c: b'\x0b' + c[1:], r'not integers in \[0, 10\)'),
    ],
}
CASES = [(form, file, damage, message) for (form, file), many in DAMAGES.items() for damage, message in many]


@pytest.mark.parametrize('packing', ['folder', 'tar'])
@pytest.mark.parametrize(('form', 'file', 'damage', 'message'), CASES)
def test_damaged_file_is_named_in_one_line(tmp_path, capsys, form, file, damage, message, packing):
    files, _ = make_files('cifar10', form)
    files[file] = damage(files[file])
    put(tmp_path / 'data', 'cifar10', form, packing, files)
    with pytest.raises(ValueError, match=message) as error:
        sources.load_source('cifar10', tmp_path / 'data')
    assert file in str(error.value) and '\n' not in str(error.value)
    assert 'must not run' not in capsys.readouterr().out


def test_missing_member_and_truncated_tar(tmp_path):
    files, _ = make_files('cifar100', 'binary')
    lacking = {f: c for f, c in files.items() if f != 'test.bin'}
    with pytest.raises(ValueError, match=r'does not hold cifar-100-binary/test.bin'):
        put(tmp_path / 'a', 'cifar100', 'binary', 'tar', lacking)
        sources.load_source('cifar100', tmp_path / 'a')
    with pytest.raises(ValueError, match=r"test\.bin'.*cannot be read"):
        put(tmp_path / 'b', 'cifar100', 'binary', 'folder', lacking)
        sources.load_source('cifar100', tmp_path / 'b')
    path = put(tmp_path / 'c', 'cifar100', 'binary', 'tar', files)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"file='.*cifar-100-binary.tar.gz'.*cannot be unpacked") as error:
        sources.load_source('cifar100', tmp_path / 'c')
    assert '\n' not in str(error.value)
    path.write_bytes(b'<html>404</html>')
    with pytest.raises(ValueError, match='cannot be unpacked'):
        sources.load_source('cifar100', tmp_path / 'c')


def test_only_latin1_of_codecs():
    with pytest.raises(pickle.UnpicklingError, match='not permitted'):
        archives._latin1('x', 'zlib')
