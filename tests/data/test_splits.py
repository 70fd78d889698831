"""Splits, subsets, label noise and the record: counted, seeded, and refused where they make no sense."""

import re

import numpy as np
import pytest

from convnorm_jax.data import splits
from convnorm_jax.data.sources import Source, Split, load_source


def make_source(per_class=100, num_classes=10, name='cifar10'):
    """Image i is filled with i, so that an image says which example it is."""
    n = per_class * num_classes
    labels = np.random.default_rng(5).permutation(np.arange(n) % num_classes).astype(np.int32)
    images = np.arange(n, dtype=np.int64).view(np.uint8).reshape(n, 2, 2, 2)
    return Source(
        name,
        name,
        Split(images, labels),
        Split(images[:num_classes], labels[:num_classes]),
        num_classes,
        tuple(f'c{i}' for i in range(num_classes)),
        (0.5, 0.5),
        (0.5, 0.5),
    )


def counts(labels, num_classes=10):
    return np.bincount(labels, minlength=num_classes).tolist()


def test_held_out_counts_and_disjointness():
    source = make_source()
    prepared = splits.prepare(source, validation_fraction=0.1, subset_fraction=0.3)
    train, held = prepared.record['train_indices'], prepared.record['validation_indices']
    assert counts(source.train.labels[train]) == [27] * 10 and counts(source.train.labels[held]) == [10] * 10
    assert len(set(train)) == 270 and not set(train) & set(held)
    np.testing.assert_array_equal(prepared.train.images, source.train.images[train])
    np.testing.assert_array_equal(prepared.train.labels, source.train.labels[train])
    np.testing.assert_array_equal(prepared.validation.images, source.train.images[held])
    assert prepared.test is source.test
    assert prepared.train.labels.dtype == prepared.validation.labels.dtype == np.int32


def test_everything_is_used_once_by_default():
    record = splits.prepare(make_source()).record
    both = np.concatenate([record['train_indices'], record['validation_indices']])
    assert sorted(both.tolist()) == list(range(1000)) and len(record['validation_indices']) == 100


def test_published_trains_on_validation():
    source = make_source()
    whole = splits.prepare(source, validation='published').record
    assert whole['train_indices'].tolist() == list(range(1000))
    held = whole['validation_indices']
    assert counts(source.train.labels[held]) == [10] * 10
    small = splits.prepare(source, validation='published', subset_fraction=0.95).record
    np.testing.assert_array_equal(small['validation_indices'], held)
    # The first 95 % and the last 10 % of each class share its 90th to 95th percent.
    assert counts(source.train.labels[np.intersect1d(small['train_indices'], held)]) == [5] * 10


def test_subsets_are_nested_and_validation_stays():
    small, large = (splits.prepare(make_source(), subset_fraction=f).record for f in (0.1, 0.5))
    assert set(small['train_indices']) < set(large['train_indices'])
    np.testing.assert_array_equal(small['validation_indices'], large['validation_indices'])


def test_no_validation():
    prepared = splits.prepare(make_source(), validation_fraction=0)
    assert prepared.validation.images.shape == (0, 2, 2, 2) and prepared.validation.labels.shape == (0,)
    assert len(prepared.train.labels) == 1000
    noisy = splits.prepare(make_source(), validation_fraction=0, noise_kind='symmetric', noise_rate=0.5)
    assert len(noisy.validation.labels) == 0


def test_shares_do_not_lose_an_example_to_rounding():
    record = splits.prepare(make_source(), validation_fraction=0, subset_fraction=0.29).record  # .29 * 100 < 29
    assert len(record['train_indices']) == 290


def test_digits_keep_their_class_shares():
    source = load_source('digits')
    prepared = splits.prepare(source, subset_fraction=0.5)
    share = np.bincount(prepared.train.labels) / np.bincount(source.train.labels)
    assert np.all(np.abs(share - 0.45) < 0.01)


