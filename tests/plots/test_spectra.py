"""Spectra of one layer, of many, of dead ones."""

import types

import numpy as np
import pytest

from convnorm_jax.plots.spectra import layer_spectra


def spectrum(size, channels=4, dead=False):
    random = np.random.default_rng(0)
    power = random.uniform(0.1, 3, (size[0], size[1] // 2 + 1, channels))
    values = np.sort(random.uniform(0, 2, size[0] * size[1] * channels))[::-1]
    if dead:
        power, values = 0 * power, 0 * values
    return types.SimpleNamespace(
        name=f'layer {size}', size=size, power_before=power, power_after=np.sign(power),
        singular_before=values, singular_after=values**0.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    'spectra',
    [
        [spectrum((6, 7))],
        [spectrum((1, 1), channels=1)],
        [spectrum((6, 6), dead=True)],
        [spectrum((4 + index, 34)) for index in range(9)],
    ],
    ids=['one', 'tiny', 'dead', 'many'],
)
def test_layer_spectra(tmp_path, spectra, check_picture):
    path = tmp_path / 'spectra.png'
    picture = check_picture(path, layer_spectra(spectra, path, 'layers'))
    assert picture.shape[0] == round(200 * (0.9 + 1.65 * min(len(spectra), 6)))


def test_no_layer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'spectra=\[\]'):
        layer_spectra([], tmp_path / 'a.png')
