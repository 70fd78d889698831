"""Pictures of a GAN: files of the right size that show every pixel as it is, and curves."""

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from convnorm_jax import plots
from convnorm_jax.plots import generative
from convnorm_jax.plots import images as pictures

random = np.random.default_rng(0)


def read(path):
    """The file's uint8 RGB."""
    return np.round(255 * matplotlib.image.imread(path)[..., :3]).astype(np.uint8)


def find(picture, block):
    """(row, column) of every place where `block` is found in `picture`, both uint8 [H, W, 3]."""
    height, width = block.shape[:2]
    # Three corners first, one value each: quick.
    down, right = len(picture) - height + 1, picture.shape[1] - width + 1
    corners = ((0, 0), (height - 1, 0), (height - 1, width - 1))
    same = [(picture[r : r + down, c : c + right] == block[r, c]).all(-1) for r, c in corners]
    return [(r, c) for r, c in np.argwhere(same[0] & same[1] & same[2])
            if np.array_equal(picture[r : r + height, c : c + width], block)]  # fmt: skip


def enlarged(image, factor):
    """uint8 [H, W, 3] with each pixel as a square of this side, of a uint8 image of 1 or 3 channels."""
    return np.broadcast_to(image, (*image.shape[:2], 3)).repeat(factor, 0).repeat(factor, 1)


