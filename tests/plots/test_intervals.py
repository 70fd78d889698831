"""Forest plots of differences, and relations."""

import math

import pytest

from convnorm_jax.errors import UserError
from convnorm_jax.plots import intervals, relations
from convnorm_jax.plots.figure import BLUE, GREY, VERMILLION


@pytest.mark.parametrize('number', [1, 3, 5])
def test_many_comparisons_are_in_rows_of_three(tmp_path, check_picture, number):
    panels = {f'minus {name}': [('0', 1.0, -1.0, 3.0), ('0.4', 5.0, 4.0, 6.0)] for name in range(number)}
    path = tmp_path / 'a.png'
    picture = check_picture(path, intervals.interval_plot(panels, path, x_name='points'))
    assert picture.shape[1] == round(200 * max(3.6, 2.6 * min(number, 3)))


def test_interval_plot(tmp_path, check_picture):
    panels = {
        'minus BatchNorm': [('0', 1.0, -1.0, 3.0), ('0.4', 5.0, 4.0, 6.0)],
        'minus ONI': [('0', -2.0, math.nan, math.nan)],
    }
    path = tmp_path / 'a.png'
    check_picture(path, intervals.interval_plot(panels, path, x_name='points', title='a study'))


@pytest.mark.parametrize(
    ('interval', 'lower', 'colour'),
    [((1, 3), False, BLUE), ((-3, -1), False, VERMILLION), ((-1, 1), False, GREY), ((math.nan, math.nan), False, GREY),
     ((1, 3), True, VERMILLION), ((-3, -1), True, BLUE)],
)  # fmt: skip
def test_the_colour_says_which_is_better(interval, lower, colour):
    assert intervals._colour(*interval, lower) == colour


def test_relation_plot(tmp_path, check_picture):
    panels = {'norm': {'ConvNorm': (1.0, 20.0), 'BatchNorm': (30.0, 18.0)}, 'product': {'ConvNorm': (5.0, 20.0)}}
    path = tmp_path / 'a.png'
    check_picture(path, relations.relation_plot(panels, path, y_name='accuracy (%)', title='a study'))


@pytest.mark.parametrize('panels', [{}, {'a': {}}])
def test_nothing_to_draw(tmp_path, panels):
    with pytest.raises(UserError, match='expected at least one'):
        relations.relation_plot(panels, tmp_path / 'a.png', y_name='y')
    with pytest.raises(UserError, match='expected at least one'):
        intervals.interval_plot({name: [] for name in panels}, tmp_path / 'a.png', x_name='x')
