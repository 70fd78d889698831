"""The normalized convolutions of a trained net: their kernels, their scales, the sizes of their inputs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from convnorm_jax.evaluation.spectral import LayerSpectrum, layer_spectrum
from convnorm_jax.layers import spectral
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.factory import ConvThenNorm
from convnorm_jax.layers.geometry import ints_for_axes, spatial_axes


@dataclasses.dataclass(frozen=True)
class LayerSite:
    """A convolution or a linear layer of a net, and its place in the net.

    Attributes:
      name: path of its module, joined by '/'.
      path: the same as a tuple.
      module: a copy of the module outside the net, as it is at evaluation.
      parts: copies of its submodules, by name: 'conv', 'norm', 'batch_norm'.
      input_shape: of an example, (H, W, C), (W, C) of a sequence, or (C,).
      output_shape: of an example, (H, W, C), (W, C) of a sequence, or (C,).
    """

    name: str
    path: tuple[str, ...]
    module: Any  # a ConvNorm, a ConvThenNorm or a Dense
    parts: dict[str, Any]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution, not a linear layer."""
        return isinstance(self.module, (ConvNorm, ConvThenNorm))

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """(kh, kw), or one int for each spatial axis; (1, 1) of a linear layer."""
        return self._ints('kernel_size')

    @property
    def strides(self) -> tuple[int, ...]:
        """(sh, sw), or one int for each spatial axis; (1, 1) of a linear layer."""
        return self._ints('strides')

    def _ints(self, name: str) -> tuple[int, ...]:
        if not self.convolution:
            return 1, 1
        return ints_for_axes(getattr(self.module, name), name, spatial_axes(self.module.kernel_size))

    @property
    def groups(self) -> int:
        """Groups of channels; 1 of a linear layer."""
        return self.module.feature_group_count if self.convolution else 1

    @property
    def grid(self) -> tuple[int, ...]:
        """(Hf, Wf) of the full convolution of its inputs."""
        return tuple(spectral.grid_size(self.input_shape[:-1], self.kernel_size))

    @property
    def batch_norm(self) -> BatchNorm | None:
        """The BatchNorm at its end, or None."""
        norm = self.parts.get('batch_norm', self.parts.get('norm'))
        return norm if isinstance(norm, BatchNorm) else None

    @property
    def linear(self) -> bool:
        """Whether it is affine at evaluation; false if it normalizes by the statistics of each image."""
        return not self.parts.get('norm') or self.batch_norm is not None


def find_sites(model: nn.Module, variables: Any, input_shape: Sequence[int], *inputs: Any) -> list[LayerSite]:
    """Finds every `ConvNorm`, `ConvThenNorm` and `flax.linen.Dense` of a net, in order of call.

    Args:
      model: a Linen classifier or discriminator.
      variables: of the net.
      input_shape: [H, W, C].
      *inputs: arrays, or their shapes, that the net takes after the images.

    Returns:
      List of `LayerSite`.
    """
    sites: list[LayerSite] = []
    within: list[tuple[tuple[str, ...], dict[str, Any]]] = []  # the site whose submodules are being called

    def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module: Any = context.module
        if context.method_name != '__call__':
            return call(*args, **kwargs)
        if within:
            outer, parts = within[0]
            if module.path[:-1] == outer:
                parts[module.name] = module.clone(name=None)
            return call(*args, **kwargs)
        if not isinstance(module, (ConvNorm, ConvThenNorm, nn.Dense)):
            return call(*args, **kwargs)
        path: tuple[str, ...] = module.path
        own_parts: dict[str, Any] = {}
        within.append((path, own_parts))
        output = call(*args, **kwargs)
        within.clear()
        sites.append(
            LayerSite('/'.join(path), path, module.clone(name=None), own_parts, args[0].shape[1:], output.shape[1:])
        )
        return output

    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, *x: model.apply(v, *x, train=False), variables, images, *inputs)
    return sites


def find_layers(model: nn.Module, variables: Any, input_shape: Sequence[int], *inputs: Any) -> list[LayerSite]:
    """Finds every `ConvNorm` and `ConvThenNorm` of a net with kernels larger than 1x1, in order of call.

    Arguments and result: see `find_sites`.
    """
    return [s for s in find_sites(model, variables, input_shape, *inputs) if math.prod(s.kernel_size) > 1]


