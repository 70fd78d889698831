"""Makes training, validation and test sets of a `Source`: held-out examples, subsets, label noise, and the record."""

import dataclasses
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from convnorm_jax.data.sources import Source, Split
from convnorm_jax.errors import UserError
from convnorm_jax.files import write_atomically

NOISE_KINDS = ('none', 'symmetric', 'asymmetric')
VALIDATION_KINDS = ('held_out', 'published')

# Confusions of similar classes, in CIFAR-10's order: airplane, automobile, bird, cat, deer, dog, frog,
# horse, ship, truck.
_CIFAR10_CONFUSIONS = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The splits of an experiment.

    Attributes:
        train: the training set, with label noise if any.
        validation: the validation set, with label noise if any.
        test: the test set, never with noise.
        record: arrays that reproduce the splits, see `prepare`.
    """

    train: Split
    validation: Split
    test: Split
    record: dict[str, np.ndarray]


def prepare(
    source: Source,
    *,
    validation_fraction: float = 0.1,
    validation: str = 'held_out',
    subset_fraction: float = 1.0,
    noise_kind: str = 'none',
    noise_rate: float = 0.0,
    seed: int = 0,
) -> Prepared:
    """Splits a data set, takes a subset and adds label noise, with the same share of every class.

    Each class is shuffled once, by the seed alone. The validation set is its last `validation_fraction`. With
    'held_out' training gets the first `subset_fraction` of the rest, with 'published' the first
    `subset_fraction` of the whole class, validation examples included. Shares are rounded to the nearest
    whole example. Noise is added to train and, by an independent draw, to validation (as if labelled by the
    same annotators), never to test. Noise does not change the split: the random numbers are independent.

    >>> from convnorm_jax.data.sources import load_source
    >>> prepared = prepare(load_source('digits'), noise_kind='symmetric', noise_rate=0.5)
    >>> len(prepared.train.labels), len(prepared.validation.labels), int(prepared.record['train_touched'].sum())
    (1292, 145, 646)

    Args:
        source: the data set.
        validation_fraction: share in [0, 1) of each class; 0 gives an empty validation set.
        validation: 'held_out' or 'published'.
        subset_fraction: share in (0, 1] of each class.
        noise_kind: one of `NOISE_KINDS`.
        noise_rate: share in [0, 1]; must be 0 for 'none'.
        seed: int >= 0.

    Returns:
        A `Prepared`. Its record holds, with indices into `source.train` in ascending order:
        train_indices, validation_indices (int64); train_labels, train_clean_labels, validation_labels,
        validation_clean_labels (int32); train_noisy, validation_noisy (bool: the label differs from the
        clean one); train_touched, validation_touched (bool: the label was drawn again, perhaps the same one);
        and every argument: name, validation, validation_fraction, subset_fraction, noise_kind, noise_rate,
        seed.

    Raises:
        ValueError: an argument is out of range, or a class would be left without an example.
    """
    _check_arguments(validation_fraction, validation, subset_fraction, noise_kind, noise_rate, seed)
    order_seed, train_seed, validation_seed = np.random.SeedSequence(seed).spawn(3)
    train, held = _choose(source, validation_fraction, validation, subset_fraction, np.random.default_rng(order_seed))
    record = {'train_indices': train, 'validation_indices': held}
    for part, part_seed in (('train', train_seed), ('validation', validation_seed)):
        clean = source.train.labels[record[f'{part}_indices']]
        noisy, touched = _add_noise(clean, source, noise_kind, noise_rate, np.random.default_rng(part_seed))
        record |= {
            f'{part}_labels': noisy,
            f'{part}_clean_labels': clean,
            f'{part}_noisy': noisy != clean,
            f'{part}_touched': touched,
        }
    record |= {
        'name': np.array(source.name),
        'validation': np.array(validation),
        'validation_fraction': np.array(validation_fraction),
        'subset_fraction': np.array(subset_fraction),
        'noise_kind': np.array(noise_kind),
        'noise_rate': np.array(noise_rate),
        'seed': np.array(seed),
    }
    return Prepared(
        train=Split(source.train.images[train], record['train_labels']),
        validation=Split(source.train.images[held], record['validation_labels']),
        test=source.test,
        record=record,
    )


def _check_arguments(
    validation_fraction: float, validation: str, subset_fraction: float, noise_kind: str, noise_rate: float, seed: int
) -> None:
    if validation not in VALIDATION_KINDS:
        raise UserError(
            f'validation={validation!r}: expected one of {", ".join(VALIDATION_KINDS)}; '
            'held_out keeps the validation examples out of training'
        )
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f'validation_fraction={validation_fraction!r}: expected a share in [0, 1); '
            'give e.g. 0.1, or 0 for no validation set'
        )
    if not 0 < subset_fraction <= 1:
        raise UserError(f'subset_fraction={subset_fraction!r}: expected a share in (0, 1]; give 1.0 for all examples')
    if noise_kind not in NOISE_KINDS:
        raise UserError(f'noise_kind={noise_kind!r}: expected one of {", ".join(NOISE_KINDS)}; choose one of them')
    _check_rate(noise_rate, 'noise_rate')
    if noise_kind == 'none' and noise_rate != 0:
        raise UserError(
            f"noise_rate={noise_rate!r}: expected 0 with noise_kind='none'; "
            'set noise_kind to symmetric or asymmetric, or the rate to 0'
        )
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f'seed={seed!r}: expected a whole number >= 0; give e.g. 0')


def _check_rate(rate: float, name: str = 'rate') -> None:
    if not 0 <= rate <= 1:
        raise UserError(f'{name}={rate!r}: expected a share in [0, 1]; give e.g. 0.2 for 20 %')


def _choose(
    source: Source, validation_fraction: float, validation: str, subset_fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation examples, each ascending."""
    train, held = [], []
    for label, class_name in enumerate(source.class_names):
        members = rng.permutation(np.flatnonzero(source.train.labels == label))
        n_held = _round(validation_fraction * len(members))
        if validation_fraction > 0 and n_held == 0:
            raise UserError(
                f'validation_fraction={validation_fraction!r}: expected at least one validation '
                f'example of each class, but {class_name!r} has {len(members)} in all; '
                'give a larger share, or 0 for none'
            )
        # members[-n_held:] would be everything if n_held is 0.
        kept, last = members[: len(members) - n_held], members[len(members) - n_held :]
        pool = kept if validation == 'held_out' else members
        subset = pool[: _round(subset_fraction * len(pool))]
        if not len(subset):
            raise UserError(
                f'subset_fraction={subset_fraction!r}: expected at least one training example of each '
                f'class, but {class_name!r} has {len(pool)} to take from; give a larger share'
            )
        train.append(subset)
        held.append(last)
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held))


