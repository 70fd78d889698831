"""The normalized convolutions of a trained net: kernels, what scales them, picture sizes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from convnorm_jax.evaluation.spectral import layer_spectrum
from convnorm_jax.layers import spectral
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.factory import ConvThenNorm
from convnorm_jax.layers.geometry import ints_for_axes, spatial_axes


@dataclasses.dataclass(frozen=True)
class LayerSite:
    """Where a convolution or a linear layer stands in a net.

    Attributes:
      name: path of its module, joined by '/'.
      path: the same as a tuple.
      module: a copy of the module outside the net, as it stands at evaluation.
      parts: the same of the modules it is made of, by name: 'conv', 'norm', 'batch_norm'.
      picture, output: shapes without the batch of what it is given and gives, (H, W, C), of a sequence (W, C),
        or (C,).
    """

    name: str
    path: tuple
    module: nn.Module
    parts: dict
    picture: tuple
    output: tuple

    @property
    def convolution(self):
        """Whether it is a convolution, not a linear layer."""
        return isinstance(self.module, (ConvNorm, ConvThenNorm))

    @property
    def kernel_size(self):
        """(kh, kw), or as many ints as there are spatial axes; (1, 1) of a linear layer."""
        return self._ints('kernel_size')

    @property
    def strides(self):
        """(sh, sw), or as many ints as there are spatial axes; (1, 1) of a linear layer."""
        return self._ints('strides')

    def _ints(self, name):
        if not self.convolution:
            return 1, 1
        return ints_for_axes(getattr(self.module, name), name, spatial_axes(self.module.kernel_size))

    @property
    def groups(self):
        """Groups of channels; 1 of a linear layer."""
        return self.module.feature_group_count if self.convolution else 1

    @property
    def grid(self):
        """(Hf, Wf) of the full convolution of its pictures."""
        return spectral.grid_size(self.picture[:-1], self.kernel_size)

    @property
    def batch_norm(self):
        """The BatchNorm it ends with, or None."""
        norm = self.parts.get('batch_norm', self.parts.get('norm'))
        return norm if isinstance(norm, BatchNorm) else None

    @property
    def linear(self):
        """Whether it is affine at evaluation: not if it normalizes by the statistics of each picture."""
        return not self.parts.get('norm') or self.batch_norm is not None


def find_sites(model, variables, input_shape, *inputs):
    """Every `ConvNorm`, `ConvThenNorm` and `flax.linen.Dense` of a net, in order of call.

    Args:
      model: a Linen classifier or discriminator; variables: its variables; input_shape: [H, W, C].
      inputs: arrays, or their shapes, that the net takes behind the images.

    Returns:
      List of `LayerSite`.
    """
    sites, within = [], []

    def record(call, args, kwargs, context):
        module = context.module
        if context.method_name != '__call__':
            return call(*args, **kwargs)
        if within:
            outer, parts = within[0]
            if module.path[:-1] == outer:
                parts[module.name] = module.clone(name=None)
            return call(*args, **kwargs)
        if not isinstance(module, (ConvNorm, ConvThenNorm, nn.Dense)):
            return call(*args, **kwargs)
        path, parts = module.path, {}
        within.append((path, parts))
        output = call(*args, **kwargs)
        within.clear()
        sites.append(
            LayerSite('/'.join(path), path, module.clone(name=None), parts, args[0].shape[1:], output.shape[1:])
        )
        return output

    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, *x: model.apply(v, *x, train=False), variables, images, *inputs)
    return sites


def find_layers(model, variables, input_shape, *inputs):
    """Every `ConvNorm` and `ConvThenNorm` of a net with kernels above 1x1, in order of call.

    Args and returns as `find_sites`.
    """
    return [s for s in find_sites(model, variables, input_shape, *inputs) if math.prod(s.kernel_size) > 1]


def inner_variables(variables, path):
    """The variables of the module at `path`: {collection: its part}."""
    return {name: functools.reduce(lambda tree, key: tree.get(key, {}), path, v) for name, v in variables.items()}


def effective_kernel(site, variables):
    """The kernel that a convolution convolves with at evaluation, float32 [kh, kw, cin / groups, cout].

    That of a reparametrized convolution (spectral norm, ONI, OWN, weight norm) as it comes out of
    the reparametrization; ConvNorm's is the parameter, without its preconditioner.
    """
    inside = inner_variables(variables, site.path)
    if isinstance(site.module, ConvNorm):
        return np.asarray(inside['params']['kernel'], np.float32)
    inside, kernels = inner_variables(inside, ('conv',)), []

    def record(call, args, kwargs, context):
        if context.method_name == '_convolution':
            kernels.append(args[1])
        return call(*args, **kwargs)

    def reparametrize(inside):
        with nn.intercept_methods(record):
            site.parts['conv'].apply(inside, jnp.zeros((1, *site.picture)))
        return kernels.pop() if kernels else inside['params']['kernel']

    return np.asarray(jax.jit(reparametrize)(inside), np.float32)


def layer_spectra(model, variables, input_shape, *inputs, most=6):
    """Power spectra and singular values before and after normalization, as measured.

    Before is the kernel, of reparametrized convolutions (spectral norm, ONI ...) the one that
    comes out. Normalization is ConvNorm's preconditioner in use (the running one, or the exact
    one), or the scale gamma / sqrt(variance) of the BatchNorm behind the convolution; for other
    layers both are the same. The stride, and ConvNorm's channel-wise convolution and BatchNorm,
    are not counted.

    Args:
      model, variables, input_shape, inputs: see `find_sites`.
      most: only so many layers, evenly chosen.

    Returns:
      List of `spectral.LayerSpectrum`.
    """
    sites = find_layers(model, variables, input_shape, *inputs)
    chosen = sorted({round(i) for i in np.linspace(0, len(sites) - 1, min(most, len(sites)))})
    return [_measure(sites[i], variables) for i in chosen]


def _measure(site, variables):
    scale = normalized_scale(site, variables) if isinstance(site.module, ConvNorm) else norm_scale(site, variables)
    return layer_spectrum(site.name, effective_kernel(site, variables), site.grid, scale, site.groups)


def normalized_scale(site, variables):
    """ConvNorm's preconditioner in use, [Hf, Wf//2+1, cout], or [cout] of a 1x1 kernel; ones for other layers.

    Half of the grid, as real transforms have it: a `scale` for `spectral.singular_values`.
    """
    if not isinstance(site.module, ConvNorm):
        return np.ones(site.output[-1], np.float32)
    inside = inner_variables(variables, site.path)
    if site.module.spectrum == 'exact':
        v = spectral.preconditioner(inside['params']['kernel'], site.grid)
    else:
        v = inside['batch_stats']['preconditioner']
    v = np.asarray(v)
    return v.reshape(-1) if set(v.shape[:-1]) == {1} else v[..., : site.grid[-1] // 2 + 1, :]


def norm_scale(site, variables):
    """gamma / sqrt(variance + epsilon) of the BatchNorm at the end of a layer, [cout]; ones without one."""
    if site.batch_norm is None:
        return np.ones(site.output[-1], np.float32)
    name = 'batch_norm' if 'batch_norm' in site.parts else 'norm'
    inside = inner_variables(variables, (*site.path, name))
    gamma = inside.get('params', {}).get('scale', 1.0)
    return np.asarray(gamma) / np.sqrt(np.asarray(inside['batch_stats']['var']) + site.batch_norm.epsilon)
