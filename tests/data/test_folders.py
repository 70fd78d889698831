"""Class folders: which images are found in them, and what is refused."""

import errno
import os

import numpy as np
import pytest

from convnorm_jax.data import sources


def places(images):
    """The places of grey pictures in the folder, by their grey."""
    return np.round(np.asarray(images, float).mean((1, 2, 3)) / 5).astype(int)


def test_what_else_lies_in_a_folder(make_picture_folder, tmp_path):
    root = make_picture_folder(tmp_path / 'x', train=2, val=1)
    for name in ('train/ant/notes.txt', 'train/ant/.hidden.jpg', 'val/list.csv'):
        (root / name).write_text('x')
    (root / 'train' / 'ant' / '000.jpg').rename(root / 'train' / 'ant' / '000.JPEG')
    (root / 'train' / '.cache').mkdir()
    for path in (root / 'val' / 'cat').iterdir():
        path.unlink()
    (root / 'val' / 'cat').rmdir()  # a class without test pictures
    source = sources.load_source('folder', root)
    assert source.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and sorted(source.test.labels.tolist()) == [0, 1]
    assert places(source.train.images[:2]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda root: (root / 'train' / 'dog').mkdir(), r'train/dog: expected images \(.jpg .*found none'),
        (lambda root: (root / 'val' / 'cat').rename(root / 'val' / 'dog'), "val: class 'dog' is not in .*train"),
        (
            lambda root: [p.rename(root / p.name) for p in (root / 'val').iterdir()],
            'val: expected a folder of images',
        ),
        (
            lambda root: (root / 'val').rename(root / 'test'),
            "expected the folders train and val in it for name='folder'",
        ),
    ],
)
def test_a_folder_that_is_not_right(make_picture_folder, tmp_path, spoil, message):
    root = make_picture_folder(tmp_path / 'x', train=1, val=1)
    spoil(root)
    with pytest.raises(ValueError, match=message) as error:
        sources.load_source('folder', root)
    assert '\n' not in str(error.value)


def test_pictures_in_sub_folders_are_found_as_by_torchvision(make_picture_folder, tmp_path):
    root = make_picture_folder(tmp_path / 'x', train=6, val=1)
    ant = root / 'train' / 'ant'
    for number, place in enumerate(['b/c', 'b-c', 'b/x.jpg', 'elsewhere']):
        (ant / place).mkdir(parents=True)
        (ant / f'00{number}.jpg').rename(ant / place / f'{number}.jpg')
    (ant / 'elsewhere').rename(tmp_path / 'elsewhere')
    (ant / 'link').symlink_to(tmp_path / 'elsewhere')
    (ant / 'b' / 'back').symlink_to(ant)
    (ant / 'b' / '.hidden').mkdir()
    (ant / 'b' / '.hidden' / '9.jpg').write_bytes((ant / '004.jpg').read_bytes())
    source = sources.load_source('folder', root, image_size=8, workers=0)
    store = source.train.images.records
    expected = ['004.jpg', '005.jpg', 'b-c/1.jpg', 'b/c/0.jpg', 'b/x.jpg/2.jpg', 'link/3.jpg']
    assert [name.decode() for name in store.names[:6]] == [f'train/ant/{name}' for name in expected]
    assert list(places(source.train.images)[:6]) == [4, 5, 1, 0, 2, 3]
    np.testing.assert_array_equal(source.train.labels, np.repeat([0, 1, 2], 6))


def test_a_sub_folder_that_cannot_be_read_is_said(make_picture_folder, tmp_path, monkeypatch):
    root = make_picture_folder(tmp_path / 'x', train=2, val=1)
    (root / 'train' / 'bee' / 'closed').mkdir()
    scandir = os.scandir

    def refused(path):
        if str(path).endswith('closed'):
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refused)
    with pytest.raises(ValueError, match=r'bee/closed: the folder cannot be read \(Permission denied\)'):
        sources.load_source('folder', root, image_size=8, workers=0)
