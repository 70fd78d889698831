"""A data set's name -> its images and labels, without TensorFlow and without the network.

Small sets are in memory; those of `STREAMED` are read while they are needed (`streaming.Pictures`).
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np

from convnorm_jax.data import archives, cache
from convnorm_jax.data import records as stores
from convnorm_jax.data.streaming import Pictures, default_workers
from convnorm_jax.errors import UserError

STREAMED = ('imagenet', 'folder')
NAMES = ('digits', 'cifar10', 'cifar100', 'svhn', 'fashion_mnist', *STREAMED)

_DIGITS_SPLIT_SEED = 0  # fixed: the test set of a data set must not depend on an experiment's seed
_TEST_ORDER_SEED = 0  # fixed: whoever attacks the first so many pictures attacks the same ones
_CHUNK = 1000  # records per __getitems__: five times faster than one by one
_CACHED = ('train_images', 'train_labels', 'test_images', 'test_labels', 'class_names')


@dataclasses.dataclass(frozen=True)
class _Facts:
    tfds_name: str
    title: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Per-channel mean and standard deviation of the training set as they are usually published.
_FACTS = {
    'cifar10': _Facts('cifar10', 'CIFAR-10', (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    'cifar100': _Facts('cifar100', 'CIFAR-100', (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    'svhn': _Facts('svhn_cropped', 'SVHN', (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    'fashion_mnist': _Facts('fashion_mnist', 'Fashion-MNIST', (0.2860,), (0.3530,)),
    'imagenet': _Facts('imagenet2012', 'ImageNet', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one part of a data set.

    Attributes:
        images: uint8 [N, H, W, C], 0 to 255: NumPy, or `streaming.Pictures`, which has the same shape and
            dtype and becomes an array by `np.asarray`.
        labels: int32 [N], NumPy.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set as published, before any splitting.

    Attributes:
        name: one of `NAMES`.
        description: what to call it beside a figure, e.g. 'CIFAR-10 (JPEG q75)'.
        train, test: the published splits.
        num_classes: number of classes.
        class_names: one str for each class.
        mean, std: one float for each channel, in pixel units of [0, 1].
    """

    name: str
    description: str
    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class _Found:
    """Where a data set lies: a TFDS version folder, an official archive (`layout` says which), or, without
    `files`, the folder of a train and a val."""

    path: Path
    files: tuple[Path, ...]
    layout: archives.Layout | None = None


def check_available(name, data_dir=None):
    """Raise unless `load_source(name, data_dir)` can find the data set; reads no data, waits for nothing.

    Args:
        name: one of `NAMES`.
        data_dir: folder to look in, or None for the TFDS default ($TFDS_DATA_DIR or ~/tensorflow_datasets).

    Raises:
        ValueError: the name is unknown, or nothing usable lies in the folder; says how to provide it.
    """
    if name not in NAMES:
        raise UserError(f'name={name!r}: expected one of {", ".join(NAMES)}; set --config.data.name to one of them')
    if name != 'digits':
        _find(name, data_dir)


def load_source(name, data_dir=None, *, image_size=224, workers=None):
    """Load a data set into memory, or list the pictures of one that is streamed.

    A TFDS-prepared folder is preferred to an official archive beside it. What was decoded is kept in
    $CONVNORM_CACHE (default ~/.cache/convnorm_jax) and read back from there the next time.

    Args:
        name: one of `NAMES`.
        data_dir: folder to look in, or None for the TFDS default ($TFDS_DATA_DIR or ~/tensorflow_datasets).
            Not used for 'digits'.
        image_size: pixels of a side, of streamed pictures; the others come as they are.
        workers: processes that decode streamed pictures; 0 for threads, None for `streaming.default_workers`.

    Returns:
        A `Source`. The test set of a streamed one is in a fixed random order: its first so many pictures are of
        all classes.

    Raises:
        ValueError: unknown name, data set not found, or damaged files.
    """
    check_available(name, data_dir)
    if name == 'digits':
        return _load_digits()
    found = _find(name, data_dir)
    if name in STREAMED:
        return _load_streamed(name, found, int(image_size), default_workers() if workers is None else int(workers))
    folder = cache.cache_folder(name, found.path, found.files)
    arrays = _read_cache(folder)
    if arrays is None:
        arrays = _decode(found)
        cache.write_arrays(folder, arrays)
    return _to_source(name, found, arrays)


def _decode(found):
    read = _read_tfds(found.path) if found.layout is None else archives.read_archive(found.layout, found.path)
    *arrays, class_names = read
    return dict(zip(_CACHED, (*arrays, np.array(class_names)), strict=True))


def _to_source(name, found, arrays):
    facts = _FACTS[name]
    class_names = tuple(str(c) for c in arrays['class_names'])
    return Source(
        name=name,
        description=facts.title + _provenance(found.path),
        train=Split(arrays['train_images'], arrays['train_labels']),
        test=Split(arrays['test_images'], arrays['test_labels']),
        num_classes=len(class_names),
        class_names=class_names,
        mean=facts.mean,
        std=facts.std,
    )


def _load_streamed(name, found, size, workers):
    if found.files:
        parts, class_names = stores.list_records(found.path, name, found.files)
    else:
        parts, class_names = stores.list_folders(found.path)
    splits = {}
    for part, (store, labels) in parts.items():
        rows = np.arange(len(labels))
        if part == 'test':
            rows = np.random.default_rng(_TEST_ORDER_SEED).permutation(len(labels))
        splits[part] = Split(Pictures(store, rows, size, workers), labels[rows])
    facts, classes = _FACTS['imagenet'], len(class_names)
    if name == 'folder':
        title = f'pictures in {found.path.resolve().name} ({classes} classes)'
    else:
        title = facts.title + ('' if classes == 1000 else f' ({classes} classes)')
    return Source(
        name=name,
        description=f'{title}{_provenance(found.path)} at {size}x{size}',
        **splits,
        num_classes=classes,
        class_names=class_names,
        mean=facts.mean,
        std=facts.std,
    )


