"""Operator norms and singular values of the layers of a trained net, measured.

A layer at evaluation is affine, x -> A x + b, because its statistics are fixed. A is taken from the module
itself, A x = f(x) - f(0), with its padding and stride, at the input size that the layer has in the net, and its
norm is computed by power iteration. Two stages are measured:

- the convolution with its effective kernel: the output of the reparametrization for spectral norm, ONI, OWN and
  weight norm; ConvNorm's normalized convolution (the kernel with its preconditioner, arXiv 2103.00673,
  section 3.2);
- the whole layer: the convolution with the BatchNorm after it, or ConvNorm with its channel-wise
  convolution and BatchNorm. GroupNorm and SwitchNorm divide by the statistics of each image, so
  the whole is not linear and only the convolution is measured.

The exact singular values of the stride-1 circular operators of both stages are given as well, on the grid
of the full convolution (Sedghi, Gupta, Long 2019, arXiv 1805.10408). A zero-padded, strided
convolution is a part of the circular one (some of its rows and columns), so the largest
circular value of the convolution is at least its norm.

All these figures are measured, not certified: power iteration in float32 approaches a norm from below.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from convnorm_jax.errors import UserError
from convnorm_jax.evaluation.layers import (
    LayerSite,
    effective_kernel,
    find_sites,
    inner_variables,
    norm_scale,
    normalized_scale,
)
from convnorm_jax.evaluation.spectral import singular_values
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.models.mobilenet import MobileNet
from convnorm_jax.models.plain import PlainNet, SimpleCNN2
from convnorm_jax.models.resnet import ResNet
from convnorm_jax.models.sequence import SequenceCNN

_CHAINS = (PlainNet, SimpleCNN2)
_POOLED_CHAINS = (MobileNet, SequenceCNN)

VECTORS = 4  # of a power iteration
MOST_ITERATIONS = 300


@dataclasses.dataclass(frozen=True)
class LayerOperator:
    """The norms and singular values of a layer, see the module's docstring.

    Attributes:
      name: path of its module, joined by '/'.
      kind: class of its convolution: 'ConvNorm', 'Conv', 'SpectralNormConv' ..., or 'Dense'.
      conv_norm: operator norm of the convolution with its effective kernel.
      layer_norm: operator norm of the whole layer, or None if it is not linear.
      conv_circular: float [Hf*Wf*min(cin, cout)], descending: the exact singular values of the circular
        stride-1 convolution with the effective kernel. For a Dense layer, those of its matrix.
      layer_circular: the same of the whole layer, or None if it is not linear. ConvNorm's channel-wise convolution
        after a stride s is replaced by the equivalent one before the stride, with its taps s apart.
      strides: (sh, sw), or (s,) of a 1-D layer.
      input_shape: of an example, (H, W, C), (W, C) of a 1-D layer, or (C,) of a Dense layer.
      output_shape: of an example, (H, W, C), (W, C) of a 1-D layer, or (C,) of a Dense layer.
    """

    name: str
    kind: str
    conv_norm: float
    layer_norm: float | None
    conv_circular: np.ndarray
    layer_circular: np.ndarray | None
    strides: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def layer_operators(
    model: nn.Module, variables: Any, input_shape: Sequence[int], *, tolerance: float = 1e-3, seed: int = 0
) -> list[LayerOperator]:
    """Measures every `ConvNorm`, `ConvThenNorm` (including 1x1 shortcuts) and `flax.linen.Dense` of a net.

    Args:
      model: a Linen classifier.
      variables: of the net.
      input_shape: [H, W, C].
      tolerance: see `operator_norm`.
      seed: see `operator_norm`.

    Returns:
      List of `LayerOperator`, in order of call.

    Raises:
      ValueError: a layer whose kernel or statistics are not finite.
    """
    norm = functools.partial(operator_norm, tolerance=tolerance, seed=seed)
    return [_measure(site, variables, norm) for site in find_sites(model, variables, input_shape)]


def _measure(site: LayerSite, variables: Any, norm: Callable[[Any, Any, tuple[int, ...]], float]) -> LayerOperator:
    inside = inner_variables(variables, site.path)
    conv_circular, layer_circular = _circular_values(site, variables)
    conv_norm = norm(*_convolution(site, inside), site.input_shape)
    layer_norm: float | None = conv_norm
    if not site.linear:
        layer_norm = layer_circular = None
    elif site.batch_norm is not None or isinstance(site.module, ConvNorm):
        layer_norm = norm(_whole(site), inside, site.input_shape)
    return LayerOperator(
        name=site.name,
        kind=type(site.parts.get('conv', site.module)).__name__,
        conv_norm=conv_norm,
        layer_norm=layer_norm,
        conv_circular=conv_circular,
        layer_circular=layer_circular,
        strides=site.strides,
        input_shape=site.input_shape,
        output_shape=site.output_shape,
    )


def _convolution(site: LayerSite, inside: Any) -> tuple[Any, Any]:
    """(module, its variables) of the convolution alone, in float32."""
    if isinstance(site.module, ConvNorm):
        return site.module.clone(use_affine=False, use_batch_norm=False, dtype=jnp.float32), inside
    if 'conv' in site.parts:
        return site.parts['conv'].clone(dtype=jnp.float32), inner_variables(inside, ('conv',))
    return site.module.clone(dtype=jnp.float32), inside


def _whole(site: LayerSite) -> Any:
    """The whole layer as a module, in float32."""
    if isinstance(site.module, ConvNorm):
        return site.module.clone(dtype=jnp.float32)
    return site.module.clone(dtype=jnp.float32, norm=functools.partial(site.module.norm, dtype=jnp.float32))


# --- operator norm ---------------------------------------------------------------------------


def operator_norm(
    module: nn.Module, variables: Any, shape: tuple[int, ...], *, tolerance: float = 1e-3, seed: int = 0
) -> float:
    r"""Largest singular value of the linear part of an affine module, approached from below.

    .. math::
        \|A\|_2 = \max_{x \ne 0} \frac{\|A x\|_2}{\|x\|_2}, \qquad A x = f(x) - f(0)

    Uses block power iteration on :math:`A^\top A` with the last step in its subspace (LOBPCG, Knyazev 2001). It
    needs far fewer iterations than plain power iteration when many singular values are close to the largest,
    as in a convolution. It ends when :math:`\|A^\top A v - s^2 v\| \le \text{tolerance} \cdot s^2`, or after
    `MOST_ITERATIONS`. Each module compiles one program, :math:`A^\top A` on a few vectors, with reverse-mode
    differentiation only.

    >>> layer = nn.Dense(3)
    >>> kernel = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
    >>> round(operator_norm(layer, {'params': {'kernel': kernel, 'bias': jnp.ones(3)}}, (3,)), 4)
    4.0

    Args:
      module: a Linen module of one argument, float32 ``[B, *shape]``, that treats the examples of a batch
        independently.
      variables: of the module.
      shape: of an example.
      tolerance: bound of the relative residual.
      seed: of the first vectors.

    Returns:
      The norm; NaN if the module's output is not finite.
    """
    size, random = math.prod(shape), np.random.default_rng(seed)

    def gram(vectors: np.ndarray) -> np.ndarray:  # [size, k], k <= 2 VECTORS, padded: one shape, one program
        batch = np.zeros((2 * VECTORS, size), np.float32)
        batch[: vectors.shape[1]] = vectors.T
        pulled = _gram(module, variables, batch.reshape(-1, *shape))
        return np.asarray(pulled, np.float64).reshape(-1, size)[: vectors.shape[1]].T

    return _largest(gram, size, tolerance, random)


def _largest(
    gram: Callable[[np.ndarray], np.ndarray], size: int, tolerance: float, random: np.random.Generator
) -> float:
    """Square root of the largest eigenvalue of `gram`, a symmetric positive semidefinite map of float64 [size, k]."""
    block = np.linalg.qr(random.normal(size=(size, VECTORS)))[0]
    pulled, step = gram(block), np.zeros((size, 0))
    for _ in range(MOST_ITERATIONS):
        if not np.isfinite(pulled).all():
            return math.nan  # the factorizations below would fail
        square = block[:, 0] @ pulled[:, 0]
        if np.linalg.norm(pulled[:, 0] - square * block[:, 0]) <= tolerance * square:
            break
        new = np.linalg.qr(np.concatenate([block, pulled, step], 1))[0][:, block.shape[1] :]
        basis, pulled = np.concatenate([block, new], 1), np.concatenate([pulled, gram(new)], 1)
        _, mixes = np.linalg.eigh(basis.T @ pulled)
        mixes = mixes[:, : -block.shape[1] - 1 : -1]
        step = new @ mixes[block.shape[1] :]
        block, pulled = basis @ mixes, pulled @ mixes
    return math.sqrt(max(square, 0.0))


@functools.partial(jax.jit, static_argnums=0)
def _gram(module: nn.Module, variables: Any, vectors: jax.Array) -> jax.Array:
    """Applies A^T A to each of the vectors, float32 ``[k, *shape]``."""
    # Scale the entries to about 1: next to a bias, those of a unit vector would lose digits.
    size = math.sqrt(vectors[0].size)

    def linear(x: jax.Array) -> jax.Array:
        outputs: Any = module.apply(variables, jnp.concatenate([size * x, jnp.zeros_like(x[:1])]))
        return (outputs[:-1] - outputs[-1:]) / size

    with jax.default_matmul_precision('highest'):
        outputs, pull_back = jax.vjp(linear, vectors)
        return pull_back(outputs)[0]


# --- circular operators ----------------------------------------------------------------------


def _circular_values(site: LayerSite, variables: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Exact singular values (of the convolution, of the whole layer), descending."""
    if not site.convolution:
        kernel = inner_variables(variables, site.path)['params']['kernel']
        _check_finite(site, kernel)
        values = np.linalg.svd(np.asarray(kernel, np.float32), compute_uv=False)
        return values, values
    kernel, scale = effective_kernel(site, variables), normalized_scale(site, variables)
    whole = scale * norm_scale(site, variables) * _channelwise_gain(site, variables)
    _check_finite(site, kernel, whole)
    values, whole_values = (singular_values(kernel, site.grid, factor, site.groups) for factor in (scale, whole))
    return values, whole_values


