"""Finds a data set on the disk: its TFDS-prepared folder, official archive, or class folders."""

import dataclasses
import json
import os
import re
from pathlib import Path

from convnorm_jax.data import archives, records
from convnorm_jax.errors import UserError

STREAMED = ('imagenet', 'folder')
NAMES = ('digits', 'cifar10', 'cifar100', 'svhn', 'fashion_mnist', *STREAMED)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a data set before it is read.

    Attributes:
        tfds_name: its name in TFDS.
        title: its name next to a figure.
        mean: of each channel, in pixel units of [0, 1].
        std: of each channel, in pixel units of [0, 1].
    """

    tfds_name: str
    title: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Per-channel mean and standard deviation of the training set as they are usually published.
FACTS = {
    'cifar10': Facts('cifar10', 'CIFAR-10', (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    'cifar100': Facts('cifar100', 'CIFAR-100', (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    'svhn': Facts('svhn_cropped', 'SVHN', (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    'fashion_mnist': Facts('fashion_mnist', 'Fashion-MNIST', (0.2860,), (0.3530,)),
    'imagenet': Facts('imagenet2012', 'ImageNet', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a data set lies.

    Attributes:
        path: a TFDS version folder, an official archive or its extracted folder, or the parent folder of a train
            and a val.
        files: the source files; () for a parent of class folders.
        layout: of an official archive, else None.
    """

    path: Path
    files: tuple[Path, ...]
    layout: archives.Layout | None = None


def locate(name: str, data_dir: str | Path | None) -> Location:
    """Finds a data set in a folder, or in the TFDS default folder for None.

    Raises:
        ValueError: the folder does not hold the data set; says how to provide it.
    """
    root = Path(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()
    if name in STREAMED and records.has_folders(root):
        return Location(root, ())
    if name == 'folder':
        raise UserError(
            f"data_dir={str(root)!r}: expected the folders train and val in it for name='folder', in each of them "
            'a folder of images for every class; set --config.data.data_dir to such a folder'
        )
    found = _find_tfds(name, root)
    if found:
        return found
    archive = archives.find_archive(name, root)
    if archive:
        layout, path = archive
        return Location(path, archives.source_files(layout, path), layout)
    raise UserError(_how_to_provide(name, root))


def _how_to_provide(name: str, root: Path) -> str:
    tfds_name = FACTS[name].tfds_name
    where = f'data_dir={str(root)!r}' + ('' if root.is_dir() else ' (no such folder)')
    layouts = archives.LAYOUTS.get(name, ())
    archive = ' or '.join(layout.archive for layout in layouts) + ', or its extracted folder, in that DIR'
    other = f'the official archive {archive if layouts else "(read for cifar10 and cifar100 only)"}'
    if name in STREAMED:
        other = 'the folders DIR/train and DIR/val, in each of them a folder of images for every class'
    return (
        f'{where}: expected it to hold the data set name={name!r}; provide it in one of these ways: '
        f'(1) --config.data.data_dir=DIR where DIR/{tfds_name} is TFDS-prepared (elsewhere, with '
        f'`tfds build {tfds_name} --file_format=array_record`), '
        f'(2) {other}, '
        '(3) --config.data.name=digits, which is embedded'
    )


def _find_tfds(name: str, root: Path) -> Location | None:
    """The newest prepared version, found in the file system: asking TFDS by name can start a download."""
    tfds_name = FACTS[name].tfds_name
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
    return Location(path, tuple(f for f in path.iterdir() if f.is_file()))


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r'\d+', path.name))


def _file_format(path: Path) -> str:
    try:
        return json.loads(path.read_text()).get('fileFormat', 'no file format')
    except (OSError, ValueError, AttributeError):
        return 'nothing readable'


def provenance(path: Path) -> str:
    """Addition to a data set's title if its folder says that it is not the official build.

    A JPEG copy is named with its quality; for any other copy the title refers to the file that explains it.
    """
    note = path / 'PROVENANCE.md'
    if not note.is_file():
        return ''
    text = ' '.join(note.read_text(encoding='utf-8', errors='replace').split())
    quality = re.search(r'\bJPE?G\b[^.]*?\b(?:quality\W{0,3}|q)(\d{1,3})\b', text, re.IGNORECASE)
    return f' (JPEG q{quality[1]})' if quality else ' (not the official build: see its PROVENANCE.md)'
