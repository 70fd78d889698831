"""Accuracy against a setting: of one method, of many, with and without error bars."""

import numpy as np
import pytest

from convnorm_jax.plots import comparison
from convnorm_jax.plots.figure import new_figure


def points(settings, deviation=1.0, height=50.0):
    return [(x, height - 10 * x, deviation) for x in settings]


@pytest.mark.parametrize(
    ('panels', 'size'),
    [
        ({'test': {'a': points((0, 0.2, 0.4))}}, (720, 582)),
        ({'test': {'a': points((0.2, 0), None), 'b': points((0.1,))}, 'PGD': {'b': points((0.3,), 0.0)}}, (1000, 582)),
        ({str(k): {f'method {i}': points((1e-3, 1)) for i in range(14)} for k in range(4)}, (1000, 1190)),
        ({str(k): {'a': points(range(12))} for k in range(5)}, (1500, 1062)),
    ],
    ids=['one', 'gaps', 'many methods', 'many panels'],
)
def test_accuracy_against(tmp_path, check_picture, panels, size):
    path = tmp_path / 'new' / 'a.png'
    picture = check_picture(path, comparison.accuracy_against(panels, path, x_name='rate', title='a sweep'))
    assert picture.shape[1::-1] == size


def draw(panel):
    """The axes of one panel."""
    figure = new_figure(3, 3)
    axes = figure.subplots()
    comparison._draw_panel(figure, axes, panel, list(panel))
    return axes


def test_what_is_drawn():
    axes = draw({'a': [(0.4, 60, 2.0), (0.0, 70, 0.0), (0.2, 66, None)], 'b': [(0.2, 50, 3.0)]})
    (line, bars), (other, other_bars) = [(c.lines[0], c.lines[2][0]) for c in axes.containers]
    np.testing.assert_array_equal(line.get_xydata(), [(0, 70), (0.2, 66), (0.4, 60)])
    np.testing.assert_array_equal(other.get_xydata(), [(0.2, 50)])
    drawn = [segment for segment in bars.get_segments() if np.isfinite(segment).all() and len(segment)]
    np.testing.assert_allclose(drawn, [[(0.4, 58), (0.4, 62)]])
    np.testing.assert_allclose(other_bars.get_segments(), [[(0.2, 47), (0.2, 53)]])
    assert line.get_color() != other.get_color() and line.get_marker() != other.get_marker()
    assert list(axes.get_xticks()) == [0, 0.2, 0.4] and axes.get_xscale() == 'linear'


@pytest.mark.parametrize(
    ('values', 'low', 'high'),
    [
        (((0, 1.0), (0.1, 0.0)), -0.3, 4.3),  # nothing survives: not blown up to a mountain
        (((99.5, 0.2), (99.9, 0.05)), 95.5, 100.5),
        (((40, 10.0), (60, 10.0)), 26, 74),
        (((50, None), (50, None)), 47.5, 52.5),
    ],
)
def test_the_scale_of_accuracy(values, low, high):
    axes = draw({'a': [(x, *value) for x, value in enumerate(values)]})
    bottom, top = axes.get_ylim()
    assert low <= bottom < top <= high and top - bottom >= 4
    for mean, deviation in values:
        assert bottom <= max(0, mean - (deviation or 0)) and mean + (deviation or 0) <= top


def test_a_wide_range_of_settings_is_logarithmic():
    assert draw({'a': points((1e-4, 1e-2, 1))}).get_xscale() == 'log'
    assert draw({'a': points((0, 1e-2, 1))}).get_xscale() == 'linear'
    assert draw({'a': points((0.1, 1))}).get_xscale() == 'linear'


def test_nothing_to_draw_is_an_error(tmp_path):
    for panels, message in (({}, 'panels={}'), ({'test': {'a': []}}, "panels\\['test'\\]")):
        with pytest.raises(ValueError, match=message):
            comparison.accuracy_against(panels, tmp_path / 'a.png', x_name='x')
    assert not list(tmp_path.iterdir())
