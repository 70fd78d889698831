"""Grids of attacked images, of any number of images and attacks."""

import numpy as np
import pytest

from convnorm_jax.plots.attacks import attack_grid


@pytest.mark.parametrize(('shape', 'count'), [((8, 8, 1), 10), ((32, 32, 3), 3), ((8, 8, 1), 1)])
def test_attack_grid(tmp_path, shape, count, check_picture):
    random = np.random.default_rng(0)
    clean = random.uniform(size=(count, *shape)).astype(np.float32)
    images = {name: np.clip(clean + 8 / 255, 0, 1) for name in ('FGSM', 'PGD-20')}
    labels = random.integers(0, 3, count)
    predictions = {name: random.integers(0, 3, count) for name in images}
    path = tmp_path / 'grid.png'
    names = ['cat', 'dog', 'aquarium_fish']
    check_picture(path, attack_grid(
        clean, images, labels, labels, predictions, names, path, epsilon=8 / 255, title='a net'
    ))  # fmt: skip


def test_attack_grid_of_one_unnamed_attack(tmp_path, check_picture):
    images, labels = np.full((2, 8, 8, 1), 0.5), np.array([0, 1])
    path = tmp_path / 'grid.png'
    check_picture(path, attack_grid(
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
        attack_grid(**{**arguments, **change}, path=tmp_path / 'grid.png')
    assert not list(tmp_path.iterdir())