def draw(*shape):
    return random.integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    ('count', 'shape', 'columns', 'factor'), [(7, (8, 8, 1), 3, 16), (12, (32, 32, 3), 10, 4), (5, (12, 20, 3), 4, 6)]
)
@pytest.mark.parametrize('as_float', [False, True])
def test_sample_grid_shows_every_pixel(tmp_path, check_picture, count, shape, columns, factor, as_float):
    images, path = draw(count, *shape), tmp_path / 'grid.png'
    given = images / np.float32(255) if as_float else images
    check_picture(path, plots.sample_grid(given, path, columns=columns, title='samples'))
    picture = read(path)
    places = [find(picture, enlarged(image, factor)) for image in images]
    assert all(len(place) == 1 for place in places)
    (top, left), down, right = places[0][0], factor * shape[0] + 6, factor * shape[1] + 6
    for index, place in enumerate(places):
        row, column = divmod(index, columns)
        assert place[0] == (top + row * down, left + column * right)
    if count % columns:  # what is left of the last row is white
        assert (picture[top + (count // columns) * down :, left + (count % columns) * right :] == 255).all()


def test_the_size_of_a_grid(tmp_path):
    # Ten by two pictures of 32 pixels, each 4 times as large, gaps of 6 and margins of 16.
    plots.sample_grid(draw(20, 32, 32, 3), tmp_path / 'bare.png')
    assert read(tmp_path / 'bare.png').shape == (2 * 128 + 6 + 32, 10 * 128 + 9 * 6 + 32, 3)
    plots.sample_grid(draw(20, 32, 32, 3), tmp_path / 'titled.png', title='samples')
    titled = read(tmp_path / 'titled.png')
    assert titled.shape[1] == 1366 and 294 + 25 < titled.shape[0] < 294 + 60
    plots.sample_grid(draw(2, 300, 200, 3), tmp_path / 'large.png')  # large ones stay as they are
    assert read(tmp_path / 'large.png').shape == (332, 438, 3)


def test_labels_and_long_titles_have_their_room(tmp_path, check_picture):
    images, path = np.full((3, 8, 8, 1), 128, np.uint8), tmp_path / 'grid.png'
    names = ['cat', 'a_name_longer_than_its_picture', 3]
    check_picture(path, plots.sample_grid(images, path, labels=names, title='a title longer than the three pictures'))
    dark = (read(path) < 250).any(-1)
    rows, columns = np.nonzero(dark)
    height, width = dark.shape
    assert rows.min() >= 8 and columns.min() >= 8 and rows.max() < height - 8 and columns.max() < width - 8
    bottom = np.nonzero((read(path) == 128).all(-1).sum(1) > 100)[0].max()
    below = dark[bottom + 1 :].any(0)
    (left, *_, right) = np.nonzero((read(path) == 128).all(-1).sum(0) > 100)[0]
    assert below[left : left + 128].any() and below[right - 128 : right].any()
    gaps = [slice(left + 129, left + 133), slice(left + 263, left + 267)]
    assert not any(below[gap].any() for gap in gaps)  # each name under its own picture


def test_a_pixel_that_is_no_number_is_vermillion(tmp_path):
    images = np.full((2, 8, 8, 1), 0.5)
    images[1, 2, 3] = np.nan
    plots.sample_grid(images, tmp_path / 'grid.png')
    picture = read(tmp_path / 'grid.png')
    colour = tuple(int(plots.VERMILLION[i : i + 2], 16) for i in (1, 3, 5))
    assert (picture == colour).all(-1).sum() == 16 * 16
    assert len(find(picture, np.full((16, 16, 3), colour, np.uint8))) == 1


@pytest.mark.slow
def test_sample_progress(tmp_path, check_picture):
    progress, path = [(step, draw(11, 8, 8, 3)) for step in range(0, 10_000, 1000)], tmp_path / 'progress.png'
    check_picture(path, plots.sample_progress(progress[::-1], path, 'a run'))
    picture = read(path)
    tops, lefts = [], set()
    for _, images in progress:
        places = [find(picture, enlarged(image, 16)) for image in images]
        assert places[10:] == [[]]  # ten columns
        if places[0]:
            tops.append(places[0][0][0])
            assert all(place[0][0] == tops[-1] for place in places[:10])
            lefts.add(places[0][0][1])
    assert len(tops) == plots.MAX_STEPS and tops == sorted(tops) and len(lefts) == 1
    assert all(find(picture, enlarged(progress[index][1][0], 16)) for index in (0, -1))
    margin = picture[:, : lefts.pop() - 4]
    assert all((margin[top : top + 128] < 200).any() for top in tops)  # a step is written beside each row


def test_one_row_of_one_picture(tmp_path):
    image = draw(1, 8, 8, 1)
    paths = [
        plots.sample_progress([(3, image)], tmp_path / 'a.png'),
        plots.sample_grid(image, tmp_path / 'b.png'),
        plots.interpolation_grid(image[None], tmp_path / 'c.png'),
        plots.real_and_fake(image, image, tmp_path / 'd.png'),
    ]
    assert [len(find(read(path), enlarged(image[0], factor))) for path, factor in zip(paths, (16, 16, 16, 12))] == [
        1, 1, 1, 2,
    ]  # fmt: skip


def test_interpolation_grid(tmp_path, check_picture):
    rows, path = draw(3, 5, 16, 16, 1), tmp_path / 'interpolation.png'
    check_picture(path, plots.interpolation_grid(rows, path, 'from one to the other'))
    picture = read(path)
    places = [find(picture, np.concatenate([enlarged(image, 8) for image in row], 1)) for row in rows]
    assert all(len(place) == 1 for place in places)  # a row has no gaps inside
    assert np.diff([place[0][0] for place in places]).tolist() == [142, 142]


def test_real_and_fake(tmp_path, check_picture):
    real, fake, path = draw(100, 32, 32, 3), draw(70, 32, 32, 1), tmp_path / 'both.png'
    check_picture(path, plots.real_and_fake(real, fake, path, 'CIFAR-10'))
    picture = read(path)
    middle = picture.shape[1] / 2
    assert find(picture, enlarged(real[63], 3))[0][1] < middle < find(picture, enlarged(fake[0], 3))[0][1]
    assert find(picture, enlarged(fake[63], 3)) and not find(picture, enlarged(real[64], 3))


def test_bfloat16_and_jax_arrays(tmp_path):
    jnp = pytest.importorskip('jax.numpy')
    plots.sample_grid(jnp.full((1, 8, 8, 1), 0.5, jnp.bfloat16), tmp_path / 'a.png')
    assert len(find(read(tmp_path / 'a.png'), np.full((128, 128, 3), 128, np.uint8))) == 1


GOOD = np.zeros((2, 8, 8, 1))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda p: plots.sample_grid(GOOD[0], p), r'images.shape=\(8, 8, 1\): expected \[N, H, W, C\]'),
        (lambda p: plots.sample_grid(np.zeros((2, 8, 8, 2)), p), r'images.shape=\(2, 8, 8, 2\)'),
        (lambda p: plots.sample_grid(GOOD[:0], p), r'images.shape=\(0, 8, 8, 1\)'),
        (lambda p: plots.sample_grid(GOOD.astype(int), p), 'images.dtype=int64'),
        (lambda p: plots.sample_grid(GOOD - 1, p), r'images=-1 ... -1: expected floats in \[0, 1\]'),
        (lambda p: plots.sample_grid(GOOD, p, columns=0), 'columns=0'),
        (lambda p: plots.sample_grid(GOOD, p, labels=[1]), r'len\(labels\)=1: expected 2'),
        (lambda p: plots.sample_progress([], p), r'progress=\[\]'),
        (lambda p: plots.sample_progress([(0, GOOD), (5, GOOD[:1])], p), r'images at step 5: shape \(1, 8, 8, 3\)'),
        (lambda p: plots.interpolation_grid(GOOD, p), r'rows.shape=\(2, 8, 8, 1\): expected \[R, N, H, W, C\]'),
        (lambda p: plots.real_and_fake(GOOD, np.zeros((2, 4, 4, 1)), p), r'fake.shape=\(2, 4, 4, 1\)'),
        (lambda p: plots.gan_curves([{'generator_loss': 1}], p), r'len\(rows\)=1'),
    ],
)
def test_what_is_wrong_is_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / 'a.png')
    assert not list(tmp_path.iterdir())