@pytest.mark.parametrize('kind', ['symmetric', 'asymmetric'])
@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_noise_goes_to_train_and_validation_but_not_to_test(kind, name):
    source = make_source(200, 10 if name == 'cifar10' else 20, name)
    before = source.train.labels.copy(), source.test.labels.copy()
    prepared = splits.prepare(source, noise_kind=kind, noise_rate=0.4)
    record = prepared.record
    for part, split in (('train', prepared.train), ('validation', prepared.validation)):
        clean = source.train.labels[record[f'{part}_indices']]
        np.testing.assert_array_equal(record[f'{part}_clean_labels'], clean)
        np.testing.assert_array_equal(record[f'{part}_labels'], split.labels)
        np.testing.assert_array_equal(record[f'{part}_noisy'], split.labels != clean)
        assert record[f'{part}_noisy'].dtype == bool
        assert 0.1 < record[f'{part}_noisy'].mean() < 0.45
        assert not np.any(record[f'{part}_noisy'] & ~record[f'{part}_touched'])
    np.testing.assert_array_equal(source.train.labels, before[0])
    np.testing.assert_array_equal(prepared.test.labels, before[1])
    clean = splits.prepare(source).record
    np.testing.assert_array_equal(record['train_indices'], clean['train_indices'])
    assert not clean['train_noisy'].any() and not clean['train_touched'].any()


def test_train_and_validation_noise_are_independent_draws():
    options = dict(validation_fraction=0.5, noise_kind='symmetric', noise_rate=0.5)
    record = splits.prepare(make_source(), **options).record  # 500 and 500 examples
    assert np.mean(record['train_touched'] & record['validation_touched']) == pytest.approx(0.25, abs=0.05)
    # The same examples, trained on and held for validation, are annotated twice.
    record = splits.prepare(make_source(), validation='published', **options).record  # training indices are 0 ... 999
    held = record['validation_indices']
    assert np.mean(record['train_touched'][held] & record['validation_touched']) == pytest.approx(0.25, abs=0.05)


def test_seed_decides():
    source = make_source()
    options = dict(subset_fraction=0.5, noise_kind='symmetric', noise_rate=0.3)
    first, again, other = (splits.prepare(source, seed=s, **options).record for s in (1, 1, 2))
    assert first.keys() == again.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    for key in ('train_indices', 'validation_indices', 'train_labels'):
        assert not np.array_equal(first[key], other[key])


# --- noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('n', 'rate', 'expected'),
    [(1000, 0.2, 200), (999, 0.2, 200), (100, 0.07, 7), (10, 0.0, 0), (10, 1.0, 10), (0, 0.5, 0)],
)
def test_symmetric_touches_the_share_rounded_up(n, rate, expected):
    labels = np.zeros(n, np.int32)
    noisy, touched = splits.symmetric_noise(labels, 10, rate, np.random.default_rng(0))
    assert touched.sum() == expected and touched.dtype == bool and noisy.dtype == np.int32
    np.testing.assert_array_equal(noisy[~touched], labels[~touched])


def test_symmetric_draws_from_all_classes():
    labels = np.full(50_000, 3)
    noisy, touched = splits.symmetric_noise(labels, 10, 0.4, np.random.default_rng(0))
    share = np.bincount(noisy[touched], minlength=10) / touched.sum()
    assert np.all(np.abs(share - 0.1) < 0.01)
    assert (noisy != labels).mean() == pytest.approx(0.36, abs=0.005)
    assert touched[:25_000].mean() == pytest.approx(0.4, abs=0.01)  # anywhere, not the first ones


def test_asymmetric_cifar10_by_name():
    names = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
    labels = np.repeat(np.arange(10), 50)
    noisy, touched = splits.asymmetric_noise(labels, 10, 0.3, np.random.default_rng(0), 'cifar10')
    moves = {}
    for old, new in zip(labels[touched], noisy[touched], strict=True):
        moves[names[old], names[new]] = moves.get((names[old], names[new]), 0) + 1
    assert moves == {
        ('truck', 'automobile'): 15,
        ('bird', 'airplane'): 15,
        ('cat', 'dog'): 15,
        ('dog', 'cat'): 15,
        ('deer', 'horse'): 15,
    }
    np.testing.assert_array_equal(noisy != labels, touched)


def test_asymmetric_elsewhere_is_the_next_class():
    labels = np.repeat(np.arange(100), 200)
    noisy, touched = splits.asymmetric_noise(labels, 100, 0.3, np.random.default_rng(0), 'cifar100')
    np.testing.assert_array_equal(noisy[touched], (labels[touched] + 1) % 100)
    np.testing.assert_array_equal(noisy[~touched], labels[~touched])
    assert touched.mean() == pytest.approx(0.3, abs=0.01)
    assert np.any(noisy[-200:] == 0)  # the last class wraps around
    assert splits.asymmetric_noise(labels, 100, 1.0, np.random.default_rng(0), 'svhn')[1].all()
    assert not splits.asymmetric_noise(labels, 100, 0.0, np.random.default_rng(0), 'svhn')[1].any()


