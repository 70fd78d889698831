"""Streamed pictures: what lies where, which batch holds what, and that nothing depends on who reads it."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest

from convnorm_jax.data import images, records, sources, splits, streaming


@pytest.fixture(scope='module')
def folder(make_picture_folder, tmp_path_factory):
    return make_picture_folder(tmp_path_factory.mktemp('pictures') / 'bugs')


@pytest.fixture
def source(folder):
    return sources.load_source('folder', folder, image_size=16, workers=0)


def places(images):
    """The places of grey pictures in the folder, by their grey."""
    return np.round(np.asarray(images, float).mean((1, 2, 3)) / 5).astype(int)


def training(source, batch_size=8, augmentation='resized_crop_flip', seed=0, **options):
    return streaming.TrainingBatches(
        source.train.images, source.train.labels, batch_size, augmentation, seed, **options
    )


def test_a_folder(source, folder):
    assert source.name == 'folder' and source.description == 'images in bugs (3 classes) at 16x16'
    assert source.class_names == ('ant', 'bee', 'cat') and source.num_classes == 3
    assert source.train.images.shape == (39, 16, 16, 3) and source.test.images.shape == (12, 16, 16, 3)
    assert source.train.images.dtype == np.uint8 and source.train.labels.dtype == np.int32
    assert source.mean == (0.485, 0.456, 0.406) and source.std == (0.229, 0.224, 0.225)
    np.testing.assert_array_equal(source.train.labels, np.repeat([0, 1, 2], 13))
    np.testing.assert_array_equal(places(source.train.images), np.arange(39))
    again = sources.load_source('imagenet', folder, image_size=8, workers=1)
    assert again.description == 'ImageNet (3 classes) at 8x8'
    np.testing.assert_array_equal(again.test.images.rows, source.test.images.rows)


def test_the_test_set_is_mixed_and_every_picture_has_its_label(source):
    order = places(source.test.images) - 39
    assert sorted(order) == list(range(12)) and list(order) != list(range(12))
    np.testing.assert_array_equal(source.test.labels, order // 4)


def test_no_imagenet(tmp_path):
    with pytest.raises(ValueError, match=r"name='imagenet'.*DIR/imagenet2012 is TFDS-prepared.*DIR/train and DIR/val"):
        sources.check_available('imagenet', tmp_path)


def test_center_crops_become_an_array(source, folder):
    want = [images.center_crop(cv2.imread(str(p))[..., ::-1], 16) for p in sorted((folder / 'train').glob('*/*'))]
    found = np.asarray(source.train.images)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, want)
    some = source.train.images[np.array([5, 38, 5])]
    assert some.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(np.asarray(some), found[[5, 38, 5]])
    assert np.asarray(source.train.images[:0]).shape == (0, 16, 16, 3)


def test_an_epoch_is_whole_batches_of_a_fresh_order(source):
    batches = training(source)
    epochs = [[batches.indices(epoch * 4 + i)[1] for i in range(4)] for epoch in range(3)]
    for epoch in epochs:
        flat = np.concatenate(epoch)
        assert len(set(flat.tolist())) == 32 and flat.min() >= 0 and flat.max() < 39
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0][0], training(source, seed=1).indices(0)[1])
    seen = {int(i) for step in range(80) for i in batches.indices(step)[1]}
    assert seen == set(range(39))  # what an epoch leaves out changes


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_each_batch_in_its_order(source, processes):
    for step in (0, 5):
        whole = training(source)(step)
        parts = [training(source, process=p, processes=processes)(step) for p in range(processes)]
        for name in ('images', 'labels'):
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_labels_are_those_of_the_pictures(source):
    for batch in streaming.read(training(source), 8):
        assert batch['images'].dtype == np.uint8 and batch['labels'].dtype == np.int32
        np.testing.assert_array_equal(batch['labels'], places(batch['images']) // 13)


class Recorded:
    """Records that remember which rows were read."""

    def __init__(self, records):
        self.records, self.rows = records, []

    def read(self, row):
        self.rows.append(int(row))
        return self.records.read(row)


def test_a_run_that_goes_on_reads_what_the_first_one_left(source):
    def run(start, stop, *, until):
        recorded = Recorded(source.train.images.records)
        batches = training(source)
        batches = dataclasses.replace(batches, images=dataclasses.replace(batches.images, records=recorded))
        reader = streaming.read(batches, stop, start=start)
        found = [next(reader) for _ in range(until - start)]
        reader.close()
        return found, recorded.rows

    whole, rows = run(0, 10, until=10)
    first, _ = run(0, 10, until=6)  # stopped in the middle of the second epoch
    second, rest = run(6, 10, until=10)
    for a, b in zip(whole, first + second, strict=True):
        np.testing.assert_array_equal(a['images'], b['images'])
        np.testing.assert_array_equal(a['labels'], b['labels'])
    # Threads may begin in any order; what was read is what the steps say, each picture once an epoch.
    assert sorted(rest) == sorted(np.concatenate([places(batch['images']) for batch in second]).tolist())
    assert len(rows) == 80
    for epoch in (0, 1):
        seen = np.concatenate([places(b['images']) for b in (first + second)[4 * epoch : 4 * epoch + 4]])
        assert len(set(seen.tolist())) == 32


@pytest.mark.slow
def test_worker_processes_change_nothing(source):
    batches = training(source)
    want = list(streaming.read(batches, 9, start=2))
    found = list(streaming.read(batches, 9, start=2, workers=2))
    assert len(found) == len(want) == 7
    for a, b in zip(found, want):
        np.testing.assert_array_equal(a['images'], b['images'])
        np.testing.assert_array_equal(a['labels'], b['labels'])
    found = a = None  # gives the shared memory back


@pytest.fixture
def slopes(tmp_path):
    """Pictures that are darker on the left, and how much so is their place."""
    slope = np.linspace(0, 1, 60)[None, :, None] * np.ones((40, 1, 3))
    for part, count in (('train', 40), ('val', 1)):
        (tmp_path / 'slopes' / part / 'only').mkdir(parents=True)
        for i in range(count):
            picture = (100 + (20 + 3 * i) * slope).astype(np.uint8)
            cv2.imwrite(str(tmp_path / 'slopes' / part / 'only' / f'{i:03d}.png'), picture)
    return sources.load_source('folder', tmp_path / 'slopes', image_size=16, workers=0)


def crops(source, batch_size, augmentation, epoch):
    """{place: crop} of an epoch."""
    batches = training(source, batch_size, augmentation)
    steps = len(source.train.labels) // batch_size
    found = {}
    for step in range(epoch * steps, (epoch + 1) * steps):
        found |= dict(zip(batches.indices(step)[1].tolist(), batches(step)['images']))
    return found


def test_a_crop_depends_on_seed_epoch_and_example_only(slopes):
    first, other = crops(slopes, 8, 'resized_crop_flip', 1), crops(slopes, 20, 'resized_crop_flip', 1)
    assert set(first) == set(other) == set(range(40))
    for place in first:
        np.testing.assert_array_equal(first[place], other[place])
    later = crops(slopes, 8, 'resized_crop_flip', 2)
    assert sum(np.array_equal(first[place], later[place]) for place in first) <= 1
    # A subset of the pictures keeps their crops.
    chosen = np.arange(5, 40, 3)
    subset = sources.Split(slopes.train.images[chosen], slopes.train.labels[chosen])
    some = crops(dataclasses.replace(slopes, train=subset), 4, 'resized_crop_flip', 1)
    for place, crop in some.items():
        np.testing.assert_array_equal(crop, first[chosen[place]])


def brighter_on_the_right(crop):
    return crop[:, -4:].mean() > crop[:, :4].mean()


def test_flips(slopes):
    found = [crop for epoch in range(5) for crop in crops(slopes, 8, 'resized_crop_flip', epoch).values()]
    assert 70 <= sum(map(brighter_on_the_right, found)) <= 130  # of 200: +- 4 standard deviations
    assert all(map(brighter_on_the_right, crops(slopes, 8, 'resized_crop', 0).values()))


@pytest.mark.parametrize('augmentation', ['none', 'crop', 'crop_flip'])
def test_what_the_device_augments_comes_uncropped(slopes, augmentation):
    want = np.asarray(slopes.train.images)
    for place, crop in crops(slopes, 8, augmentation, 0).items():
        np.testing.assert_array_equal(crop, want[place])


@pytest.mark.parametrize(('batch_size', 'processes'), [(4, 1), (8, 1), (8, 2), (50, 1), (50, 2)])
def test_evaluation_sees_every_picture_once(source, batch_size, processes):
    images, labels = source.test.images, source.test.labels
    parts = [
        streaming.EvaluationBatches(images, labels, batch_size, process, processes) for process in range(processes)
    ]
    found = [part(index) for index in range(len(parts[0])) for part in parts]
    mask = np.concatenate([part['mask'] for part in found]) > 0
    assert len(mask) == -(-12 // batch_size) * batch_size and mask.sum() == 12
    seen = np.concatenate([part['images'] for part in found])[mask]
    np.testing.assert_array_equal(seen, np.asarray(images))
    np.testing.assert_array_equal(np.concatenate([part['labels'] for part in found])[mask], labels)


def test_split_subset_and_noise(source):
    options = {'validation_fraction': 0.25, 'subset_fraction': 0.5, 'noise_kind': 'symmetric', 'noise_rate': 0.5}
    prepared = splits.prepare(source, seed=3, **options)
    record = prepared.record
    for part in ('train', 'validation'):
        split = getattr(prepared, part)
        np.testing.assert_array_equal(places(split.images), record[f'{part}_indices'])
        np.testing.assert_array_equal(split.labels, record[f'{part}_labels'])
        np.testing.assert_array_equal(record[f'{part}_clean_labels'], record[f'{part}_indices'] // 13)
    assert np.bincount(record['train_clean_labels']).tolist() == [5, 5, 5]
    assert np.bincount(record['validation_clean_labels']).tolist() == [3, 3, 3]
    assert record['train_noisy'].any() and not set(record['train_indices']) & set(record['validation_indices'])
    batches = streaming.TrainingBatches(prepared.train.images, prepared.train.labels, 5, 'resized_crop', 0)
    noisy = dict(zip(record['train_indices'].tolist(), record['train_labels'].tolist()))
    batch = batches(1)
    assert batch['labels'].tolist() == [noisy[place] for place in places(batch['images']).tolist()]


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_a_broken_picture_is_named(make_picture_folder, tmp_path, workers):
    root = make_picture_folder(tmp_path / 'x', train=2, val=1)
    path = root / 'train' / 'bee' / '001.jpg'
    path.write_bytes(path.read_bytes()[:-30])
    source = sources.load_source('folder', root, image_size=8)
    with pytest.raises(ValueError, match=f'^{path}: expected an image'):
        list(streaming.read(training(source, batch_size=2), 3, workers=workers))
    path.unlink()
    if not workers:
        with pytest.raises(ValueError, match=f'^{path}: cannot be read .No such file'):
            list(streaming.read(training(source, batch_size=2), 3))


_READS = """
import sys
from convnorm_jax.data import sources, streaming
if __name__ == '__main__':
    source = sources.load_source('folder', sys.argv[1], image_size=16, workers=2)
    load = streaming.TrainingBatches(source.train.images, source.train.labels, 4, 'none', 0)
    place = {'placed': lambda batch: batch, 'plain': None}[sys.argv[2]]
    try:
        for batch in streaming.read(load, 30, workers=2, place=place):
            pass
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ('damage', 'place'),
    [
        ('damaged', 'placed'),
        pytest.param('whole', 'plain', marks=pytest.mark.slow),
        pytest.param('whole', 'placed', marks=pytest.mark.slow),
    ],
)
def test_shared_memory_is_given_back(make_picture_folder, tmp_path, damage, place):
    """Whoever holds a batch, or an error, when the process ends."""
    root = make_picture_folder(tmp_path / 'x')
    if damage == 'damaged':
        (root / 'train' / 'bee' / '007.jpg').write_bytes(b'no picture')
    (tmp_path / 'reads.py').write_text(_READS)
    environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(streaming.__file__).parents[2])}
    command = [sys.executable, str(tmp_path / 'reads.py'), str(root), place]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and ('007.jpg: expected an image' in done.stdout) == (damage == 'damaged')
    assert 'shared_memory' not in done.stderr and 'Exception ignored' not in done.stderr, done.stderr