def _round(count: float) -> int:
    """Rounds to the nearest whole number, halves up; 0.29 * 100 is 28.999999999999996, which must not become 28."""
    return math.floor(count + 0.5)


def _round_up(count: float) -> int:
    """Rounds up to a whole number, except that 0.07 * 100 = 7.000000000000001 is 7."""
    return math.ceil(round(count, 6))


def _add_noise(
    labels: np.ndarray, source: Source, kind: str, rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    if kind == 'symmetric':
        return symmetric_noise(labels, source.num_classes, rate, rng)
    if kind == 'asymmetric':
        return asymmetric_noise(labels, source.num_classes, rate, rng, source.name)
    return labels.copy(), np.zeros(len(labels), bool)


def symmetric_noise(
    labels: np.ndarray, num_classes: int, rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a new label, uniformly from all classes, for the share `rate` of the examples.

    The new label may be the old one: with 10 classes, 0.9 * rate of the labels become wrong.

    >>> clean = np.zeros(1000, int)
    >>> noisy, touched = symmetric_noise(clean, num_classes=10, rate=0.4, rng=np.random.default_rng(0))
    >>> int(touched.sum())
    400

    Args:
        labels: int [N].
        num_classes: number of classes.
        rate: share in [0, 1]; rate * N is rounded up.
        rng: random numbers.

    Returns:
        (int32 [N] noisy labels, bool [N] whose label was drawn again).

    Raises:
        ValueError: rate outside [0, 1], or a label outside [0, num_classes).
    """
    labels = _checked_labels(labels, num_classes, rate)
    touched = np.zeros(len(labels), bool)
    touched[rng.permutation(len(labels))[: _round_up(rate * len(labels))]] = True
    noisy = labels.copy()
    noisy[touched] = rng.integers(num_classes, size=int(touched.sum()))
    return noisy, touched


def asymmetric_noise(
    labels: np.ndarray, num_classes: int, rate: float, rng: np.random.Generator, dataset: str
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces labels by those of similar classes.

    'cifar10': the share `rate` (rounded up) of each of five classes: truck -> automobile, bird -> airplane,
    cat <-> dog, deer -> horse. Any other data set: each label moves to the next class, the last one to
    the first, with probability `rate`.

    Args:
        labels: int [N].
        num_classes: number of classes.
        rate: share in [0, 1].
        rng: random numbers.
        dataset: the data set's name.

    Returns:
        (int32 [N] noisy labels, bool [N] whose label was changed).

    Raises:
        ValueError: rate outside [0, 1], a label outside [0, num_classes), or 'cifar10' without 10 classes.
    """
    labels = _checked_labels(labels, num_classes, rate)
    if dataset != 'cifar10':
        touched = rng.random(len(labels)) < rate
        return np.where(touched, (labels + 1) % num_classes, labels).astype(np.int32), touched
    if num_classes != 10:
        raise UserError(
            f"num_classes={num_classes!r}: expected 10 with dataset='cifar10'; name the data set that it is"
        )
    noisy, touched = labels.copy(), np.zeros(len(labels), bool)
    for old, new in _CIFAR10_CONFUSIONS.items():
        members = rng.permutation(np.flatnonzero(labels == old))
        chosen = members[: _round_up(rate * len(members))]
        noisy[chosen], touched[chosen] = new, True
    return noisy, touched


def _checked_labels(labels: np.ndarray, num_classes: int, rate: float) -> np.ndarray:
    _check_rate(rate)
    labels = np.asarray(labels, np.int32)
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f'labels in [{labels.min()}, {labels.max()}]: expected them in '
            f'[0, num_classes={num_classes}); give the number of classes that the labels have'
        )
    return labels


def save_record(prepared: Prepared, path: str | Path) -> None:
    """Writes `prepared.record` to `path` as .npz, atomically: a reader never sees half a file.

    Args:
        prepared: the splits.
        path: file to write; used as given, no suffix is added.

    Raises:
        OSError: the file cannot be written.
    """
    arrays: dict[str, Any] = prepared.record
    write_atomically(Path(path), lambda file: np.savez_compressed(file, **arrays))


def load_record(path: str | Path) -> dict[str, np.ndarray]:
    """Reads what `save_record` wrote.

    Args:
        path: the .npz file.

    Returns:
        The record, see `prepare`.

    Raises:
        ValueError: there is no such file, or it is not a record.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            record = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'path={str(path)!r}: expected a record written by save_record, but it cannot be read '
            f'({reason}); give the record .npz of a run'
        ) from error
    if 'train_indices' not in record:
        raise UserError(
            f'path={str(path)!r}: expected a record written by save_record, but it holds no '
            'train_indices; give the record .npz of a run'
        )
    return record
