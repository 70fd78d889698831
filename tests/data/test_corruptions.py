"""The common corruptions against SciPy, Pillow, NumPy in float64 and closed forms."""

import colorsys
import io
import re

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.special

from convnorm_jax.data import corruptions
from convnorm_jax.data.corruptions import CORRUPTIONS, SEVERITIES, blur, corrupt, crystals, digital, pixels, weather

SHAPES = [(8, 8, 1), (8, 8, 3), (9, 13, 1), (32, 32, 3), (40, 70, 3)]


def make_images(shape, count=6, smoothness=1.5):
    """Smooth coloured noise over the full range of levels: something for a blur to take away."""
    rng = np.random.default_rng(sum(shape))
    noise = rng.standard_normal((count, *shape))
    noise = scipy.ndimage.gaussian_filter(noise, (0, smoothness, smoothness, 0))
    return np.clip(128 + 70 * noise / noise.std(), 0, 255).astype(np.uint8)


IMAGES = make_images((32, 32, 3), 12)


def difference(name, severity, images=IMAGES):
    return np.mean((corrupt(images, name, severity, 0).astype(float) - images) ** 2)


def levels(got, expected, most=1):
    """Both truncated to whole levels from floats that differ by rounding: seldom a level apart."""
    apart = np.abs(got.astype(int) - expected.astype(int))
    assert apart.max() <= most
    assert np.mean(apart > 0) < 0.02


def flat(level, count=16, channels=3):
    return np.full((count, 32, 32, channels), level, np.uint8)


def test_the_fifteen():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 15
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('name', CORRUPTIONS)
def test_any_picture(name, shape):
    images = make_images(shape, 4)
    before = images.copy()
    for severity in (1, 5):
        out = corrupt(images, name, severity, 3)
        assert out.shape == images.shape and out.dtype == np.uint8
        # On 8x8 pictures a zoom of 1.05 is less than a pixel.
        assert np.any(out != images) or (name, severity, shape[0]) == ('zoom_blur', 1, 8)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize('shape', [(8, 8, 1), (32, 32, 3)], ids=str)
@pytest.mark.parametrize('name', CORRUPTIONS)
def test_a_picture_depends_on_its_index_not_on_its_batch(name, shape, monkeypatch):
    images = make_images(shape, 7)
    for severity in (2, 5):
        whole = corrupt(images, name, severity, 11)
        np.testing.assert_array_equal(corrupt(images, name, severity, 11), whole)
        some = np.array([5, 0, 3])
        np.testing.assert_array_equal(corrupt(images[some], name, severity, 11, some), whole[some])
        np.testing.assert_array_equal(corrupt(images[6:], name, severity, 11, [6]), whole[6:])
        with monkeypatch.context() as patch:
            patch.setattr(corruptions, '_CHUNK_VALUES', 2 * images[0].size)
            np.testing.assert_array_equal(corrupt(images, name, severity, 11), whole)


RANDOM = [name for name in CORRUPTIONS if name not in ('defocus_blur', 'zoom_blur', 'brightness', 'contrast')]
RANDOM = [name for name in RANDOM if name not in ('pixelate', 'jpeg_compression')]


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_only_random_ones_are_random(name):
    images = np.repeat(IMAGES[:1], 6, 0)
    first, other = (corrupt(images, name, 3, seed) for seed in (0, 1))
    assert np.array_equal(first, other) == (name not in RANDOM)
    # Motion blur on whole pixels: two angles may do the same.
    assert (len({x.tobytes() for x in (*first, *other)}) >= 6) == (name in RANDOM)


def test_random_numbers_differ_between_names_and_severities():
    # A grey noise field at two severities: the same normal numbers would correlate perfectly.
    fields = [
        (corrupt(flat(128, 4), name, severity, 0).astype(float) - 128).ravel()
        for name in ('gaussian_noise', 'shot_noise')
        for severity in (1, 2)
    ]
    assert np.abs(np.corrcoef(fields) - np.eye(4)).max() < 0.06


# Where the authors' own constants do not rise, see the package's docstring.
RISING = [name for name in CORRUPTIONS if name not in ('glass_blur', 'motion_blur', 'frost', 'elastic_transform')]