def curve_rows(count, every=10):
    rows = []
    for index in range(count):
        losses = {name: 1 + 0.1 * random.normal() for name in ('discriminator_loss', 'generator_loss')}
        row = {'step': str(100 * index), **losses, 'real_logit': 0.5, 'fake_logit': -0.5, 'fid_classifier': ''}
        if index % every == every - 1:
            row |= {'fid_classifier': 100 / (index + 1), 'classifier_score': index / 10}
        rows.append(row)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 20, 300])
@pytest.mark.parametrize('scores', [(), ['fid_classifier'], {'fid_classifier': 'FID', 'classifier_score': 'score'}])
def test_gan_curves(tmp_path, check_picture, count, scores):
    path = tmp_path / 'curves.png'
    picture = check_picture(path, plots.gan_curves(curve_rows(count), path, 'a run', scores))
    panels = 2 + (len(scores) if count > 1 else 0)  # no panel for a score without a number
    assert picture.shape[:2] == {2: (580, 1440), 3: (580, 1920), 4: (1100, 1440)}[panels]


def test_running_median():
    values = np.array([0.0, 1, 2, 100, 4, 5, 6])
    np.testing.assert_array_equal(generative._running_median(values, 1), [0.5, 1, 2, 4, 5, 5, 5.5])
    np.testing.assert_array_equal(generative._running_median(values, 0), values)


def test_names_of_scores():
    assert generative._words('fid_classifier') == 'FID (classifier)'
    assert generative._words('fid') == 'FID'
    assert generative._words('classifier_score') == 'classifier score'


def test_enlargement_is_whole():
    assert [pictures.enlargement((n, n), 128) for n in (8, 28, 32, 64, 100, 128, 256, 4000)] == [
        16,
        5,
        4,
        2,
        1,
        1,
        1,
        1,
    ]


def test_the_users_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.gan_curves(curve_rows(3), tmp_path / 'a.png')
    plots.sample_grid(GOOD, tmp_path / 'b.png', title='zeros')
    assert dict(matplotlib.rcParams) == before