def _read_cache(folder):
    arrays = cache.read_arrays(folder, _CACHED)
    if arrays is None:
        return None
    for part in ('train', 'test'):
        images, labels = arrays[f'{part}_images'], arrays[f'{part}_labels']
        whole = (
            images.dtype == np.uint8
            and images.ndim == 4
            and labels.dtype == np.int32
            and labels.shape == images.shape[:1]
        )
        if not whole:
            cache.warn_ignored(folder, f'its {part} arrays do not fit together')
            return None
    return arrays


# --- where a data set lies ---------------------------------------------------------------------------


def _find(name, data_dir):
    root = Path(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()
    if name in STREAMED and stores.has_folders(root):
        return _Found(root, ())
    if name == 'folder':
        raise UserError(
            f"data_dir={str(root)!r}: expected the folders train and val in it for name='folder', in each of them "
            'a folder of pictures for every class; set --config.data.data_dir to such a folder'
        )
    found = _find_tfds(name, root)
    if found:
        return found
    archive = archives.find_archive(name, root)
    if archive:
        layout, path = archive
        return _Found(path, archives.source_files(layout, path), layout)
    raise UserError(_how_to_provide(name, root))


def _how_to_provide(name, root):
    tfds_name = _FACTS[name].tfds_name
    where = f'data_dir={str(root)!r}' + ('' if root.is_dir() else ' (no such folder)')
    layouts = archives.LAYOUTS.get(name, ())
    archive = ' or '.join(layout.archive for layout in layouts) + ', or its extracted folder, in that DIR'
    other = f'the official archive {archive if layouts else "(read for cifar10 and cifar100 only)"}'
    if name in STREAMED:
        other = 'the folders DIR/train and DIR/val, in each of them a folder of pictures for every class'
    return (
        f'{where}: expected it to hold the data set name={name!r}; provide it in one of these ways: '
        f'(1) --config.data.data_dir=DIR where DIR/{tfds_name} is TFDS-prepared (elsewhere, with '
        f'`tfds build {tfds_name} --file_format=array_record`), '
        f'(2) {other}, '
        '(3) --config.data.name=digits, which is embedded'
    )


def _find_tfds(name, root):
    """The newest prepared version, found by looking: asking TFDS by name can start a download."""
    tfds_name = _FACTS[name].tfds_name
    prepared = [info.parent for info in (root / tfds_name).glob('*/dataset_info.json')]
    if not prepared:
        return None
    path = max(prepared, key=_version)
    file_format = _file_format(path / 'dataset_info.json')
    if file_format != 'array_record':
        raise UserError(
            f'data_dir={str(root)!r}: expected {tfds_name}/{path.name} to be prepared as array_record, '
            f'but its dataset_info.json says {file_format}; prepare it again with '
            f'`tfds build {tfds_name} --file_format=array_record`'
        )
    return _Found(path, tuple(f for f in path.iterdir() if f.is_file()))


def _version(path):
    return tuple(int(n) for n in re.findall(r'\d+', path.name))


def _file_format(path):
    try:
        return json.loads(path.read_text()).get('fileFormat', 'no file format')
    except (OSError, ValueError, AttributeError):
        return 'nothing readable'


def _provenance(path):
    """What to add to a data set's title where its folder says that it is not the official build.

    A JPEG copy is named with its quality; anything else points at the file that explains it.
    """
    note = path / 'PROVENANCE.md'
    if not note.is_file():
        return ''
    text = ' '.join(note.read_text(encoding='utf-8', errors='replace').split())
    quality = re.search(r'\bJPE?G\b[^.]*?\b(?:quality\W{0,3}|q)(\d{1,3})\b', text, re.IGNORECASE)
    return f' (JPEG q{quality[1]})' if quality else ' (not the official build: see its PROVENANCE.md)'


# --- reading -----------------------------------------------------------------------------------------


def _read_tfds(path):
    import tensorflow_datasets as tfds

    try:
        # From the folder, not by name: any prepared version will do, and nothing can be downloaded.
        builder = tfds.builder_from_directory(path)
        if not builder.is_prepared():
            raise ValueError('TFDS does not find it prepared')
        arrays = [array for split in ('train', 'test') for array in _read_tfds_split(builder, split)]
        return (*arrays, tuple(builder.info.features['label'].names))
    except Exception as error:  # TFDS, protobuf and array_record raise nearly anything
        reason = ' '.join(str(error).split())
        raise UserError(
            f'data_dir={str(path.parent.parent)!r}: expected an intact TFDS-prepared folder '
            f'{path.parent.name}/{path.name}, but reading failed ({reason}); '
            'copy it or prepare it again'
        ) from error


def _read_tfds_split(builder, split):
    records = builder.as_data_source(split=split)
    images = np.empty((len(records), *builder.info.features['image'].shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _CHUNK):
        rows = records.__getitems__(range(start, min(start + _CHUNK, len(records))))
        for i, row in enumerate(rows, start):
            images[i], labels[i] = row['image'], row['label']
    return images, labels


def _load_digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=_DIGITS_SPLIT_SEED
    )
    pixels = images[train] / 255.0
    return Source(
        name='digits',
        description='digits (scikit-learn, 8x8)',
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        num_classes=10,
        class_names=tuple(str(n) for n in digits.target_names),
        mean=(float(pixels.mean()),),
        std=(float(pixels.std()),),
    )