@pytest.mark.parametrize('size', [32, 64])
@pytest.mark.parametrize('name', RISING)
def test_strength_rises(name, size):
    images = (
        IMAGES if size == 32 else np.stack([cv2.resize(x, (64, 64), interpolation=cv2.INTER_CUBIC) for x in IMAGES])
    )
    strength = [difference(name, severity, images) for severity in SEVERITIES]
    assert strength[0] > 0.2
    # Defocus on 64x64: whole pixels make a disk of radius 2 as strong as the Gaussian before it.
    assert np.all(np.diff(strength) > (-0.01 * strength[2] if (name, size) == ('defocus_blur', 64) else 0)), strength


def test_strength_where_it_does_not_rise_everywhere():
    glass, motion, frost, elastic = (
        [difference(name, severity) for severity in SEVERITIES]
        for name in ('glass_blur', 'motion_blur', 'frost', 'elastic_transform')
    )
    assert min(glass[3:]) > 1.3 * max(glass[:3])
    assert motion[0] < motion[1] < min(motion[2:4]) and motion[4] > 1.1 * max(motion[2:4])
    assert motion[2] == pytest.approx(motion[3], rel=0.15)  # the same sigma
    assert frost[0] < frost[1] < frost[2] and min(frost) > 100
    assert min(elastic[:2]) > 1.2 * elastic[2] > 1.8 * elastic[4]


@pytest.mark.parametrize(('severity', 'sigma'), [(1, 0.04), (2, 0.06), (3, 0.08), (4, 0.09), (5, 0.10)])
def test_gaussian_noise(severity, sigma):
    noise = corrupt(flat(128, 32), 'gaussian_noise', severity, 0).astype(float) + 0.5 - 128  # undo the truncation
    count = noise.size
    assert abs(noise.mean()) < 5 * 255 * sigma / np.sqrt(count)
    # The variance of truncation to whole levels is 1/12; that of an estimate is 2 variance^2 / count.
    variance = (255 * sigma) ** 2 + 1 / 12
    assert abs(noise.var() - variance) < 5 * variance * np.sqrt(2 / count)
    for level in (-20, -5, 0, 12):
        expected = scipy.special.ndtr(level / (255 * sigma))
        assert np.mean(noise < level) == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(count))


@pytest.mark.parametrize(('severity', 'photons'), [(1, 500), (2, 250), (3, 100), (4, 75), (5, 50)])
@pytest.mark.parametrize('level', [30, 128])
def test_shot_noise(severity, photons, level):
    out = corrupt(flat(level, 32), 'shot_noise', severity, 0)
    mean = photons * level / 255
    # The counts can be read back: one photon is at most five levels, and more than half of one.
    allowed = np.floor(255 * np.arange(photons + 1) / photons + 1e-4).astype(int)
    assert set(np.unique(out)) <= set(allowed)
    values = out.astype(float) * photons / 255
    truncation = photons / 255  # of a level, in photons
    assert -truncation < values.mean() - mean < 5 * np.sqrt(mean / out.size)
    assert values.var() == pytest.approx(mean, rel=5 * np.sqrt(2 / out.size) + 0.02 + truncation**2 / mean)
    assert np.all(corrupt(flat(0, 2), 'shot_noise', severity, 0) == 0)


@pytest.mark.parametrize(('severity', 'share'), [(1, 0.01), (2, 0.02), (3, 0.03), (4, 0.05), (5, 0.07)])
def test_impulse_noise(severity, share):
    images = flat(100, 64)
    out = corrupt(images, 'impulse_noise', severity, 0)
    assert set(np.unique(out)) == {0, 100, 255}
    error = 5 * np.sqrt(share / 2 / out.size)
    assert np.mean(out == 0) == pytest.approx(share / 2, abs=error)
    assert np.mean(out == 255) == pytest.approx(share / 2, abs=error)
    # Channels are hit on their own.
    assert np.mean(np.all(out != 100, -1)) < 0.002


