"""Learning curves are drawn also from few rows and from rows with gaps."""

import types

import matplotlib
import numpy as np
import pytest

from convnorm_jax.plots import training

KEYS = ('train_loss', 'train_accuracy', 'validation_loss', 'validation_accuracy')


def curve_rows(count):
    return [
        {'epoch': str(epoch), 'step': str(10 * epoch), 'learning_rate': str(0.1**(1 + epoch // 4)),
         **{key: str(0.5 + 0.4 / (epoch + 1)) for key in KEYS}}
        for epoch in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize('count', [1, 9, 60])
def test_learning_curves(tmp_path, count, check_picture):
    path = tmp_path / 'new' / 'curves.png'
    picture = check_picture(path, training.learning_curves(curve_rows(count), path, 'a run'))
    assert picture.shape[1] == 1440


@pytest.mark.parametrize(
    'rows',
    [
        [{'epoch': 0, 'train_loss': 1.0}, {'epoch': 1, 'train_loss': 0.5}],
        [{'step': 5, 'train_loss': '1.0', 'validation_loss': ''}, {'step': 9, 'train_loss': None}],
        [{'epoch': 0, 'validation_loss': 1.0}, {'epoch': 1, 'validation_loss': float('nan')}],
        [{'epoch': '', 'train_loss': '2'}, {'epoch': '1', 'train_loss': '1'}],
        [{'epoch': 3}],
    ],
)
def test_learning_curves_with_gaps(tmp_path, rows, check_picture):
    path = tmp_path / 'curves.png'
    check_picture(path, training.learning_curves(rows, path))


def test_best_row_is_that_of_the_validation_set():
    rows = [{'validation_accuracy': value} for value in ('0.1', '', '0.3', '0.2')]
    assert training._best_row(rows) == 2
    assert training._best_row([{'validation_loss': 2}, {'validation_loss': 1}]) == 1
    assert training._best_row([{'train_accuracy': 1}]) is None


@pytest.mark.parametrize(
    ('rates', 'drops'),
    [
        ((1, 1, 0.1, 0.1, 0.01), [2, 4]),
        ((1, 0.1), [1]),
        (tuple(np.cos(np.linspace(0, np.pi / 2, 20))), []),
        ((np.nan, 1, np.nan, 1, 0.1), [4]),
    ],
)
def test_drops_are_where_a_constant_rate_falls(rates, drops):
    lines = []
    axes = types.SimpleNamespace(axvline=lambda position, **_: lines.append(position))
    training._mark_drops(axes, np.arange(len(rates), dtype=float), np.array(rates, float))
    assert lines == drops


def test_no_row_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'len\(rows\)=1'):
        training.learning_curves([{'train_loss': 1}], tmp_path / 'a.png')


def test_the_users_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    training.learning_curves(curve_rows(2), tmp_path / 'a.png')
    assert dict(matplotlib.rcParams) == before
