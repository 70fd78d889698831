"""Registers kinds of mistakes, and makes the commands and runs that they start from."""

import shutil

import cv2
import numpy as np

from convnorm_jax.configs import default
from convnorm_jax.configs.keys import flatten

DIGITS, GAN, CIFAR = (f'configs/{name}.py' for name in ('digits_convnorm', 'digits_gan', 'cifar10_convnorm'))

# A run of a second, so that a mistake that is not detected ends soon too.
SHORT = ['--config.train.steps=2', '--config.model.width=4', '--noconfig.plots', '--config.attack.names=()']
TINY = [f'--config={DIGITS}', *SHORT, '--config.model.depth=(1,)', '--config.checkpoint.every_steps=1']


def registry():
    """Makes (kinds, decorator); the decorator registers a function in `kinds` by its name.

    A kind is a function (random.Random, its folder, a finished run) -> the arguments of the command.
    """
    kinds = {}

    def kind(function):
        kinds[function.__name__.replace('_', ' ')] = function
        return function

    return kinds, kind


def base_keys():
    """{key: value} of the base config."""
    return flatten(default.get_config())


def keys_with(attribute):
    """The keys that have choices, names or an interval."""
    return [name for name, key in default.KEYS.items() if getattr(key, attribute)]


def digits(place, *more):
    """A short command on digits, with a run folder that does not exist yet."""
    return [f'--config={DIGITS}', *SHORT, *more, f'--workdir={place}/run']


def copy_of(trained, place):
    """Copies the finished run; returns the copy."""
    shutil.copytree(trained, place / 'run')
    return place / 'run'


def again(place, *more):
    """The command that trained the finished run, for its copy."""
    return [*TINY, *more, f'--workdir={place}/run']


def spoil(rng, path):
    """Truncates a file, empties it, or overwrites a part of it with noise."""
    content = bytearray(path.read_bytes())
    how = rng.choice(['cut', 'empty', 'noise'])
    if how == 'noise':
        start = rng.randrange(len(content))
        content[start : start + 200] = rng.randbytes(min(200, len(content) - start))
        content[:4] = b'\xff\x00{]'  # wherever the noise is, the file cannot be read
    path.write_bytes(
        content if how == 'noise' else content[: rng.randrange(len(content) // 2)] if how == 'cut' else b''
    )


def image_folder(place, classes):
    """Makes class folders of small images in place/data; returns the paths of the training images."""
    paths = []
    for part in ('train', 'val'):
        for name in 'abcd'[:classes]:
            folder = place / 'data' / part / name
            folder.mkdir(parents=True)
            for i in range(6):
                path = folder / f'{i}.png'
                cv2.imwrite(str(path), np.full((16, 16, 3), 20 * i + 10, np.uint8))
                paths += [path] if part == 'train' else []
    return paths


def on_images(place, *more):
    """A command on these folders."""
    sizes = {'image_size': 16, 'batch_size': 4, 'validation_fraction': 0, 'workers': 0, 'data_dir': f'{place}/data'}
    options = ['--config.data.name=folder', *(f'--config.data.{key}={value}' for key, value in sizes.items())]
    return digits(place, *options, *more)