@pytest.mark.parametrize('scale', [1, 1.3, 2, 7])
@pytest.mark.parametrize(('radius', 'smoothing'), [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)])
def test_disk_kernel(radius, smoothing, scale):
    kernel = blur.disk_kernel(radius, smoothing, scale)
    assert kernel.sum() == pytest.approx(1, abs=1e-6) and kernel.min() >= 0
    for same in (kernel[::-1], kernel[:, ::-1], kernel.T):
        np.testing.assert_allclose(kernel, same, atol=1e-7)
    if scale != 1:
        return
    # Pixels within the disk by hand, smoothed by SciPy with the window of 3x3.
    disk = np.zeros((9, 9))
    for y, x in {0.3: [(0, 0)], 0.4: [(0, 0)], 0.5: [(0, 0)], 1: [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]}.get(
        radius, [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    ):
        disk[4 + y, 4 + x] = 1
    expected = scipy.ndimage.gaussian_filter(disk / disk.sum(), smoothing, radius=1)
    half = len(kernel) // 2
    np.testing.assert_allclose(kernel, expected[4 - half : 5 + half, 4 - half : 5 + half], atol=1e-6)


@pytest.mark.parametrize(
    ('shape', 'severity'), [((32, 32, 3), 1), ((32, 32, 3), 2), ((32, 32, 3), 5), ((8, 9, 1), 4), ((64, 80, 3), 3)]
)
def test_defocus_blur(shape, severity):
    images = make_images(shape)
    radius, smoothing = {1: (0.3, 0.4), 2: (0.4, 0.5), 3: (0.5, 0.6), 4: (1, 0.2), 5: (1.5, 0.1)}[severity]
    kernel = blur.disk_kernel(radius, smoothing, max(1, min(shape[:2]) / 32)).astype(float)
    expected = scipy.ndimage.correlate(images / 255.0, kernel[None, :, :, None], mode='mirror')
    levels(corrupt(images, 'defocus_blur', severity, 0), np.floor(expected * 255 + 1e-4))


@pytest.mark.parametrize('angle', [-135, -90, -45, -20.5, 0, 30, 45, 90])
def test_motion_kernel(angle):
    kernel, (column, row) = blur.motion_kernel(8, 2.5, angle)
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    rows, columns = np.nonzero(kernel > 1e-9)
    weights = kernel[rows, columns]
    steps = np.stack([columns - column, rows - row])
    direction = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    along, across = direction @ steps, direction[::-1] * [-1, 1] @ steps
    # The ray, to half a pixel, from the pixel itself in one direction, and never a hole of two pixels.
    assert np.abs(across).max() <= np.sqrt(0.5) + 1e-9 and along.min() > -1e-9 and np.diff(np.sort(along)).max() < 1.5
    expected = np.exp(-0.5 * (np.arange(17) / 2.5) ** 2)
    mean = expected @ np.arange(17) / expected.sum()
    assert weights @ along == pytest.approx(mean, abs=0.25)
    assert kernel[row, column] >= 0.99 / expected.sum()


def test_motion_blur_of_a_delta():
    images = np.zeros((1, 32, 32, 1), np.uint8)
    images[0, 16, 16] = 255
    out = blur.smear(images, 6, 2.5, [30.0])[0, :, :, 0]
    # By ImageMagick 6.9.11's MagickMotionBlurImage(6, 2.5, 30).
    expected = np.zeros((32, 32), np.uint8)
    for y, x, level in [(13, 10, 1), (13, 11, 4), (14, 12, 9), (14, 13, 20), (15, 13, 34)]:
        expected[y, x] = level
    for y, x, level in [(15, 14, 51), (16, 15, 65), (16, 16, 70)]:
        expected[y, x] = level
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ('shape', 'radius', 'sigma'), [((32, 32, 3), 9, 2.5), ((8, 8, 1), 14, 12), ((64, 70, 3), 6, 1)]
)
def test_smear(shape, radius, sigma):
    images, angles = make_images(shape, 3), [-40.0, 3.0, -100.0]
    scale = max(1, min(shape[:2]) / 32)
    out = blur.smear(images, radius, sigma, angles)
    for i, angle in enumerate(angles):
        kernel, (column, row) = blur.motion_kernel(radius * scale, sigma * scale, angle)
        # SciPy's kernels have their centre in the middle.
        half = max(column, row, kernel.shape[0] - row - 1, kernel.shape[1] - column - 1)
        centred = np.zeros((2 * half + 1, 2 * half + 1))
        centred[half - row :, half - column :][: kernel.shape[0], : kernel.shape[1]] = kernel
        expected = scipy.ndimage.correlate(images[i].astype(float), centred[:, :, None], mode='nearest')
        assert np.abs(out[i] - expected).max() < 0.5 + 1e-3


