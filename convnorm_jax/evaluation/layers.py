"""The normalized convolutions of a trained net: kernels, what scales them, picture sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from convnorm_jax.evaluation.spectral import layer_spectrum
from convnorm_jax.layers import spectral
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.factory import ConvThenNorm


@dataclasses.dataclass(frozen=True)
class LayerSite:
    """Where a convolution stands in a net.

    Attributes:
      name: path of its module, joined by '/'.
      path: the same as a tuple.
      module: the module itself, for its attributes.
      grid: size of its full convolution, for the pictures it sees.
    """

    name: str
    path: tuple
    module: nn.Module
    grid: tuple


def find_layers(model, variables, input_shape):
    """Every `ConvNorm` and `ConvThenNorm` of a net with kernels above 1x1, in order of call.

    Args:
      model: a Linen classifier; variables: its variables; input_shape: [H, W, C].

    Returns:
      List of `LayerSite`.
    """
    sites = []

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, (ConvNorm, ConvThenNorm)) and context.method_name == '__call__':
            kernel_size = tuple(module.kernel_size)
            if kernel_size != (1, 1):
                grid = spectral.grid_size(args[0].shape[1:3], kernel_size)
                sites.append(LayerSite('/'.join(module.path), module.path, module, grid))
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    return sites


def _inside(tree, path):
    for key in path:
        tree = tree.get(key, {})
    return tree


def layer_spectra(model, variables, input_shape, most=6):
    """Power spectra and singular values before and after normalization, as measured.

    Normalization is ConvNorm's preconditioner in use (the running one, or the exact one),
    or the scale gamma / sqrt(variance) of the BatchNorm behind the convolution; for other
    layers both are the same. The stride, and ConvNorm's channel-wise convolution and
    BatchNorm, are not counted. Reparametrized kernels (spectral norm, ONI ...) are left out.

    Args:
      most: only so many layers, evenly chosen.

    Returns:
      List of `spectral.LayerSpectrum`.
    """
    sites = [
        site
        for site in find_layers(model, variables, input_shape)
        if isinstance(site.module, ConvNorm) or site.module.conv is None
    ]
    chosen = sorted({round(i) for i in np.linspace(0, len(sites) - 1, min(most, len(sites)))})
    return [_measure(sites[i], variables) for i in chosen]


def _measure(site, variables):
    params, stats = (_inside(variables.get(c, {}), site.path) for c in ('params', 'batch_stats'))
    if isinstance(site.module, ConvNorm):
        kernel = params['kernel']
        exact = site.module.spectrum == 'exact'
        v = spectral.preconditioner(kernel, site.grid) if exact else stats['preconditioner']
        scale = np.asarray(v)[:, : site.grid[1] // 2 + 1]
    else:
        kernel, scale = params['conv']['kernel'], _batch_norm_scale(params, stats)
    return layer_spectrum(site.name, np.asarray(kernel, np.float32), site.grid, scale)


def _batch_norm_scale(params, stats):
    if 'norm' not in stats:
        return np.ones(params['conv']['kernel'].shape[-1], np.float32)
    return np.asarray(params['norm']['scale']) / np.sqrt(np.asarray(stats['norm']['var']) + BatchNorm.epsilon)