# --- the record --------------------------------------------------------------------------------------


def test_record_round_trip_reproduces(tmp_path):
    source = make_source()
    options = dict(
        validation_fraction=0.2,
        validation='published',
        subset_fraction=0.5,
        noise_kind='asymmetric',
        noise_rate=0.25,
        seed=7,
    )
    prepared = splits.prepare(source, **options)
    path = tmp_path / 'record'
    splits.save_record(prepared, path)
    assert [p.name for p in tmp_path.iterdir()] == ['record']
    record = splits.load_record(path)
    assert record.keys() == prepared.record.keys()
    read = {key: record[key].item() for key in options}
    assert read == options and record['name'].item() == 'cifar10'
    again = splits.prepare(source, **read)
    for key, value in record.items():
        np.testing.assert_array_equal(value, again.record[key])


def test_bad_records(tmp_path):
    path = tmp_path / 'record.npz'
    for content in (None, b'', b'nonsense', b'PK\x03\x04 nonsense'):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path='.*record\.npz': expected a record.*cannot be read") as error:
            splits.load_record(path)
        assert '\n' not in str(error.value)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match='holds no train_indices'):
        splits.load_record(path)
    np.save(tmp_path / 'array.npy', np.zeros(3))
    with pytest.raises(ValueError, match='cannot be read'):
        splits.load_record(tmp_path / 'array.npy')


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(validation='held'), "validation='held': expected one of held_out, published"),
        (dict(validation_fraction=-0.1), 'validation_fraction=-0.1: expected a share in [0, 1)'),
        (dict(validation_fraction=1.0), 'validation_fraction=1.0: expected a share in [0, 1)'),
        (dict(validation_fraction=float('nan')), 'validation_fraction=nan: expected a share'),
        (dict(validation_fraction=0.004), 'validation_fraction=0.004: expected at least one validation example'),
        (dict(subset_fraction=0.0), 'subset_fraction=0.0: expected a share in (0, 1]'),
        (dict(subset_fraction=1.01), 'subset_fraction=1.01: expected a share in (0, 1]'),
        (
            dict(subset_fraction=0.005),
            'subset_fraction=0.005: expected at least one training example of each class, but',
        ),
        (dict(validation_fraction=0.996), 'subset_fraction=1.0: expected at least one training example'),
        (dict(noise_kind='uniform'), "noise_kind='uniform': expected one of none, symmetric, asymmetric"),
        (dict(noise_kind='symmetric', noise_rate=1.1), 'noise_rate=1.1: expected a share in [0, 1]'),
        (dict(noise_kind='symmetric', noise_rate=-0.1), 'noise_rate=-0.1: expected a share in [0, 1]'),
        (dict(noise_rate=0.2), "noise_rate=0.2: expected 0 with noise_kind='none'"),
        (dict(seed=-1), 'seed=-1: expected a whole number >= 0'),
        (dict(seed=0.5), 'seed=0.5: expected a whole number >= 0'),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        splits.prepare(make_source(), **options)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('rate', [-0.01, 1.01, float('nan')])
def test_refused_rates(rate):
    rng, labels = np.random.default_rng(0), np.zeros(4, np.int32)
    with pytest.raises(ValueError, match=r'rate=.*expected a share in \[0, 1\]'):
        splits.symmetric_noise(labels, 10, rate, rng)
    with pytest.raises(ValueError, match=r'rate=.*expected a share in \[0, 1\]'):
        splits.asymmetric_noise(labels, 10, rate, rng, 'cifar100')


def test_refused_labels():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r'labels in \[0, 10\]: expected them in \[0, num_classes=10\)'):
        splits.symmetric_noise(np.array([0, 10]), 10, 0.5, rng)
    with pytest.raises(ValueError, match=r"num_classes=11: expected 10 with dataset='cifar10'"):
        splits.asymmetric_noise(np.array([0, 10]), 11, 0.5, rng, 'cifar10')
