"""Reads the official CIFAR-10 and CIFAR-100 archives directly, without TensorFlow and TFDS.

Both published forms are read, "python" (pickles) and "binary" (fixed-size records), as the downloaded
.tar.gz or as the folder it extracts to.
"""

import dataclasses
import io
import pickle
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from convnorm_jax.errors import UserError

_SHAPE = (3, 32, 32)  # the archives are channels first
_PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of one published archive.

    Attributes:
        archive: name of the .tar.gz.
        folder: name of the folder inside it.
        train: file names of the training split, in order.
        test: file names of the test split, in order.
        names: file with the class names.
        classes: number of classes.
        label_key: the pickle's entry that holds the labels; None for the binary form.
        names_key: the pickle's entry that holds the class names; None for the binary form.
        label_bytes: bytes before the pixels of a binary record; the last one is the label.
    """

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    classes: int
    label_key: bytes | None = None
    names_key: bytes | None = None
    label_bytes: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files that are read."""
        return (*self.train, *self.test, self.names)


LAYOUTS = {
    'cifar10': (
        Layout(
            'cifar-10-python.tar.gz',
            'cifar-10-batches-py',
            tuple(f'data_batch_{i}' for i in range(1, 6)),
            ('test_batch',),
            'batches.meta',
            10,
            label_key=b'labels',
            names_key=b'label_names',
        ),
        Layout(
            'cifar-10-binary.tar.gz',
            'cifar-10-batches-bin',
            tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
            ('test_batch.bin',),
            'batches.meta.txt',
            10,
            label_bytes=1,
        ),
    ),
    'cifar100': (
        Layout(
            'cifar-100-python.tar.gz',
            'cifar-100-python',
            ('train',),
            ('test',),
            'meta',
            100,
            label_key=b'fine_labels',
            names_key=b'fine_label_names',
        ),
        Layout(
            'cifar-100-binary.tar.gz',
            'cifar-100-binary',
            ('train.bin',),
            ('test.bin',),
            'fine_label_names.txt',
            100,
            label_bytes=2,
        ),
    ),
}


def find_archive(name: str, data_dir: str | Path) -> tuple[Layout, Path] | None:
    """Finds an official archive or its extracted folder.

    Args:
        name: 'cifar10' or 'cifar100' (no other data set has an archive).
        data_dir: folder that holds the archive or the extracted folder, or itself one of the two.

    Returns:
        (layout, path), or None. The archive is preferred to the folder, python to binary.
    """
    data_dir = Path(data_dir)
    for layout in LAYOUTS.get(name, ()):
        for path in (data_dir / layout.archive, data_dir):
            if path.name == layout.archive and path.is_file():
                return layout, path
        for path in (data_dir / layout.folder, data_dir):
            if path.name == layout.folder and path.is_dir():
                return layout, path
    return None


def source_files(layout: Layout, path: Path) -> tuple[Path, ...]:
    """The files on disk that `read_archive` reads: the archive, or those of its files that exist."""
    if path.is_file():
        return (path,)
    return tuple(path / name for name in layout.files if (path / name).is_file())


