"""Where encoded pictures lie: class folders (torchvision's layout), or a TFDS-prepared ImageNet as ArrayRecord."""

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convnorm_jax.data import cache
from convnorm_jax.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.ppm', '.pgm', '.tif', '.tiff')
FOLDERS = {'train': 'train', 'test': 'val'}
TFDS_SPLITS = {'train': 'train', 'test': 'validation'}
_CHUNK = 256  # records at a time when their labels are read


@dataclasses.dataclass(frozen=True, eq=False)
class FolderStore:
    """Files below a folder.

    Attributes:
        root: the folder.
        names: bytes [N], paths below it. An array, because millions of them go to every worker process.
    """

    root: str
    names: np.ndarray

    def __len__(self):
        return len(self.names)

    def read(self, row):
        """(bytes of a file, its path)."""
        path = os.path.join(self.root, os.fsdecode(self.names[row]))
        try:
            with open(path, 'rb') as file:
                return file.read(), path
        except OSError as error:
            raise UserError(f'{path}: can not be read ({error.strerror}); put the file back, or start anew') from error


@dataclasses.dataclass(frozen=True, eq=False)
class RecordStore:
    """Records of one split of a TFDS-prepared folder.

    Attributes:
        path: the version folder.
        split: TFDS's name of it.
    """

    path: str
    split: str

    @functools.cached_property
    def records(self):
        """TFDS's random-access source, the pictures still encoded; opened where it is first used."""
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.path)
        if not builder.is_prepared():
            raise UserError(f'{self.path}: TFDS does not find it prepared; copy it or prepare it again')
        return builder.as_data_source(self.split, decoders={'image': tfds.decode.SkipDecoding()})

    def __getstate__(self):
        return {'path': self.path, 'split': self.split}  # open files do not go to another process

    def __len__(self):
        return len(self.records)

    def read(self, row):
        """(bytes of a picture, a name for it)."""
        try:
            return bytes(self.records[int(row)]['image']), f'{self.path}, split {self.split}, record {row}'
        except (RuntimeError, OSError) as error:  # array_record's own are RuntimeErrors
            reason = ' '.join(str(error).split())
            raise UserError(f'{self.path}: split {self.split}, record {row} can not be read ({reason})') from error

    def labels(self):
        """int32 [N], in one pass over all records."""
        found = np.empty(len(self), np.int32)
        words = f'labels of {self.split}, once'
        for start in tqdm(range(0, len(found), _CHUNK), desc=words, unit_scale=_CHUNK, disable=None, leave=False):
            rows = range(start, min(start + _CHUNK, len(found)))
            found[start : rows.stop] = [record['label'] for record in self.records.__getitems__(rows)]
        return found

    def class_names(self):
        """Of the labels, in their order."""
        import tensorflow_datasets as tfds

        return tuple(tfds.builder_from_directory(self.path).info.features['label'].names)


def list_folders(root):
    """The pictures of DIR/train/CLASS/** and DIR/val/CLASS/**; a label is its class's place in alphabetical order.

    Args:
        root: DIR.

    Returns:
        ({'train' | 'test': (FolderStore, int32 labels)}, class names).

    Raises:
        ValueError: no classes, one without pictures, or one of val that train lacks.
    """
    root, parts = Path(root), {}
    class_names = tuple(_subfolders(root / FOLDERS['train']))
    for part, folder in FOLDERS.items():
        found = _subfolders(root / folder)
        strangers = sorted(set(found) - set(class_names))
        if strangers:
            raise UserError(
                f'{root / folder}: class {strangers[0]!r} is not in {root / FOLDERS["train"]}; '
                'give both the same class folders'
            )
        names, labels = [], []
        for label, class_name in enumerate(class_names):
            files = _pictures(root / folder / class_name) if class_name in found else []
            names += [os.path.join(folder, class_name, file) for file in files]
            labels += [label] * len(files)
        store = FolderStore(str(root), np.array([os.fsencode(name) for name in names]))
        parts[part] = store, np.array(labels, np.int32)
    return parts, class_names


def has_folders(root):
    """Whether DIR/train and DIR/val are there."""
    return all((Path(root) / folder).is_dir() for folder in FOLDERS.values())


def _subfolders(path):
    found = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith('.'))
    if not found:
        raise UserError(f'{path}: expected a folder of pictures for each class, but it holds no folder; sort them so')
    return found


def _pictures(path):
    """The images in a folder and its sub-folders, as paths below it, in torchvision's order.

    What is hidden is left out. A link is followed, but for one to a folder that it lies in.
    """
    found = []
    for folder, inside, names in os.walk(path, followlinks=True, onerror=_refuse):
        inside[:] = [name for name in inside if not name.startswith('.') and not _leads_back(folder, name)]
        chosen = (name for name in names if not name.startswith('.') and name.lower().endswith(SUFFIXES))
        found += [(folder, name) for name in chosen]
    if not found:
        raise UserError(f'{path}: expected pictures ({" ".join(SUFFIXES)}), found none; add some, or remove the class')
    return [os.path.relpath(os.path.join(*place), path) for place in sorted(found)]


def _refuse(error):
    raise UserError(f'{error.filename}: the folder cannot be read ({error.strerror}); allow it') from error


def _leads_back(folder, name):
    target = os.path.join(folder, name)
    return os.path.islink(target) and Path(folder).resolve().is_relative_to(Path(target).resolve())


def list_records(path, name, files):
    """The pictures of a TFDS-prepared ImageNet; the labels are read once and kept in the cache.

    Args:
        path: the version folder.
        name: of the data set.
        files: the version folder's, for the cache.

    Returns:
        As `list_folders`, of `RecordStore`.

    Raises:
        ValueError: it is damaged.
    """
    stores = {part: RecordStore(str(path), split) for part, split in TFDS_SPLITS.items()}
    try:
        folder, names = cache.cache_folder(name, path, files), [f'{part}_labels' for part in stores]
        arrays = cache.read_arrays(folder, names)
        if arrays is None:
            arrays = {f'{part}_labels': store.labels() for part, store in stores.items()}
            cache.write_arrays(folder, arrays)
        found = {part: (store, arrays[f'{part}_labels']) for part, store in stores.items()}
        return found, stores['train'].class_names()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{path}: expected an intact TFDS-prepared folder, but reading failed ({reason}); '
            'copy it or prepare it again'
        ) from error