@pytest.mark.parametrize('border', ['nearest', 'reflect', 'mirror'])
@pytest.mark.parametrize(('size', 'sigma', 'truncate'), [(8, 0.05, 4), (32, 0.4, 4), (32, 6.4, 3), (9, 2.0, 4)])
def test_gaussian_matrix(size, sigma, truncate, border):
    expected = scipy.ndimage.gaussian_filter1d(np.eye(size), sigma, 0, mode=border, truncate=truncate)
    np.testing.assert_allclose(pixels.gaussian_matrix(size, sigma, border, truncate), expected, atol=1e-7)
    np.testing.assert_array_equal(pixels.gaussian_matrix(size, 0, border, truncate), np.eye(size))


def test_apply_separable():
    values = np.random.default_rng(0).random((3, 8, 11, 3), np.float32)
    rows, columns = (pixels.gaussian_matrix(n, 1.2, 'reflect', 4) for n in (8, 11))
    expected = scipy.ndimage.gaussian_filter(values.astype(float), (0, 1.2, 1.2, 0), mode='reflect')
    np.testing.assert_allclose(pixels.apply_separable(values, rows, columns), expected, atol=1e-6)


@pytest.mark.parametrize('severity', SEVERITIES)
def test_glass_blur_takes_pixels_from_up_and_left(severity):
    # Pixels that name their place, blurred by nothing: where does each come from?
    images = np.empty((40, 15, 17, 1), np.uint8)
    images[:] = np.arange(255).reshape(15, 17, 1)
    passes = 1 if severity < 4 else 2
    noise = [np.random.default_rng(i) for i in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blur, '_gaussian', lambda values, sigma: values)
        out = blur.glass_blur(images, severity, noise)
    moved = np.stack(np.divmod(images.astype(int), 17)) - np.stack(np.divmod(out.astype(int), 17))
    inner = moved[:, :, 3:-1, 3:-1]  # nothing of the border's comes here in two passes
    assert moved.min() == 0 and moved.max() == passes
    for step in range(passes + 1):  # binomial: one fair coin a pass
        assert np.mean(inner == step) == pytest.approx({1: [0.5] * 2, 2: [0.25, 0.5, 0.25]}[passes][step], abs=0.015)
    edge = np.ones((15, 17), bool)
    edge[2:, 2:] = False
    assert np.all(moved[:, :, edge] == 0)


class Still:
    """A generator that moves nothing."""

    def integers(self, low, high, size, dtype):
        return np.zeros(size, dtype)


@pytest.mark.parametrize(('severity', 'sigma'), [(1, 0.05), (2, 0.25), (3, 0.4), (4, 0.25), (5, 0.4)])
def test_glass_blur_blurs_before_and_after(severity, sigma):
    expected = IMAGES[:2].astype(float)
    for _ in range(2):
        expected = scipy.ndimage.gaussian_filter(expected, (0, sigma, sigma, 0), mode='nearest')
        expected = np.floor(expected + 1e-4)
    levels(blur.glass_blur(IMAGES[:2], severity, [Still(), Still()]), expected)


@pytest.mark.parametrize(('severity', 'radius', 'sigma'), [(1, 6, 1), (2, 6, 1.5), (3, 6, 2), (4, 8, 2), (5, 9, 2.5)])
def test_motion_blur(severity, radius, sigma, monkeypatch):
    seen = []
    monkeypatch.setattr(blur, 'smear', lambda *arguments: seen.append(arguments) or IMAGES[:1])
    blur.motion_blur(IMAGES[:1], severity, [np.random.default_rng(i) for i in range(400)])
    (_, *lengths, angles) = seen[0]
    assert lengths == [radius, sigma]
    assert -45 <= min(angles) < -43 and 43 < max(angles) <= 45 and abs(np.mean(angles)) < 5 * 26 / 20


