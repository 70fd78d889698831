"""Nets. Each is given its layers and never compares their names."""

from convnorm_jax.models.classifiers import MODELS, create_model

__all__ = ['MODELS', 'create_model']
