"""convnorm_jax: Convolutional Normalization (NeurIPS 2021, arXiv 2103.00673) in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

from convnorm_jax.version import __version__

if TYPE_CHECKING:
    from convnorm_jax.exported.load import load_exported
    from convnorm_jax.exported.save import save_exported, save_exported_generator
    from convnorm_jax.layers.convnorm import ConvNorm
    from convnorm_jax.layers.folding import fold_for_inference
    from convnorm_jax.layers.transposed import ConvNormTranspose
    from convnorm_jax.weights import load_weights, save_weights

__all__ = [
    'ConvNorm',
    'ConvNormTranspose',
    '__version__',
    'fold_for_inference',
    'load_exported',
    'load_weights',
    'save_exported',
    'save_exported_generator',
    'save_weights',
]

# Imported on first use, so that a command that only reports a mistake in its arguments does not import JAX.
_PLACES = {
    'ConvNorm': 'convnorm_jax.layers.convnorm',
    'ConvNormTranspose': 'convnorm_jax.layers.transposed',
    'fold_for_inference': 'convnorm_jax.layers.folding',
    'load_exported': 'convnorm_jax.exported.load',
    'load_weights': 'convnorm_jax.weights',
    'save_exported': 'convnorm_jax.exported.save',
    'save_exported_generator': 'convnorm_jax.exported.save',
    'save_weights': 'convnorm_jax.weights',
}
_MODULES = ('equinox', 'functional', 'layers', 'nnx')


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f'convnorm_jax.{name}')
    if name not in _PLACES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES, *_MODULES]