def _check_finite(site: LayerSite, *arrays: Any) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f'{site.name}: its kernel or statistics are not finite; expected a net that did not diverge')


def _channelwise_gain(site: LayerSite, variables: Any) -> np.ndarray:
    """Absolute frequency response of ConvNorm's channel-wise convolution, [Hf, Wf//2+1, cout]; 1 for other layers.

    After a stride s it is the same as one with taps s apart before the stride.
    """
    if not getattr(site.module, 'use_affine', False):
        return np.asarray(1, np.float32)
    taps = np.asarray(inner_variables(variables, site.path)['params']['affine_kernel'], np.float32)[..., 0, :]
    padded = np.zeros((*site.grid, taps.shape[-1]), np.float32)
    for tap in np.ndindex(*taps.shape[:-1]):
        padded[tuple(s * i % n for s, i, n in zip(site.strides, tap, site.grid))] += taps[tap]
    return np.abs(np.fft.rfftn(padded, axes=range(len(site.grid)))).astype(np.float32)


# --- the net ---------------------------------------------------------------------------------


def product_bound(model: nn.Module, operators: Sequence[LayerOperator]) -> float | None:
    r"""Product of the measured norms: an estimate of the net's Lipschitz constant in l2 at evaluation.

    .. math::
        \|f(x) - f(x')\|_2 \le L \|x - x'\|_2, \qquad L = \prod_\text{layers} \|A_l\|_2

    for normalized images x. If every norm were exact, L would be an upper bound, usually far from tight. A residual
    block contributes the norm of its branch plus that of its shortcut (1 for the identity). ReLU, shifted ReLU and
    max pools with disjoint windows contribute 1, a global average pool over n pixels 1/sqrt(n). The 3x3 max pool of
    stride 2 of the ImageNet stem contributes 2, because up to four windows share a pixel. For pixels in [0, 1],
    divide by the smallest standard deviation of the data's normalization.

    Args:
      model: the net.
      operators: its `layer_operators`.

    Returns:
      L; None for a net that is not in `convnorm_jax.models`, or that has a layer that is not linear.
    """
    norms = {o.name: o.layer_norm for o in operators if o.layer_norm is not None}
    if not isinstance(model, (*_CHAINS, *_POOLED_CHAINS, ResNet)) or len(norms) < len(operators):
        return None
    if isinstance(model, _CHAINS):
        return math.prod(norms.values())
    *layers, head = operators
    bound = norms[head.name] / math.sqrt(math.prod(layers[-1].output_shape[:-1]))
    if isinstance(model, _POOLED_CHAINS):
        return bound * math.prod(norms[o.name] for o in layers)
    bound *= 2 if model.stem == 'imagenet' else 1
    for block, members in itertools.groupby(layers, lambda o: o.name.rpartition('/')[0]):
        of_block = {o.name.rpartition('/')[2]: norms[o.name] for o in members}
        shortcut = of_block.pop('shortcut', 1.0) if block else 0.0
        bound *= math.prod(of_block.values()) + shortcut
    return bound
