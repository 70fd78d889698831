"""What the pictures of robustness show is what they were given; and the Wilson interval against SciPy."""

import matplotlib.colors
import numpy as np
import pytest
import scipy.stats

from convnorm_jax import plots
from convnorm_jax.attacks.simba import SimbaResult, simba_summary
from convnorm_jax.data.corruptions import CORRUPTIONS, corrupt, mean_corruption_accuracy
from convnorm_jax.plots import corruptions, robustness

CURVES = {'a': [(8, 0.5), (0, 0.9), (4, 0.75)], 'b': [(0, 1.0), (16, 0.0)]}
ROWS = [('clean', 0.8125, 16), ('PGD-20', 0.5, 16), ('AutoAttack', 0.0, 16)]
CLEAN = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def table(names=CORRUPTIONS, severities=(1, 2, 3, 4, 5)):
    random = np.random.default_rng(0)
    return {name: {severity: random.uniform() for severity in severities} for name in names}


def corrupted(clean, names):
    return {name: [corrupt(clean[None], name, severity, 0)[0] for severity in (1, 2, 3, 4, 5)] for name in names}


def searches():
    """Two attacks: the second's first example was misclassified to begin with, its last was never fooled."""
    return {
        'Square': (np.array([1, 7, 7, 100]), np.array([True, True, True, True])),
        'SimBA': (np.array([0, 3, 40, 200, 500], np.int32), np.array([True, True, True, True, False])),
    }


@pytest.fixture
def drawn(monkeypatch):
    """drawn() -> the figure of the last picture written."""
    figures, write = [], robustness.write  # corruptions has the same one

    def keep(figure, path):
        figures.append(figure)
        return write(figure, path)

    for module in (robustness, corruptions):
        monkeypatch.setattr(module, 'write', keep)
    return lambda: figures[-1]


