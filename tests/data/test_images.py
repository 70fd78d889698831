"""Decoding against Pillow, crops against their definitions."""

import io

import numpy as np
import pytest
from scipy import stats

from convnorm_jax.data import images

Image = pytest.importorskip('PIL.Image')


def smooth(height=48, width=64):
    """A picture that JPEG hardly changes; every channel different."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 255 - 2 * x], -1).round().astype(np.uint8)


def encoded(image, mode, file_format, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ('mode', 'file_format', 'tolerance'),
    [
        ('RGB', 'PNG', 0),
        ('RGBA', 'PNG', 0),
        ('L', 'PNG', 0),
        ('P', 'PNG', 0),
        ('RGB', 'JPEG', 4),
        ('L', 'JPEG', 1),
        ('CMYK', 'JPEG', 4),
        ('RGB', 'BMP', 0),
    ],
)
def test_decoded_as_pillow_does(mode, file_format, tolerance):
    data = encoded(smooth(), mode, file_format, **({'quality': 98} if file_format == 'JPEG' else {}))
    want = np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(int)
    found = images.decode(data, 'x')
    assert found.dtype == np.uint8 and found.shape == (48, 64, 3)
    assert np.abs(found - want).max() <= tolerance


def test_the_camera_is_not_turned():
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(smooth(), 'RGB', 'JPEG', exif=turned.tobytes())
    assert images.decode(data, 'x').shape == (48, 64, 3)


def with_a_preview(data):
    """The same JPEG with a segment that holds a whole small JPEG."""
    preview = encoded(smooth(8, 8), 'RGB', 'JPEG')
    return data[:2] + b'\xff\xe1' + (len(preview) + 2).to_bytes(2, 'big') + preview + data[2:]


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG'])
@pytest.mark.parametrize('preview', [False, True])
def test_cut_short(file_format, preview):
    data = encoded(smooth(), 'RGB', file_format)
    data = with_a_preview(data) if preview and file_format == 'JPEG' else data
    for trailing in (b'trailing bytes', bytes(100), data):
        np.testing.assert_array_equal(images.decode(data + trailing, 'x'), images.decode(data, 'x'))
    for length in (0, 3, len(data) // 2, len(data) - 100, len(data) - 20):
        with pytest.raises(ValueError, match=r'^some/file.jpg: expected an image.*replace or remove the file$'):
            images.decode(data[:length], 'some/file.jpg')


def test_a_cut_png_with_bytes_behind_it():
    data = encoded(smooth(), 'RGB', 'PNG')
    with pytest.raises(ValueError, match='cannot be decoded'):
        images.decode(data[: len(data) // 2] + bytes(20), 'x')


def test_no_picture():
    with pytest.raises(ValueError, match=r'notes\.jpg: expected an image, but it cannot be decoded'):
        images.decode(b'not a picture at all', 'notes.jpg')


def test_center_crop_is_means_and_the_middle():
    # 14 * 256 / 224 = 16: the picture is halved in both directions, then a square of 14 is cut.
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    halved = image.reshape(16, 2, 24, 2, 3).mean((1, 3))
    assert np.abs(images.center_crop(image, 14) - halved[1:15, 5:19]).max() <= 0.5
    upright = image.swapaxes(0, 1)
    np.testing.assert_array_equal(images.center_crop(upright, 14), images.center_crop(image, 14).swapaxes(0, 1))


@pytest.mark.parametrize('shape', [(1, 1), (5, 300), (300, 5), (224, 224), (256, 256), (33, 31)])
def test_crops_have_their_size_and_keep_one_colour(shape):
    image = np.broadcast_to(np.array([10, 120, 250], np.uint8), (*shape, 3)).copy()
    for crop in (
        images.center_crop(image, 24),
        images.random_resized_crop(image, np.random.default_rng(0), 24),
    ):
        assert crop.shape == (24, 24, 3) and crop.dtype == np.uint8
        assert (crop == [10, 120, 250]).all()


def test_center_crop_does_not_enlarge_what_fits():
    image = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.center_crop(image, 224), image[16:240, 38:262])


def boxes(height, width, count=4000):
    rng = np.random.default_rng(0)
    return np.array([images.random_crop_box(rng, height, width) for _ in range(count)])


def test_the_box_is_distributed_as_defined():
    height, width = 900, 1000
    found = boxes(height, width)
    top, left, h, w = found.T
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    # The definition, by rejection: an area share and the logarithm of a ratio, both uniform, where the box fits.
    rng = np.random.default_rng(1)
    share, ratio = rng.uniform(0.08, 1, 40000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 40000))
    wide, high = np.sqrt(share * height * width * ratio), np.sqrt(share * height * width / ratio)
    fits = (wide <= width) & (high <= height)
    assert stats.ks_2samp(h * w / (height * width), share[fits]).pvalue > 0.01
    assert stats.ks_2samp(np.log(w / h), np.log(ratio[fits])).pvalue > 0.01
    # Placed evenly over what is left.
    assert stats.kstest((top + 0.5) / (height - h + 1), 'uniform').pvalue > 0.01
    assert stats.kstest((left + 0.5) / (width - w + 1), 'uniform').pvalue > 0.01


def test_where_no_box_fits_the_middle_is_taken():
    # So long a strip: 0.08 of the area would be 80 x 10 at the least, and 4/3 is the longest.
    assert {tuple(box) for box in boxes(10, 1000, 20).tolist()} == {(0, 493, 10, 13)}
    assert {tuple(box) for box in boxes(1000, 10, 20).tolist()} == {(493, 0, 13, 10)}


def test_the_crop_shows_its_box():
    y, x = np.mgrid[0:200, 0:250]
    image = np.stack([x, y, 0 * x], -1).astype(np.uint8)  # a pixel says where it is
    for seed in range(5):
        top, left, height, width = images.random_crop_box(np.random.default_rng(seed), 200, 250)
        crop = images.random_resized_crop(image, np.random.default_rng(seed), 32).astype(float)
        assert crop[..., 0].mean() == pytest.approx(left + (width - 1) / 2, abs=0.6)
        assert crop[..., 1].mean() == pytest.approx(top + (height - 1) / 2, abs=0.6)
        assert crop[0, 0, 0] == pytest.approx(left, abs=width / 32 + 1)
        assert crop[-1, -1, 1] == pytest.approx(top + height - 1, abs=height / 32 + 1)
