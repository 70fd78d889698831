"""Loads a data set by its name, without TensorFlow and without the network.

Small sets are loaded into memory; those of `STREAMED` are read on demand (`streaming.StreamedImages`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convnorm_jax.data import archives, cache, records
from convnorm_jax.data.location import FACTS, NAMES, STREAMED, Location, locate, provenance
from convnorm_jax.data.streaming import StreamedImages, default_workers
from convnorm_jax.errors import UserError

_DIGITS_SPLIT_SEED = 0  # fixed: the test set of a data set must not depend on an experiment's seed
_TEST_ORDER_SEED = 0  # fixed: every attack on the first N images attacks the same ones
_CHUNK = 1000  # records per __getitems__: much faster than one by one
_CACHED = ('train_images', 'train_labels', 'test_images', 'test_labels', 'class_names')


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one part of a data set.

    Attributes:
        images: uint8 [N, H, W, C], 0 to 255: NumPy, or `streaming.StreamedImages`, which has the same shape and
            dtype and which `np.asarray` loads into an array.
        labels: int32 [N], NumPy.
    """

    images: np.ndarray | StreamedImages
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set as published, before any splitting.

    Attributes:
        name: one of `NAMES`.
        description: the data set's name next to a figure, e.g. 'CIFAR-10 (JPEG q75)'.
        train: the published training split.
        test: the published test split.
        num_classes: number of classes.
        class_names: one str for each class.
        mean: one float for each channel, in pixel units of [0, 1].
        std: one float for each channel, in pixel units of [0, 1].
    """

    name: str
    description: str
    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_available(name: str, data_dir: str | Path | None = None) -> None:
    """Raises unless `load_source(name, data_dir)` can find the data set; reads no data.

    Args:
        name: one of `NAMES`.
        data_dir: folder to search, or None for the TFDS default ($TFDS_DATA_DIR or ~/tensorflow_datasets).

    Raises:
        ValueError: the name is unknown, or the folder does not hold the data set; says how to provide it.
    """
    if name not in NAMES:
        raise UserError(f'name={name!r}: expected one of {", ".join(NAMES)}; set --config.data.name to one of them')
    if name != 'digits':
        locate(name, data_dir)


def load_source(
    name: str, data_dir: str | Path | None = None, *, image_size: int = 224, workers: int | None = None
) -> Source:
    """Loads a data set into memory, or lists the images of one that is streamed.

    A TFDS-prepared folder is preferred to an official archive next to it. Decoded images are kept in
    $CONVNORM_CACHE (default ~/.cache/convnorm_jax) and read from there the next time.

    >>> source = load_source('digits')
    >>> source.train.images.shape, source.test.images.shape, source.num_classes
    ((1437, 8, 8, 1), (360, 8, 8, 1), 10)

    Args:
        name: one of `NAMES`.
        data_dir: folder to search, or None for the TFDS default ($TFDS_DATA_DIR or ~/tensorflow_datasets).
            Not used for 'digits'.
        image_size: pixels of a side of streamed images; the other data sets keep their size.
        workers: processes that decode streamed images; 0 for threads, None for `streaming.default_workers`.

    Returns:
        A `Source`. The test set of a streamed one is in a fixed random order, so that its first images are of
        all classes.

    Raises:
        ValueError: unknown name, data set not found, or damaged files.
    """
    check_available(name, data_dir)
    if name == 'digits':
        return _load_digits()
    found = locate(name, data_dir)
    if name in STREAMED:
        return _load_streamed(name, found, int(image_size), default_workers() if workers is None else int(workers))
    folder = cache.cache_folder(name, found.path, found.files)
    arrays = _read_cache(folder)
    if arrays is None:
        arrays = _decode(found)
        cache.write_arrays(folder, arrays)
    return _to_source(name, found, arrays)


def _decode(found: Location) -> dict[str, np.ndarray]:
    read = _read_tfds(found.path) if found.layout is None else archives.read_archive(found.layout, found.path)
    *arrays, class_names = read
    return dict(zip(_CACHED, (*arrays, np.array(class_names)), strict=True))


def _to_source(name: str, found: Location, arrays: Mapping[str, np.ndarray]) -> Source:
    facts = FACTS[name]
    class_names = tuple(str(c) for c in arrays['class_names'])
    return Source(
        name=name,
        description=facts.title + provenance(found.path),
        train=Split(arrays['train_images'], arrays['train_labels']),
        test=Split(arrays['test_images'], arrays['test_labels']),
        num_classes=len(class_names),
        class_names=class_names,
        mean=facts.mean,
        std=facts.std,
    )


def _load_streamed(name: str, found: Location, size: int, workers: int) -> Source:
    parts: Mapping[str, tuple[records.Records, np.ndarray]]
    if found.files:
        parts, class_names = records.list_records(found.path, name, found.files)
    else:
        parts, class_names = records.list_folders(found.path)
    splits = {}
    for part, (encoded, labels) in parts.items():
        rows = np.arange(len(labels))
        if part == 'test':
            rows = np.random.default_rng(_TEST_ORDER_SEED).permutation(len(labels))
        splits[part] = Split(StreamedImages(encoded, rows, size, workers), labels[rows])
    facts, classes = FACTS['imagenet'], len(class_names)
    if name == 'folder':
        title = f'images in {found.path.resolve().name} ({classes} classes)'
    else:
        title = facts.title + ('' if classes == 1000 else f' ({classes} classes)')
    return Source(
        name=name,
        description=f'{title}{provenance(found.path)} at {size}x{size}',
        train=splits['train'],
        test=splits['test'],
        num_classes=classes,
        class_names=class_names,
        mean=facts.mean,
        std=facts.std,
    )


def _read_cache(folder: Path) -> dict[str, np.ndarray] | None:
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


def _read_tfds(path: Path) -> tuple:
    import tensorflow_datasets as tfds

    try:
        # From the folder, not by name: this accepts any prepared version and cannot start a download.
        builder = tfds.builder_from_directory(path)
        if not builder.is_prepared():
            raise ValueError('TFDS does not find it prepared')
        arrays = [array for split in ('train', 'test') for array in _read_tfds_split(builder, split)]
        return (*arrays, tuple(builder.info.features['label'].names))
    except Exception as error:  # TFDS, protobuf and array_record raise almost any exception
        reason = ' '.join(str(error).split())
        raise UserError(
            f'data_dir={str(path.parent.parent)!r}: expected an intact TFDS-prepared folder '
            f'{path.parent.name}/{path.name}, but reading failed ({reason}); '
            'copy it or prepare it again'
        ) from error


def _read_tfds_split(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    data = builder.as_data_source(split=split)
    images = np.empty((len(data), *builder.info.features['image'].shape), np.uint8)
    labels = np.empty(len(data), np.int32)
    for start in range(0, len(data), _CHUNK):
        rows = data.__getitems__(range(start, min(start + _CHUNK, len(data))))
        for i, row in enumerate(rows, start):
            images[i], labels[i] = row['image'], row['label']
    return images, labels


def _load_digits() -> Source:
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
