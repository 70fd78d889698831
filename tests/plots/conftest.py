"""What every test of a picture asks of it."""

import matplotlib.image
import pytest


def _check_picture(path, returned):
    """A readable PNG, nothing beside it, wide enough for print, and not blank."""
    assert returned == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = matplotlib.image.imread(path)
    height, width = picture.shape[:2]
    assert 200 <= height <= 3000 and 300 <= width <= 3000
    assert picture[..., :3].std() > 0.02
    return picture


@pytest.fixture
def check_picture():
    """check_picture(path, returned) -> the picture, float [height, width, 4] in [0, 1]."""
    return _check_picture
