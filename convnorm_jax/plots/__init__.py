"""Figures as PNG files: learning curves, attacked images, robustness, spectra of layers,
comparisons of runs, images of a GAN.

Each function writes one file of 200 dpi (under a temporary name, then renamed, so that a reader never
sees half of it), makes its folder, and returns its path. Nothing here uses pyplot or changes the
matplotlib backend of the calling program.
"""

from convnorm_jax.plots.attacks import MAX_COLUMNS, attack_grid
from convnorm_jax.plots.comparison import accuracy_against
from convnorm_jax.plots.corruptions import corruption_pictures, corruption_table
from convnorm_jax.plots.figure import BLUE, GREY, VERMILLION
from convnorm_jax.plots.generative import (
    MAX_STEPS,
    gan_curves,
    interpolation_grid,
    real_and_fake,
    sample_grid,
    sample_progress,
)
from convnorm_jax.plots.operators import layer_operators
from convnorm_jax.plots.robustness import (
    attack_bars,
    epsilon_curve,
    query_curve,
    wilson_interval,
)
from convnorm_jax.plots.spectra import MAX_LAYERS, layer_spectra
from convnorm_jax.plots.training import learning_curves

__all__ = [
    'BLUE',
    'GREY',
    'MAX_COLUMNS',
    'MAX_LAYERS',
    'MAX_STEPS',
    'VERMILLION',
    'accuracy_against',
    'attack_bars',
    'attack_grid',
    'corruption_pictures',
    'corruption_table',
    'epsilon_curve',
    'gan_curves',
    'interpolation_grid',
    'layer_operators',
    'layer_spectra',
    'learning_curves',
    'query_curve',
    'real_and_fake',
    'sample_grid',
    'sample_progress',
    'wilson_interval',
]