@pytest.mark.parametrize(
    ('shape', 'severity', 'count'),
    [((32, 32, 3), 1, 6), ((32, 32, 3), 2, 11), ((20, 45, 1), 3, 16), ((32, 32, 1), 4, 21), ((32, 32, 3), 5, 26)],
)
def test_zoom_blur(shape, severity, count):
    images = make_images(shape, 2)
    factors = np.arange(1, 1 + 0.05 * severity + 0.01, 0.01)
    assert len(factors) in (count, count + 1)
    expected = images / 255.0
    for factor in factors:
        crop = [int(np.ceil(n / factor)) for n in shape[:2]]
        top, left = ((n - c) // 2 for n, c in zip(shape, crop))
        middle = images[:, top : top + crop[0], left : left + crop[1]] / 255.0
        large = scipy.ndimage.zoom(middle, (1, factor, factor, 1), order=1)
        top, left = ((large.shape[1 + axis] - shape[axis]) // 2 for axis in (0, 1))
        expected = expected + large[:, top : top + shape[0], left : left + shape[1]]
    expected = expected / (len(factors) + 1)
    levels(corrupt(images, 'zoom_blur', severity, 0), np.floor(expected * 255 + 1e-4))


def test_plasma_fractal():
    rngs = [np.random.default_rng(i) for i in range(40)]
    smooth, rough = (weather.plasma_fractal(rngs, 32, decay) for decay in (3, 1.75))
    for clouds in (smooth, rough):
        assert clouds.shape == (40, 32, 32)
        assert np.all(clouds.min((1, 2)) == 0) and np.all(clouds.max((1, 2)) == 1)
    roughness = [np.mean(np.abs(np.diff(clouds, axis=2))) for clouds in (smooth, rough)]
    assert 1.3 * roughness[0] < roughness[1]
    # Periodic: the step over the seam is like any other.
    assert np.mean(np.abs(rough[:, :, 0] - rough[:, :, -1])) < 1.5 * roughness[1]


def test_plasma_fractal_by_hand():
    class Fixed:
        def uniform(self, low, high, size):
            return np.linspace(low, high, size)

    # The algorithm point by point, in the order of the authors' code.
    draws, heights, step, amplitude = iter(np.linspace(-1, 1, 63)), np.zeros((8, 8)), 8, 1e4
    while step > 1:
        half = step // 2
        kinds = [(half, half, [(-half, -half), (-half, half), (half, -half), (half, half)])]
        cross = [(-half, 0), (half, 0), (0, -half), (0, half)]
        for top, left, neighbours in [*kinds, (0, half, cross), (half, 0, cross)]:
            for y in range(top, 8, step):
                for x in range(left, 8, step):
                    mean = np.mean([heights[(y + dy) % 8, (x + dx) % 8] for dy, dx in neighbours])
                    heights[y, x] = mean + amplitude * next(draws)
        step, amplitude = half, amplitude / 2**2
    expected = (heights - heights.min()) / (heights.max() - heights.min())
    np.testing.assert_allclose(weather.plasma_fractal([Fixed()], 8, 2)[0], expected, atol=1e-12)


@pytest.mark.parametrize(
    ('severity', 'strength', 'decay'), [(1, 0.2, 3), (2, 0.5, 3), (3, 0.75, 2.5), (4, 1, 2), (5, 1.5, 1.75)]
)
def test_fog(severity, strength, decay):
    images = make_images((20, 30, 3), 3)
    clouds = weather.plasma_fractal([np.random.default_rng(i) for i in range(3)], 32, decay)[:, :20, :30, None]
    x = images / 255.0
    highest = x.max((1, 2, 3), keepdims=True)
    expected = (x + strength * clouds) * highest / (highest + strength)
    levels(weather.fog(images, severity, [np.random.default_rng(i) for i in range(3)]), np.floor(255 * expected + 1e-4))
    assert np.all(corrupt(flat(0, 2), 'fog', severity, 0) == 0)


class Recorded:
    """A generator that keeps what it drew and within which bounds; its first `still` draws are zeros."""

    def __init__(self, seed, still=0):
        self.rng, self.draws, self.bounds, self.still = np.random.default_rng(seed), [], [], still

    def _keep(self, draw):
        self.draws.append(draw * (len(self.draws) >= self.still))
        return self.draws[-1]

    def uniform(self, low, high, size=None):
        self.bounds.append((low, high))
        return self._keep(self.rng.uniform(low, high, size))

    def standard_normal(self, size, dtype):
        return self._keep(self.rng.standard_normal(size, dtype))


SNOW = [
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
]


@pytest.mark.parametrize('severity', SEVERITIES)
def test_snow(severity):
    mean, spread, zoom, threshold, radius, sigma, kept = SNOW[severity - 1]
    rngs = [Recorded(0), Recorded(1)]
    out = weather.snow(IMAGES[:2], severity, rngs)
    for image, got, rng in zip(IMAGES / 255.0, out, rngs):
        assert rng.bounds == [(-135, -45)]
        crop = int(np.ceil(32 / zoom))
        part = slice((32 - crop) // 2, (32 - crop) // 2 + crop)
        flakes = scipy.ndimage.zoom(mean + spread * rng.draws[0][part, part, 0].astype(float), zoom, order=1)
        trim = (len(flakes) - 32) // 2
        flakes = np.where(flakes < threshold, 0, np.minimum(flakes, 1))[trim : trim + 32, trim : trim + 32]
        flakes = np.floor(255 * flakes + 1e-4).astype(np.uint8)[None, :, :, None]
        layer = blur.smear(flakes, radius, sigma, [rng.draws[1]])[0] / 255.0
        whitened = np.maximum(image, image @ np.array([[0.299], [0.587], [0.114]]) * 1.5 + 0.5)
        expected = kept * image + (1 - kept) * whitened + layer + np.rot90(layer, 2)
        levels(got, np.floor(255 * np.minimum(expected, 1) + 1e-4))


# Mean colours of the photographs frost1.png to frost5.jpg at the authors' scale.
PHOTOGRAPHS = [(78, 149, 166), (201, 205, 214), (201, 205, 214), (138, 153, 166), (112, 123, 135)]


@pytest.mark.parametrize('size', [8, 32, 50])
def test_frost(size):
    plates = crystals.plates(size, size)
    assert plates.shape[0] == 5 and plates.shape[1] == plates.shape[2] >= 2 * size
    np.testing.assert_allclose(plates.mean((1, 2)), PHOTOGRAPHS, atol=5)
    assert np.all(plates.std((1, 2)) > 15) and np.all(plates.std((1, 2)) < 45)
    assert not np.array_equal(plates[1], plates[2])
    images = np.full((12, size, size, 3), 60, np.uint8)
    layers = (corrupt(images, 'frost', 4, 0) - 0.85 * 60) / 0.4  # read back to 2.5 levels
    assert len({crop_of(plates.astype(int), layer) for layer in layers}) >= 3
    grey = (corrupt(images[..., :1], 'frost', 4, 0) - 0.85 * 60) / 0.4
    np.testing.assert_allclose(grey[..., 0], layers @ [0.299, 0.587, 0.114], atol=5.1)


@pytest.mark.parametrize(
    ('severity', 'a', 'b'), [(1, 1, 0.2), (2, 1, 0.3), (3, 0.9, 0.4), (4, 0.85, 0.4), (5, 0.75, 0.45)]
)
def test_frost_blends(severity, a, b, monkeypatch):
    monkeypatch.setattr(crystals, 'plates', lambda height, width: np.full((5, 90, 90, 3), 201, np.uint8))
    expected = np.minimum(np.floor(a * IMAGES.astype(float) + b * 201 + 1e-4), 255)
    levels(corrupt(IMAGES, 'frost', severity, 0), expected)


def crop_of(plates, layer):
    """The number of the plate that a layer is a crop of."""
    size = len(layer)
    places = plates.shape[1] - size
    near = np.abs(plates[:, :places, :places] - layer[0, 0]).max(-1) <= 3
    for number, top, left in zip(*np.nonzero(near)):
        if np.abs(plates[number, top : top + size, left : left + size] - layer).max() <= 3:
            return number
    raise AssertionError('a crop of no plate')


@pytest.mark.parametrize(('severity', 'added'), [(1, 0.05), (2, 0.1), (3, 0.15), (4, 0.2), (5, 0.3)])
def test_brightness(severity, added):
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    images[0, 0, 0] = 0
    expected = np.empty(images.shape)
    for place in np.ndindex(images.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(images[place] / 255.0))
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
    out = corrupt(images, 'brightness', severity, 0)
    assert np.all((out <= expected * 255 + 0.01) & (out > expected * 255 - 1.01))
    grey = corrupt(images[..., :1], 'brightness', severity, 0)
    np.testing.assert_array_equal(grey, np.minimum(np.floor(images[..., :1] + 255 * added + 1e-4), 255))


@pytest.mark.parametrize(('severity', 'kept'), [(1, 0.75), (2, 0.5), (3, 0.4), (4, 0.3), (5, 0.15)])
def test_contrast(severity, kept):
    x = IMAGES.astype(np.float64)
    mean = x.mean((1, 2), keepdims=True)
    levels(corrupt(IMAGES, 'contrast', severity, 0), np.floor(mean + kept * (x - mean) + 1e-4))


@pytest.mark.parametrize('border', ['mirror', 'reflect', 'nearest'])
def test_interpolate(border):
    rng = np.random.default_rng(0)
    values = rng.random((3, 9, 12, 2), np.float32)
    rows, columns = rng.uniform(-14, 25, (2, 3, 5, 7))
    got = pixels.interpolate(values, rows, columns, border)
    for i in range(3):
        for c in range(2):
            expected = scipy.ndimage.map_coordinates(
                values[i, :, :, c].astype(float), [rows[i], columns[i]], order=1, mode=border
            )
            np.testing.assert_allclose(got[i, :, :, c], expected, atol=1e-5)


@pytest.mark.parametrize('shape', [(32, 32), (8, 8), (20, 45)])
def test_affine_places(shape):
    moves = np.random.default_rng(0).uniform(-0.08, 0.08, (4, 3, 2)) * min(shape)
    rows, columns = digital._affine_places(moves, *shape)
    centre, arm = np.array([shape[1] // 2, shape[0] // 2]), min(shape) // 3
    corners = (centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])).astype(np.float32)
    grid = np.stack([*np.meshgrid(np.arange(shape[1]), np.arange(shape[0])), np.ones(shape)])
    for i in range(4):
        back = cv2.invertAffineTransform(cv2.getAffineTransform(corners, (corners + moves[i]).astype(np.float32)))
        x, y = np.tensordot(back, grid, 1)
        np.testing.assert_allclose(columns[i], x, atol=1e-3)
        np.testing.assert_allclose(rows[i], y, atol=1e-3)


def test_elastic_transform_without_displacement():
    rng = Recorded(3)
    got = digital.elastic_transform(IMAGES[:1, :20], 1, [rng])[0]
    (rows,), (columns,) = digital._affine_places(rng.draws[0][None], 20, 32)
    assert np.mean((rows < -0.2) | (rows > 19.2)) > 0.02  # the border is seen
    for channel in range(3):
        x = IMAGES[0, :20, :, channel] / 255.0
        expected = scipy.ndimage.map_coordinates(x, [rows, columns], order=1, mode='mirror')
        levels(got[..., channel], np.floor(expected * 255 + 1e-4))


ELASTIC = [(1, 0, 0, 0.08), (2, 0.05, 0.2, 0.07), (3, 0.08, 0.06, 0.06), (4, 0.1, 0.04, 0.05), (5, 0.1, 0.03, 0.03)]


@pytest.mark.parametrize(('severity', 'a', 's', 'c'), ELASTIC)
def test_elastic_transform(severity, a, s, c):
    rngs = [Recorded(0, still=1), Recorded(1, still=1)]  # no affine move: only the displacement is left
    out = digital.elastic_transform(IMAGES[:2], severity, rngs)
    rows, columns = np.mgrid[:32, :32].astype(float)
    assert rngs[0].bounds == [pytest.approx((-32 * c, 32 * c)), (-1, 1)]
    for image, got, rng in zip(IMAGES, out, rngs):
        dx, dy = (
            32 * a * scipy.ndimage.gaussian_filter(rng.draws[1][..., k], 32 * s, mode='reflect', truncate=3)
            for k in (0, 1)
        )
        for channel in range(3):
            places = [rows + dy, columns + dx]
            expected = scipy.ndimage.map_coordinates(image[..., channel] / 255.0, places, order=1, mode='reflect')
            levels(got[..., channel], np.floor(expected * 255 + 1e-4))


@pytest.mark.parametrize(('severity', 'share'), [(1, 0.95), (2, 0.9), (3, 0.85), (4, 0.75), (5, 0.65)])
@pytest.mark.parametrize('shape', [(32, 32, 3), (8, 8, 1), (45, 37, 3), (61, 50, 1)], ids=str)
def test_pixelate_is_pillows(shape, severity, share):
    image_module = pytest.importorskip('PIL.Image')
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    out = corrupt(images, 'pixelate', severity, 0)
    for image, got in zip(images, out):
        picture = image_module.fromarray(image.squeeze())
        small = picture.resize((int(shape[1] * share), int(shape[0] * share)), image_module.BOX)
        expected = np.asarray(small.resize((shape[1], shape[0]), image_module.BOX)).reshape(shape)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(('severity', 'quality'), [(1, 80), (2, 65), (3, 58), (4, 50), (5, 40)])
@pytest.mark.parametrize('shape', [(32, 32, 3), (9, 13, 1), (8, 8, 3)], ids=str)
def test_jpeg_is_pillows(shape, severity, quality):
    image_module = pytest.importorskip('PIL.Image')
    images = make_images(shape, 4, 0.8)
    out = corrupt(images, 'jpeg_compression', severity, 0)
    for image, got in zip(images, out):
        file = io.BytesIO()
        image_module.fromarray(image.squeeze()).save(file, 'JPEG', quality=quality)
        # Another build of libjpeg may round the odd value otherwise.
        levels(got, np.asarray(image_module.open(file)).reshape(shape))


def test_mean_corruption_accuracy():
    table = {'fog': {1: 0.9, 5: 0.5}, 'snow': {1: 0.6, 5: 0.1}}
    means = corruptions.mean_corruption_accuracy(table)
    assert list(means['corruptions']) == ['fog', 'snow']
    assert means['corruptions'] == pytest.approx({'fog': 0.7, 'snow': 0.35})
    assert means['mean'] == pytest.approx(0.525)
    every = {name: {s: float(i + s) for s in SEVERITIES} for i, name in enumerate(CORRUPTIONS)}
    assert corruptions.mean_corruption_accuracy(every)['mean'] == pytest.approx(7 + 3)


def means(table):
    return lambda: corruptions.mean_corruption_accuracy(table)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: corrupt(IMAGES, 'rain', 1, 0), "name='rain': expected one of gaussian_noise, shot_noise"),
        (lambda: corrupt(IMAGES, 'fog', 0, 0), 'severity=0: expected one of (1, 2, 3, 4, 5)'),
        (lambda: corrupt(IMAGES, 'fog', 1.0, 0), 'severity=1.0: expected one of (1, 2, 3, 4, 5)'),
        (lambda: corrupt(IMAGES, 'fog', 1, -1), 'seed=-1: expected a whole number >= 0'),
        (lambda: corrupt(IMAGES, 'fog', 1, 0.5), 'seed=0.5: expected a whole number >= 0'),
        (lambda: corrupt(IMAGES / 255, 'fog', 1, 0), 'images.dtype=float64: expected uint8'),
        (lambda: corrupt(IMAGES[0], 'fog', 1, 0), 'images.shape=(32, 32, 3): expected [N, H, W, C]'),
        (lambda: corrupt(IMAGES[:, :7], 'fog', 1, 0), 'images.shape=(12, 7, 32, 3): expected [N, H, W, C]'),
        (lambda: corrupt(IMAGES[..., :2], 'fog', 1, 0), 'images.shape=(12, 32, 32, 2): expected [N, H, W, C]'),
        (lambda: corrupt(IMAGES, 'fog', 1, 0, [0, 1]), 'indices=[0, 1]: expected 12 whole numbers >= 0'),
        (lambda: corrupt(IMAGES[:1], 'fog', 1, 0, [0.5]), 'indices=[0.5]: expected 1 whole numbers >= 0'),
        (lambda: corrupt(IMAGES[:1], 'fog', 1, 0, [-1]), 'indices=[-1]: expected 1 whole numbers >= 0'),
        (means({}), 'table={}: expected accuracies'),
        (means({'rain': {1: 0.5}}), "table has name='rain': expected one of"),
        (means({'fog': {1: 0.5}, 'snow': {2: 0.5}}), "table['snow'] has severities=[2]: expected the same"),
        (means({'fog': {6: 0.5}}), "table['fog'] has severities=[6]: expected the same"),
        (means({'fog': {}}), "table['fog'] has severities=[]: expected the same"),
        (means({'fog': {1: float('nan')}}), "table['fog']={1: nan}: expected finite accuracies"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert '\n' not in str(error.value)


def test_no_pictures():
    assert corrupt(IMAGES[:0], 'snow', 1, 0).shape == (0, 32, 32, 3)
