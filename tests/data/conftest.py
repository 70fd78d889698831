"""Every test of the data gets its own cache and sees no data set of the machine."""

import pytest


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'no_tfds'))