def test_reading_in_another_thread_keeps_the_order():
    found = list(streaming.read(functools.partial(np.full, 3), 7, start=2, place=lambda tree: tree + 10))
    np.testing.assert_array_equal(found, np.full((5, 3), 1) * np.arange(12, 17)[:, None])
    assert list(streaming.read(np.arange, 4, start=4)) == []


# --- TFDS --------------------------------------------------------------------------------------------


def make_imagenet(root, sizes):
    """A small imagenet2012 as TFDS prepares it: grey pictures, the grey and the label tell each other."""
    tfds = pytest.importorskip('tensorflow_datasets')
    from array_record.python import array_record_module

    path = root / 'imagenet2012' / '5.1.0'
    path.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            'file_name': tfds.features.Text(),
            'image': tfds.features.Image(encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(names=['n01', 'n02', 'n03']),
        }
    )
    features.save_config(str(path))
    for split, size in sizes.items():
        writer = array_record_module.ArrayRecordWriter(
            str(path / f'imagenet2012-{split}.array_record-00000-of-00001'), 'group_size:1'
        )
        for i in range(size):
            jpeg = path / 'one.jpg'
            cv2.imwrite(str(jpeg), np.full((20 + i, 30, 3), 5 * i, np.uint8))
            example = features.encode_example({'file_name': f'{i}.JPEG', 'image': str(jpeg), 'label': (i * i) % 3})
            writer.write(features.serialize_example(example))
            jpeg.unlink()
        writer.close()
    template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    described = [
        {'name': split, 'numBytes': '1', 'shardLengths': [str(size)], 'filepathTemplate': template}
        for split, size in sizes.items()
    ]
    info = {'name': 'imagenet2012', 'version': '5.1.0', 'fileFormat': 'array_record', 'splits': described}
    (path / 'dataset_info.json').write_text(json.dumps(info))
    return path


