"""The nets. Each is given the constructor of its layers and never compares their names."""

from convnorm_jax.models.classifiers import MODELS, create_model
from convnorm_jax.models.gan import GANS, create_gan

__all__ = ['GANS', 'MODELS', 'create_gan', 'create_model']