def read_archive(layout: Layout, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Reads a whole archive.

    Args:
        layout: as returned by `find_archive`.
        path: as returned by `find_archive`.

    Returns:
        (train_images, train_labels, test_images, test_labels, class_names): images uint8 [N, 32, 32, 3],
        labels int32 [N] (the fine ones for CIFAR-100), class_names a tuple of str.

    Raises:
        ValueError: a file is missing, truncated, or not what the official archive holds.
    """
    contents = _read_tar(layout, path) if path.is_file() else _read_folder(layout, path)
    parse = _parse_pickle if layout.label_key else _parse_binary
    arrays = []
    for split in (layout.train, layout.test):
        parts = [parse(layout, contents[name], path / name) for name in split]
        arrays += [np.concatenate(column) for column in zip(*parts, strict=True)]
    train_images, train_labels, test_images, test_labels = arrays
    class_names = _class_names(layout, contents[layout.names], path / layout.names)
    return train_images, train_labels, test_images, test_labels, class_names


def _damaged(path: Path, reason: object) -> UserError:
    reason = ' '.join(str(reason).split())
    return UserError(
        f'file={str(path)!r}: expected an intact file of the official archive, but {reason}; download the archive again'
    )


def _read_folder(layout: Layout, path: Path) -> dict[str, bytes]:
    contents = {}
    for name in layout.files:
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise _damaged(path / name, f'it cannot be read ({error.strerror})') from error
    return contents


def _read_tar(layout: Layout, path: Path) -> dict[str, bytes]:
    wanted = {PurePosixPath(layout.folder, name): name for name in layout.files}
    contents = {}
    try:
        # One pass in the archive's own order: seeking backwards would decompress everything again.
        with tarfile.open(path, 'r:gz') as archive:
            for member in archive:
                name = wanted.get(PurePosixPath(member.name))
                file = archive.extractfile(member) if name and member.isfile() else None
                if name and file:
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f'it cannot be unpacked ({error})') from error
    missing = sorted(set(layout.files) - set(contents))
    if missing:
        raise _damaged(path, f'it does not hold {layout.folder}/{missing[0]}')
    return contents


def _to_images(flat: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(flat.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1))


def _checked_labels(layout: Layout, labels: Any, path: Path) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in 'iu' or labels.min() < 0 or labels.max() >= layout.classes:
        raise _damaged(path, f'its labels are not integers in [0, {layout.classes})')
    return labels.astype(np.int32)


def _parse_binary(layout: Layout, content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    record = layout.label_bytes + _PIXELS
    if not content or len(content) % record:
        raise _damaged(path, f'its {len(content)} bytes are not a number of {record}-byte records')
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = _checked_labels(layout, rows[:, layout.label_bytes - 1], path)
    return _to_images(rows[:, layout.label_bytes :]), labels


def _parse_pickle(layout: Layout, content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    data = _unpickle(content, path)
    pixels, labels = data.get(b'data'), data.get(layout.label_key)
    shape = (len(labels), _PIXELS) if isinstance(labels, list) and labels else None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != shape:
        name = (layout.label_key or b'').decode()
        raise _damaged(path, f"it does not hold 'data' (uint8, N x {_PIXELS}) and N {name!r}")
    return _to_images(pixels), _checked_labels(layout, labels, path)


def _class_names(layout: Layout, content: bytes, path: Path) -> tuple[str, ...]:
    if layout.names_key:
        names = _unpickle(content, path).get(layout.names_key, ())
    else:
        names = [line for line in content.split(b'\n') if line.strip()]
    names = tuple(n.decode('utf-8', 'replace').strip() if isinstance(n, bytes) else str(n) for n in names)
    if len(names) != layout.classes:
        raise _damaged(path, f'it names {len(names)} classes where there are {layout.classes}')
    return names


def _latin1(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode`, with which Python 3 writes bytes into a protocol-2 pickle."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'encoding {encoding!r} is not permitted')
    return text.encode('latin1')


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # numpy.core.multiarray._reconstruct, wherever this NumPy keeps it
_PERMITTED = {
    ('numpy.core.multiarray', '_reconstruct'): _RECONSTRUCT,
    ('numpy._core.multiarray', '_reconstruct'): _RECONSTRUCT,
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
    ('_codecs', 'encode'): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads plain containers and NumPy arrays only: any other pickle could run arbitrary code."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PERMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is not permitted') from None


def _unpickle(content: bytes, path: Path) -> dict:
    try:
        data = _ArrayUnpickler(io.BytesIO(content), encoding='bytes').load()
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise _damaged(path, f'it cannot be unpickled ({error})') from error
    if not isinstance(data, dict):
        raise _damaged(path, f'it holds a {type(data).__name__}, not a dict')
    return data