def check_texts(figure):
    """No text crosses the figure's edge, and no two cover each other."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    texts = [*axes.texts, axes.xaxis.label, axes.yaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        texts += [tick.label2 if axis.get_ticks_position() == 'top' else tick.label1
                  for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]  # fmt: skip
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    texts += [figure._suptitle] if figure._suptitle else []
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert box.count_overlaps(boxes[:index]) == 0, texts[index]


@pytest.mark.parametrize('title', [None, 'a long title of a picture, longer than the picture is wide'])
@pytest.mark.parametrize('draw', [
    lambda path, title: robustness.epsilon_curve(CURVES, path, title, epsilon=8),
    lambda path, title: robustness.epsilon_curve({'only': [(0, 0.0)]}, path, title, epsilon=16),
    lambda path, title: robustness.epsilon_curve({f'method {i}': [(0, 1), (8, i / 8)] for i in range(8)}, path, title),
    lambda path, title: robustness.attack_bars(ROWS, path, title),
    lambda path, title: robustness.attack_bars([('a very long attack', 1.0, 9), ('b', 0, 10000)], path, title),
    lambda path, title: plots.corruption_table(table(), path, title),
    lambda path, title: plots.corruption_pictures(CLEAN, corrupted(CLEAN, CORRUPTIONS), path, title),
    lambda path, title: robustness.query_curve(searches(), path, title),
], ids=['epsilon', 'one point', 'many', 'bars', 'two bars', 'table', 'pictures', 'queries'])  # fmt: skip
def test_pictures(tmp_path, draw, title, drawn, check_picture):
    path = tmp_path / 'new' / 'a.png'
    picture = check_picture(path, draw(path, title))
    assert 690 <= picture.shape[1] <= 1000  # a column, but for the grid of pictures
    check_texts(drawn())


def test_epsilon_curve_draws_its_points(tmp_path, drawn):
    robustness.epsilon_curve(CURVES, tmp_path / 'a.png', epsilon=6)
    (axes,) = drawn().axes
    first, second, vertical = axes.lines
    np.testing.assert_allclose(first.get_xydata(), [(0, 90), (4, 75), (8, 50)])
    np.testing.assert_allclose(second.get_xydata(), [(0, 100), (16, 0)])
    np.testing.assert_array_equal(vertical.get_xdata(), [6, 6])
    assert [text.get_text() for text in axes.texts] == ['ε = 6/255']
    assert axes.get_ylim() == (0, 100) and axes.get_xlim() == (0, 16)
    assert [text.get_text() for text in drawn().legends[0].get_texts()] == ['a', 'b']


def test_a_long_legend_takes_nothing_from_the_curves(tmp_path, drawn):
    heights = []
    for count in (1, 20):
        robustness.epsilon_curve({f'a method, number {i}': [(8, 0.5)] for i in range(count)}, tmp_path / 'a.png')
        heights.append(drawn().axes[0].get_window_extent().height)
    assert heights[1] == pytest.approx(heights[0], rel=0.1)


def test_no_two_of_many_lines_look_alike_in_grey(tmp_path, drawn):
    robustness.epsilon_curve({str(i): [(0, 0.5), (8, 0.1)] for i in range(12)}, tmp_path / 'a.png')
    lines = drawn().axes[0].lines
    shades = [matplotlib.colors.to_rgb(line.get_color()) for line in lines]
    looks = [(line.get_marker(), line._unscaled_dash_pattern, shade) for line, shade in zip(lines, shades)]
    assert len(lines) == 12 and len(set(map(str, looks))) == 12
    assert len({str(look[:2]) for look in looks[:5]}) == 5


@pytest.mark.parametrize('examples', [1, 7, 200])
def test_wilson_interval_is_scipys(examples):
    for right in range(examples + 1):
        expected = scipy.stats.binomtest(right, examples).proportion_ci(method='wilson')
        found = robustness.wilson_interval(np.float64(right / examples), np.int64(examples))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
        assert 0 <= found[0] <= found[1] <= 1


def test_attack_bars_are_of_the_given_lengths(tmp_path, drawn):
    robustness.attack_bars(ROWS, tmp_path / 'a.png')
    (axes,) = drawn().axes
    assert [bar.get_width() for bar in axes.patches] == [81.25, 50, 0]
    assert [text.get_text() for text in axes.texts] == ['81.2', '50.0', '0.0']
    assert [text.get_text() for text in axes.get_yticklabels()] == ['clean', 'PGD-20', 'AutoAttack']
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is at the top
    assert axes.get_xlabel() == 'accuracy (%) on 16 examples'
    segments = axes.collections[0].get_segments()
    for row, (segment, right) in enumerate(zip(segments, (13, 8, 0), strict=True)):
        low, high = scipy.stats.binomtest(right, 16).proportion_ci(method='wilson')
        np.testing.assert_allclose(segment, [(100 * low, row), (100 * high, row)], atol=1e-9)
        assert axes.texts[row].get_position()[0] > 100 * high


def test_attack_bars_of_unlike_numbers_of_examples_name_them(tmp_path, drawn):
    robustness.attack_bars([('clean', 0.5, 1000), ('Square', 0.5, 200)], tmp_path / 'a.png')
    (axes,) = drawn().axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ['clean (n = 1,000)', 'Square (n = 200)']
    assert axes.get_xlabel() == 'accuracy (%)'


@pytest.mark.parametrize('severities', [(1, 2, 3, 4, 5), (5, 1)])
def test_corruption_table_writes_every_accuracy_and_the_means(tmp_path, drawn, severities):
    given = table(severities=severities)
    plots.corruption_table(given, tmp_path / 'a.png')
    (axes,) = drawn().axes
    means = mean_corruption_accuracy(given)
    expected = [
        [100 * row[s] for s in sorted(severities)] + [100 * means['corruptions'][n]] for n, row in given.items()
    ]
    cells = axes.images[0].get_array()
    np.testing.assert_allclose(cells[:-1], expected)
    np.testing.assert_allclose(cells[-1, -1], 100 * means['mean'])
    np.testing.assert_allclose(cells[-1, :-1], np.mean(expected, axis=0)[:-1])
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(column, row): f'{value:.1f}' for (row, column), value in np.ndenumerate(cells)}
    assert [text.get_text() for text in axes.get_xticklabels()] == [*map(str, sorted(severities)), 'mean']
    assert [text.get_text() for text in axes.get_yticklabels()][-2:] == ['jpeg compression', 'mean']
    assert axes.images[0].get_clim()[0] == 0  # the shades are the same for every net


@pytest.mark.parametrize('shape', [(8, 8, 1), (8, 12, 3), (120, 130, 3)])
def test_corruption_pictures_are_in_their_places(tmp_path, drawn, shape, check_picture):
    clean = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    given = corrupted(clean, ('contrast', 'gaussian_noise'))
    path = tmp_path / 'a.png'
    picture = check_picture(path, plots.corruption_pictures(clean, given, path))
    (axes,) = drawn().axes
    mosaic, (height, width) = axes.images[0].get_array(), shape[:2]
    for place, name in zip(axes.get_yticks(), given, strict=True):
        for centre, expected in zip(axes.get_xticks(), [clean, *given[name]], strict=True):
            top, left = round(place - (height - 1) / 2), round(centre - (width - 1) / 2)
            found = mosaic[top : top + height, left : left + width]
            np.testing.assert_array_equal(found, np.broadcast_to(expected, (height, width, 3)))
    assert [text.get_text() for text in axes.get_yticklabels()] == ['contrast', 'gaussian noise']
    assert [text.get_text() for text in axes.get_xticklabels()] == ['clean', 'severity 1', '2', '3', '4', '5']
    # On paper pixels are square, and those of a small picture a whole number of dots.
    dots = axes.get_window_extent().size / drawn().dpi * 200 / mosaic.shape[1::-1]
    assert dots[0] == pytest.approx(dots[1], rel=1e-6)
    if max(shape) <= 12:
        assert dots[0] == pytest.approx(round(dots[0]), rel=1e-6)
        found = {tuple(pixel) for pixel in (255 * picture[..., :3]).round().astype(int).reshape(-1, 3)}
        assert {tuple(pixel) for pixel in np.broadcast_to(clean, (height, width, 3)).reshape(-1, 3)} <= found


def test_query_curve_is_the_share_fooled_within_so_many_queries(tmp_path, drawn):
    robustness.query_curve(searches(), tmp_path / 'a.png')
    (axes,) = drawn().axes
    square, simba = axes.lines
    np.testing.assert_allclose(square.get_xydata(), [(1, 25), (7, 75), (100, 100)])
    np.testing.assert_allclose(simba.get_xydata(), [(1, 0), (3, 25), (40, 50), (200, 75), (500, 75)])
    queries, success = searches()['SimBA']
    rate = simba_summary(SimbaResult(None, queries, success, np.zeros(5)))['success_rate']
    assert simba.get_ydata()[-1] == pytest.approx(100 * rate)
    assert square.get_drawstyle() == simba.get_drawstyle() == 'steps-post'
    assert axes.get_xscale() == 'log' and axes.get_xlim() == (1, 500) and axes.get_ylim() == (0, 100)


@pytest.mark.parametrize(
    ('draw', 'given', 'message'),
    [
        ('epsilon_curve', {}, 'curves={}: expected at least one'),
        ('epsilon_curve', {'a': []}, r"curves\['a'\]=\[\]"),
        ('epsilon_curve', {'a': [(1, 0.5), (2,)]}, r"curves\['a'\].*expected points"),
        ('epsilon_curve', {'a': [(0, 0.5), (8, 41.0)]}, r"curves\['a'\]=41: expected an accuracy in \[0, 1\]"),
        ('epsilon_curve', {'a': [(0, 0.5), (8, float('nan'))]}, r"curves\['a'\]=nan"),
        ('epsilon_curve', {'a': [(0, 0.5), (8 / 255, 0.4)]}, 'in 1/255'),
        ('epsilon_curve', {'a': [(-1, 0.5)]}, r"curves\['a'\] epsilon=\[-1.0\]"),
        ('epsilon_curve', {'a': [(8, 0.5), (8, 0.4)]}, 'expected each once'),
        ('attack_bars', [], r'rows=\[\]'),
        ('attack_bars', [('clean', 81.2, 100)], 'accuracy=81.2: expected an accuracy'),
        ('attack_bars', [('clean', 0.8, 0)], 'examples=0: expected an integer'),
        ('attack_bars', [('clean', 0.8, 10.5)], 'examples=10.5'),
        ('corruption_table', {}, 'table={}'),
        ('corruption_table', {'fog': {}}, r"table\['fog'\] has severities=\[\]"),
        ('corruption_table', {'fog': {1: 0.5, 2: 0.4}, 'snow': {1: 0.5}}, r"table\['snow'\] has severities=\[1\]"),
        ('corruption_table', {'fog': {1: 50}}, r"table\['fog'\]=50: expected an accuracy"),
        ('query_curve', {}, 'results={}'),
        ('query_curve', {'a': (np.array([1, 2]), np.array([True]))}, r"results\['a'\]=int64 \(2,\), bool \(1,\)"),
        ('query_curve', {'a': (np.array([1.5]), np.array([True]))}, r"results\['a'\]=float64"),
        ('query_curve', {'a': (np.array([1]), np.array([1]))}, r"results\['a'\]=int64 \(1,\), int64"),
        ('query_curve', {'a': (np.array([0, 0]), np.array([True, True]))}, 'queries=0 to 0'),
        ('query_curve', {'a': (np.array([-1, 5]), np.array([True, True]))}, 'queries=-1 to 5'),
    ],
)
def test_what_is_wrong_is_named(tmp_path, draw, given, message):
    with pytest.raises(ValueError, match=message) as error:
        getattr(plots, draw)(given, tmp_path / 'a.png')
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_the_marked_epsilon_is_in_255ths(tmp_path):
    with pytest.raises(ValueError, match=r'epsilon=\[0.03.*in 1/255'):
        robustness.epsilon_curve(CURVES, tmp_path / 'a.png', epsilon=8 / 255)


@pytest.mark.parametrize(
    ('clean', 'pictures', 'message'),
    [
        (CLEAN, {}, 'images={}'),
        (CLEAN, {'fog': [CLEAN] * 4}, r"images\['fog'\]=4 of uint8 \(8, 8, 3\): expected 5"),
        (CLEAN, {'fog': [CLEAN] * 4 + [CLEAN[:4]]}, r"images\['fog'\]=5 of uint8 \(4, 8, 3\) and uint8 \(8, 8, 3\)"),
        (CLEAN, {'fog': [CLEAN / 255] * 5}, r"images\['fog'\]=5 of float64"),
        (CLEAN / 255, {'fog': [CLEAN] * 5}, r'clean=float64 \(8, 8, 3\): expected uint8'),
        (CLEAN[..., :2], {'fog': [CLEAN[..., :2]] * 5}, r'clean=uint8 \(8, 8, 2\)'),
    ],
)
def test_pictures_that_are_none(tmp_path, clean, pictures, message):
    with pytest.raises(ValueError, match=message):
        plots.corruption_pictures(clean, pictures, tmp_path / 'a.png')
    assert not list(tmp_path.iterdir())