@pytest.mark.slow
def test_imagenet_from_tfds(tmp_path, monkeypatch):
    path = make_imagenet(tmp_path / 'tfds', {'train': 20, 'validation': 7})
    monkeypatch.setattr(records, '_CHUNK', 6)
    source = sources.load_source('imagenet', tmp_path / 'tfds', image_size=16)
    assert source.class_names == ('n01', 'n02', 'n03') and source.description == 'ImageNet (3 classes) at 16x16'
    np.testing.assert_array_equal(source.train.labels, np.arange(20) ** 2 % 3)
    np.testing.assert_array_equal(places(source.train.images), np.arange(20))
    order = places(source.test.images)
    assert sorted(order) == list(range(7))
    np.testing.assert_array_equal(source.test.labels, order**2 % 3)
    batches = training(source, batch_size=5)
    for batch in [*streaming.read(batches, 4), *streaming.read(batches, 4, workers=1)]:
        np.testing.assert_array_equal(batch['labels'], places(batch['images']) ** 2 % 3)
    # The labels are read once.
    with monkeypatch.context() as patch:
        patch.setattr(records.TFDSRecords, 'labels', None)
        again = sources.load_source('imagenet', tmp_path / 'tfds', image_size=16)
    np.testing.assert_array_equal(again.train.labels, source.train.labels)
    (path / 'imagenet2012-train.array_record-00000-of-00001').write_bytes(b'')
    with pytest.raises(ValueError, match=r'expected an intact TFDS-prepared folder|cannot be read'):
        sources.load_source('imagenet', tmp_path / 'tfds')
