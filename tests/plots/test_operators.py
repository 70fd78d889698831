"""Layers of several nets side by side, of any number of layers and runs."""

import types

import numpy as np
import pytest

from convnorm_jax.plots import operators
from convnorm_jax.plots.operators import layer_operators


def operator(name, size=1.0, linear=True):
    values = size * np.sort(np.random.default_rng(0).uniform(0, 2, 50))[::-1]
    whole = (0.9 * values[0], values / 2) if linear else (None, None)
    return types.SimpleNamespace(
        name=name, conv_norm=0.9 * values[0], conv_circular=values, layer_norm=whole[0], layer_circular=whole[1]
    )


@pytest.mark.parametrize(
    ('runs', 'bounds'),
    [
        ({'convnorm': [operator('conv1'), operator('linear', 0)]}, {'convnorm': 0.0}),
        ({'a': [operator('conv1', linear=False)], 'b': [operator('conv1', 1e6), operator('c', 1e-6)]}, {'b': 3e12}),
        pytest.param(
            {f'run {i}': [operator(f'block{j}/conv') for j in range(60)] for i in range(7)},
            None,
            marks=pytest.mark.slow,
        ),
    ],
    ids=['dead', 'not linear', 'many'],
)
def test_layer_operators(tmp_path, check_picture, runs, bounds):
    path = tmp_path / 'new' / 'spectra.png'
    picture = check_picture(path, layer_operators(runs, path, 'nets', bounds))
    assert picture.shape[1] == 200 * (14 if len(runs) == 7 else 7.2)


def test_it_says_what_it_is_and_shows_each_norm(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(operators, 'write', lambda figure, path: seen.append(figure))
    runs = {'convnorm': [operator('conv1'), operator('linear')], 'oni': [operator('conv1', 3)]}
    layer_operators(runs, tmp_path / 'a.png', 'nets', {'oni': 1234.0})
    (figure,) = seen
    assert figure.get_suptitle() == 'nets (measured, not certified)'
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert 'convnorm' in legend and r'oni, product of norms $1.2 \times 10^{3}$' in legend
    upper, lower = figure.axes
    assert [text.get_text() for text in lower.get_xticklabels()] == ['conv1', 'linear']
    marks = [[*line.get_xdata(), *line.get_ydata()] for line in upper.lines if line.get_marker() in ('o', 'D')]
    top = operator('').conv_norm
    np.testing.assert_allclose(sorted(marks), [[-0.2, top], [0.2, 3 * top], [0.8, top]])
    low, high = upper.get_ylim()
    assert upper.get_yscale() == 'log' and low < 1 < 3 * top < high


@pytest.mark.parametrize('runs', [{}, {'a': []}, {str(i): [operator('c')] for i in range(8)}])
def test_runs_that_can_not_be_drawn(tmp_path, runs):
    with pytest.raises(ValueError, match='expected 1 to 7 runs'):
        layer_operators(runs, tmp_path / 'a.png')
    assert not list(tmp_path.iterdir())