def inner_variables(variables: Any, path: Sequence[str]) -> dict[str, Any]:
    """The variables of the module at `path`, by collection."""
    return {name: functools.reduce(lambda tree, key: tree.get(key, {}), path, v) for name, v in variables.items()}


def effective_kernel(site: LayerSite, variables: Any) -> np.ndarray:
    """The kernel that a layer convolves with at evaluation, float32 [kh, kw, cin / groups, cout].

    For a reparametrized convolution (spectral norm, ONI, OWN, weight norm) it is the output of
    the reparametrization. For ConvNorm it is the parameter, without the preconditioner.
    """
    inside = inner_variables(variables, site.path)
    if isinstance(site.module, ConvNorm):
        return np.asarray(inside['params']['kernel'], np.float32)
    inside = inner_variables(inside, ('conv',))
    kernels: list[jax.Array] = []

    def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == '_convolution':
            kernels.append(args[1])
        return call(*args, **kwargs)

    def reparametrize(inside: Any) -> jax.Array:
        with nn.intercept_methods(record):
            site.parts['conv'].apply(inside, jnp.zeros((1, *site.input_shape)))
        return kernels.pop() if kernels else inside['params']['kernel']

    return np.asarray(jax.jit(reparametrize)(inside), np.float32)


def layer_spectra(
    model: nn.Module, variables: Any, input_shape: Sequence[int], *inputs: Any, most: int = 6
) -> list[LayerSpectrum]:
    """Measures power spectra and singular values of layers before and after their normalization.

    "Before" is the kernel; for a reparametrized convolution (spectral norm, ONI ...) the effective one.
    The normalization is ConvNorm's preconditioner (the running one, or the exact
    one), or the scale gamma / sqrt(variance) of the BatchNorm after the convolution. For other
    layers both are the same. The stride, and ConvNorm's channel-wise convolution and BatchNorm,
    are left out.

    Args:
      model: see `find_sites`.
      variables: see `find_sites`.
      input_shape: see `find_sites`.
      *inputs: see `find_sites`.
      most: number of layers; of more, this many are chosen evenly.

    Returns:
      List of `spectral.LayerSpectrum`.
    """
    sites = find_layers(model, variables, input_shape, *inputs)
    chosen = sorted({round(i) for i in np.linspace(0, len(sites) - 1, min(most, len(sites)))})
    return [_measure(sites[i], variables) for i in chosen]


def _measure(site: LayerSite, variables: Any) -> LayerSpectrum:
    scale = normalized_scale(site, variables) if isinstance(site.module, ConvNorm) else norm_scale(site, variables)
    return layer_spectrum(site.name, effective_kernel(site, variables), site.grid, scale, site.groups)


def normalized_scale(site: LayerSite, variables: Any) -> np.ndarray:
    """ConvNorm's preconditioner, [Hf, Wf//2+1, cout], or [cout] of a 1x1 kernel; ones for other layers.

    It is on the half grid of real transforms: a `scale` for `spectral.singular_values`.
    """
    if not isinstance(site.module, ConvNorm):
        return np.ones(site.output_shape[-1], np.float32)
    inside = inner_variables(variables, site.path)
    if site.module.spectrum == 'exact':
        v = np.asarray(spectral.preconditioner(inside['params']['kernel'], site.grid))
    else:
        v = np.asarray(inside['batch_stats']['preconditioner'])
    return v.reshape(-1) if set(v.shape[:-1]) == {1} else v[..., : site.grid[-1] // 2 + 1, :]


def norm_scale(site: LayerSite, variables: Any) -> np.ndarray:
    """gamma / sqrt(variance + epsilon) of the BatchNorm at the end of a layer, [cout]; ones without BatchNorm."""
    if site.batch_norm is None:
        return np.ones(site.output_shape[-1], np.float32)
    name = 'batch_norm' if 'batch_norm' in site.parts else 'norm'
    inside = inner_variables(variables, (*site.path, name))
    gamma = inside.get('params', {}).get('scale', 1.0)
    return np.asarray(gamma) / np.sqrt(np.asarray(inside['batch_stats']['var']) + site.batch_norm.epsilon)
