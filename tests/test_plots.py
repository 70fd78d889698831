"""Each picture is a valid PNG of a sensible size, also from little or odd data."""

import types

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from convnorm_jax import plots

KEYS = ('train_loss', 'train_accuracy', 'validation_loss', 'validation_accuracy')


def check_picture(path, returned):
    """A readable PNG, nothing beside it, wide enough for print, and not blank."""
    assert returned == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = matplotlib.image.imread(path)
    height, width = picture.shape[:2]
    assert 200 <= height <= 3000 and 300 <= width <= 3000
    assert picture[..., :3].std() > 0.02
    return picture


def curve_rows(count):
    return [
        {'epoch': str(epoch), 'step': str(10 * epoch), 'learning_rate': str(0.1**(1 + epoch // 4)),
         **{key: str(0.5 + 0.4 / (epoch + 1)) for key in KEYS}}
        for epoch in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize('count', [1, 9, 60])
def test_learning_curves(tmp_path, count):
    path = tmp_path / 'new' / 'curves.png'
    picture = check_picture(path, plots.learning_curves(curve_rows(count), path, 'a run'))
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
def test_learning_curves_with_gaps(tmp_path, rows):
    path = tmp_path / 'curves.png'
    check_picture(path, plots.learning_curves(rows, path))


def test_best_row_is_that_of_the_validation_set():
    rows = [{'validation_accuracy': value} for value in ('0.1', '', '0.3', '0.2')]
    assert plots._best_row(rows) == 2
    assert plots._best_row([{'validation_loss': 2}, {'validation_loss': 1}]) == 1
    assert plots._best_row([{'train_accuracy': 1}]) is None


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
    plots._mark_drops(axes, np.arange(len(rates), dtype=float), np.array(rates, float))
    assert lines == drops


@pytest.mark.parametrize(('shape', 'count'), [((8, 8, 1), 10), ((32, 32, 3), 3), ((8, 8, 1), 1)])
def test_attack_grid(tmp_path, shape, count):
    random = np.random.default_rng(0)
    clean = random.uniform(size=(count, *shape)).astype(np.float32)
    images = {name: np.clip(clean + 8 / 255, 0, 1) for name in ('FGSM', 'PGD-20')}
    labels = random.integers(0, 3, count)
    predictions = {name: random.integers(0, 3, count) for name in images}
    path = tmp_path / 'grid.png'
    names = ['cat', 'dog', 'aquarium_fish']
    check_picture(path, plots.attack_grid(
        clean, images, labels, labels, predictions, names, path, epsilon=8 / 255, title='a net'
    ))  # fmt: skip


def test_attack_grid_of_one_unnamed_attack(tmp_path):
    images, labels = np.full((2, 8, 8, 1), 0.5), np.array([0, 1])
    path = tmp_path / 'grid.png'
    check_picture(path, plots.attack_grid(
        images, images, labels, labels, 1 - labels, ['a', 'b'], path, epsilon=0.1
    ))  # fmt: skip


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'epsilon': 0}, 'epsilon=0'),
        ({'attacked_predictions': {'PGD': [0, 1]}}, r"attacked_predictions=\['PGD'\]"),
        ({'attacked': np.zeros((2, 4, 4, 1))}, r"attacked\['attacked'\].shape=\(2, 4, 4, 1\)"),
    ],
)
def test_attack_grid_names_what_is_wrong(tmp_path, change, message):
    images = np.zeros((2, 8, 8, 1))
    arguments = {
        'clean': images, 'attacked': images, 'labels': [0, 1], 'clean_predictions': [0, 1],
        'attacked_predictions': [0, 1], 'class_names': ['a', 'b'], 'epsilon': 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        plots.attack_grid(**{**arguments, **change}, path=tmp_path / 'grid.png')
    assert not list(tmp_path.iterdir())


def spectrum(size, channels=4, dead=False):
    random = np.random.default_rng(0)
    power = random.uniform(0.1, 3, (size[0], size[1] // 2 + 1, channels))
    values = np.sort(random.uniform(0, 2, size[0] * size[1] * channels))[::-1]
    if dead:
        power, values = 0 * power, 0 * values
    return types.SimpleNamespace(
        name=f'layer {size}', size=size, power_before=power, power_after=np.sign(power),
        singular_before=values, singular_after=values**0.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    'spectra',
    [
        [spectrum((6, 7))],
        [spectrum((1, 1), channels=1)],
        [spectrum((6, 6), dead=True)],
        [spectrum((4 + index, 34)) for index in range(9)],
    ],
    ids=['one', 'tiny', 'dead', 'many'],
)
def test_layer_spectra(tmp_path, spectra):
    path = tmp_path / 'spectra.png'
    picture = check_picture(path, plots.layer_spectra(spectra, path, 'layers'))
    assert picture.shape[0] == round(200 * (0.9 + 1.65 * min(len(spectra), 6)))


def test_no_data_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'spectra=\[\]'):
        plots.layer_spectra([], tmp_path / 'a.png')
    with pytest.raises(ValueError, match='rows=1'):
        plots.learning_curves([{'train_loss': 1}], tmp_path / 'a.png')


def test_the_users_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.learning_curves(curve_rows(2), tmp_path / 'a.png')
    assert dict(matplotlib.rcParams) == before
