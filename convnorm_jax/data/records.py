"""Reads encoded images: from class folders (torchvision's layout), or from a TFDS-prepared ImageNet (ArrayRecord)."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from tqdm import tqdm

from convnorm_jax.data import cache
from convnorm_jax.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.ppm', '.pgm', '.tif', '.tiff')
FOLDERS = {'train': 'train', 'test': 'val'}
TFDS_SPLITS = {'train': 'train', 'test': 'validation'}
_CHUNK = 256  # records in one read of the labels


class Records(Protocol):
    """Encoded images in a fixed order, with their number as `len`."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[bytes, str]:
        """(encoded image, its name in an error) of a row."""


@dataclasses.dataclass(frozen=True, eq=False)
class FolderRecords:
    """The image files below a folder.

    Attributes:
        root: the folder.
        names: bytes [N], paths below it; an array, because a list of millions would be slow to send to workers.
    """

    root: str
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> tuple[bytes, str]:
        """(bytes of a file, its path).

        Raises:
            ValueError: the file cannot be read.
        """
        path = os.path.join(self.root, os.fsdecode(self.names[row]))
        try:
            with open(path, 'rb') as file:
                return file.read(), path
        except OSError as error:
            raise UserError(
                f'{path}: cannot be read ({error.strerror}); put the file back, or start a new run without it'
            ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class TFDSRecords:
    """The records of one split of a TFDS-prepared folder.

    Attributes:
        path: the version folder.
        split: TFDS's name of the split.
    """

    path: str
    split: str

    @functools.cached_property
    def records(self) -> Any:
        """TFDS's random-access source of undecoded images, opened at its first use in each process.

        Raises:
            ValueError: the folder is not prepared.
        """
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.path)
        if not builder.is_prepared():
            raise UserError(f'{self.path}: TFDS does not find it prepared; copy it or prepare it again')
        return builder.as_data_source(self.split, decoders={'image': tfds.decode.SkipDecoding()})

    def __getstate__(self) -> dict[str, str]:
        return {'path': self.path, 'split': self.split}  # open files cannot be sent to another process

    def __len__(self) -> int:
        return len(self.records)

    def read(self, row: int) -> tuple[bytes, str]:
        """(bytes of an image, its name in an error).

        Raises:
            ValueError: the record cannot be read.
        """
        try:
            return bytes(self.records[int(row)]['image']), f'{self.path}, split {self.split}, record {row}'
        except (RuntimeError, OSError) as error:  # array_record raises RuntimeErrors
            reason = ' '.join(str(error).split())
            raise UserError(f'{self.path}: split {self.split}, record {row} cannot be read ({reason})') from error

    def labels(self) -> np.ndarray:
        """Reads all labels in one pass: int32 [N]."""
        found = np.empty(len(self), np.int32)
        words = f'labels of {self.split}, once'
        for start in tqdm(range(0, len(found), _CHUNK), desc=words, unit_scale=_CHUNK, disable=None, leave=False):
            rows = range(start, min(start + _CHUNK, len(found)))
            found[start : rows.stop] = [record['label'] for record in self.records.__getitems__(rows)]
        return found

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        import tensorflow_datasets as tfds

        return tuple(tfds.builder_from_directory(self.path).info.features['label'].names)


def list_folders(root: str | Path) -> tuple[dict[str, tuple[FolderRecords, np.ndarray]], tuple[str, ...]]:
    """Lists the images of ``DIR/train/CLASS/**`` and ``DIR/val/CLASS/**``, with labels in alphabetical order.

    Args:
        root: DIR.

    Returns:
        ({'train' | 'test': (FolderRecords, int32 labels)}, class names).

    Raises:
        ValueError: no classes, a class without images, or a class of val that train lacks.
    """
    root = Path(root)
    parts: dict[str, tuple[FolderRecords, np.ndarray]] = {}
    class_names = tuple(_subfolders(root / FOLDERS['train']))
    for part, folder in FOLDERS.items():
        found = _subfolders(root / folder)
        unknown = sorted(set(found) - set(class_names))
        if unknown:
            raise UserError(
                f'{root / folder}: class {unknown[0]!r} is not in {root / FOLDERS["train"]}; '
                'give both the same class folders'
            )
        names: list[str] = []
        labels: list[int] = []
        for label, class_name in enumerate(class_names):
            files = _list_images(root / folder / class_name) if class_name in found else []
            names += [os.path.join(folder, class_name, file) for file in files]
            labels += [label] * len(files)
        records = FolderRecords(str(root), np.array([os.fsencode(name) for name in names]))
        parts[part] = records, np.array(labels, np.int32)
    return parts, class_names


def has_folders(root: str | Path) -> bool:
    """Whether DIR/train and DIR/val exist."""
    return all((Path(root) / folder).is_dir() for folder in FOLDERS.values())


def _subfolders(path: Path) -> list[str]:
    found = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith('.'))
    if not found:
        raise UserError(
            f'{path}: expected a folder of images for each class, but it holds no folder; '
            'sort the images into such folders'
        )
    return found


def _list_images(path: Path) -> list[str]:
    """The images in a folder and its subfolders, as paths below it, in torchvision's order.

    Hidden files are left out. Links are followed, except one to a folder that contains the link.
    """
    found: list[tuple[str, str]] = []
    for folder, inside, names in os.walk(path, followlinks=True, onerror=_refuse):
        inside[:] = [name for name in inside if not name.startswith('.') and not _links_to_parent(folder, name)]
        chosen = (name for name in names if not name.startswith('.') and name.lower().endswith(SUFFIXES))
        found += [(folder, name) for name in chosen]
    if not found:
        raise UserError(f'{path}: expected images ({" ".join(SUFFIXES)}), found none; add some, or remove the class')
    return [os.path.relpath(os.path.join(*place), path) for place in sorted(found)]


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f'{error.filename}: the folder cannot be read ({error.strerror}); change its permissions, or remove it'
    ) from error


def _links_to_parent(folder: str, name: str) -> bool:
    target = os.path.join(folder, name)
    return os.path.islink(target) and Path(folder).resolve().is_relative_to(Path(target).resolve())


def list_records(
    path: Path, name: str, files: Iterable[Path]
) -> tuple[dict[str, tuple[TFDSRecords, np.ndarray]], tuple[str, ...]]:
    """Lists the images of a TFDS-prepared ImageNet; the labels are read once and cached.

    Args:
        path: the version folder.
        name: of the data set.
        files: the files of the version folder, for the cache.

    Returns:
        ({'train' | 'test': (TFDSRecords, int32 labels)}, class names).

    Raises:
        ValueError: the folder is damaged.
    """
    records = {part: TFDSRecords(str(path), split) for part, split in TFDS_SPLITS.items()}
    try:
        folder, names = cache.cache_folder(name, path, files), [f'{part}_labels' for part in records]
        arrays = cache.read_arrays(folder, names)
        if arrays is None:
            arrays = {f'{part}_labels': split.labels() for part, split in records.items()}
            cache.write_arrays(folder, arrays)
        found = {part: (split, arrays[f'{part}_labels']) for part, split in records.items()}
        return found, records['train'].class_names()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{path}: expected an intact TFDS-prepared folder, but reading failed ({reason}); '
            'copy it or prepare it again'
        ) from error
