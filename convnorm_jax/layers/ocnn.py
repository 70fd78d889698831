"""Orthogonal convolutions by a penalty on the kernels (OCNN, Wang et al., arXiv 1911.12207).

The penalty works for any net: `make_ocnn_penalty` finds the kernels by their paths. The penalties are Frobenius norms,
not squared, as in the published code.
"""

import collections
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from convnorm_jax.errors import UserError
from convnorm_jax.layers.geometry import Ints, ints_for_axes
from convnorm_jax.layers.orthogonal import as_matrix
from convnorm_jax.layers.spectral import is_pointwise

Lags = Literal['published', 'paper']
LAGS = ('published', 'paper')

# The kernels that `default_pattern` takes. ResNets with basic blocks, as published for ResNet-18 and -34: every block's
# first convolution and the shortcuts. VGG and SimpleCNN: all convolutions. The second SimpleCNN: all but the 5x5 stem.
# Nothing is published for the others: all convolutions of SequenceCNN, all but the stem of MobileNet.
_BASIC = r'(layer\d+_\d+/(conv1|shortcut)|(conv|depthwise|pointwise)\d+_\d+|conv[2-9])/(conv/)?kernel'
# ResNets with bottlenecks, as published for ResNet-50: all convolutions but the stem.
_BOTTLENECK = r'layer\d+_\d+/(conv[123]|shortcut)/(conv/)?kernel'

_MOST_LISTED = 8
_EXACT = jax.lax.Precision.HIGHEST


def deconvolution_penalty(kernel: jax.Array, strides: Ints = 1, lags: Lags = 'published', groups: int = 1) -> jax.Array:
    r"""Returns how far a convolution is from having orthonormal outputs.

    .. math::
        \sqrt{\sum_d \|C(d) - I(d)\|_F^2}, \qquad C(d)_{op} = \sum_{u, i} k_{io}(u + d)\, k_{ip}(u)

    where C(d) holds the correlations of two filters d pixels apart, and I(d) is the identity at one lag d and zero at
    the others.

    With lags='paper' the lags are all multiples of the stride at which two filters overlap, and the identity is at lag
    0. The penalty is then :math:`\|M M^T - I\|_F` divided by the square root of the number of output pixels, with M the
    matrix of the strided convolution on a torus of at least 2k - 1 pixels. lags='published' is what the authors' code
    computes for every kernel size, and what the published figures use: the lags -1, -1 + stride, ... up to 1, with the
    identity at the middle one, the later of two. With stride 1 these are -1, 0 and 1; with stride 2 they are -1 and 1,
    and the identity is at 1.

    Filters of different groups have no channel in common and no correlation, so only pairs within a group count.

    Source: Wang et al., `arXiv 1911.12207 <https://arxiv.org/abs/1911.12207>`__.

    Args:
      kernel: [kh, kw, cin / groups, cout], any float dtype, or with another number of spatial axes.
      strides: an int, or an int for each axis.
      lags: 'published' or 'paper'.
      groups: groups of channels.

    Returns:
      float32 scalar. The gradient is finite everywhere, and 0 where the penalty is 0.

    Raises:
      ValueError: unknown `lags`; strides that are not positive ints.
    """
    if lags not in LAGS:
        raise UserError(f'lags={lags!r}: expected one of {LAGS}')
    sizes = kernel.shape[:-2]
    kernel = kernel.astype(jnp.float32).reshape(*kernel.shape[:-1], groups, -1)
    axes = [_axis_lags(k, s, lags) for k, s in zip(sizes, ints_for_axes(strides, 'strides', len(sizes)))]
    centre = tuple(lag[len(lag) // 2] for lag in axes)
    # C(-d) is the transpose of C(d), so one of the two is enough.
    counts = collections.Counter(_half(lag) for lag in itertools.product(*axes) if lag != centre)
    energy = _energy(_correlation(kernel, _half(centre)) - jnp.eye(kernel.shape[-1]))
    for lag, count in counts.items():
        energy += count * _energy(_correlation(kernel, lag))
    return _root(energy)


def matrix_penalty(kernel: jax.Array, groups: int = 1) -> jax.Array:
    r"""Returns how far the matrix W of a kernel is from being orthogonal.

    .. math::
        \|W^T W - I\|_F \quad\text{or, if that matrix is smaller,}\quad \|W W^T - I\|_F

    This is the right condition for 1x1 kernels, and for strides not below the kernel's size. For a grouped convolution
    W has a block for each group.

    Args:
      kernel: [kh, kw, cin / groups, cout], any float dtype, or with another number of spatial axes.
      groups: groups of channels.

    Returns:
      float32 scalar. The gradient is finite everywhere, and 0 where the penalty is 0.
    """
    matrix = as_matrix(kernel)
    matrix = matrix.reshape(groups, -1, matrix.shape[1])
    _, cout, fan_in = matrix.shape
    gram = jnp.einsum('goi,gpi->gop' if cout < fan_in else 'goi,goj->gij', matrix, matrix, precision=_EXACT)
    return _root(_energy(gram - jnp.eye(gram.shape[-1])))


def default_pattern(params: Mapping[str, Any]) -> str:
    """Returns the pattern of the published choice of kernels, for `kernel_paths`.

    ResNet-18 and -34: the first 3x3 of every block and the 1x1 shortcuts. Bottleneck ResNets: every convolution but the
    stem. VGG and the small nets: all 3x3 kernels.
    """
    bottleneck = any(re.fullmatch(r'layer\d+_\d+/conv3/.*', path) for path in _kernels(params))
    return _BOTTLENECK if bottleneck else _BASIC


def kernel_paths(params: Mapping[str, Any], pattern: str | None = None) -> tuple[str, ...]:
    """Returns the paths of the convolution kernels that a pattern matches, sorted.

    Args:
      params: the net's parameters, or their shapes.
      pattern: regular expression for the whole path, with the names joined by '/', as in 'layer1_0/conv1/conv/kernel';
        None takes `default_pattern`. Only leaves named 'kernel' with one to three spatial axes are candidates.

    Raises:
      ValueError: the pattern matches no kernel, or is not a regular expression.
    """
    candidates = sorted(_kernels(params))
    pattern = default_pattern(params) if pattern is None else pattern
    try:
        found = tuple(path for path in candidates if re.fullmatch(pattern, path))
    except re.error as error:
        raise UserError(f'pattern={pattern!r}: expected a regular expression ({error})') from error
    if not found:
        more = ', ...' if len(candidates) > _MOST_LISTED else ''
        raise UserError(
            f'pattern={pattern!r}: matches none of the {len(candidates)} convolution kernels; expected to match '
            f'the whole of some of {", ".join(candidates[:_MOST_LISTED])}{more}'
        )
    return found


def convolution_strides(model: nn.Module, input_shape: Sequence[int], *inputs: Any) -> dict[str, tuple[int, ...]]:
    """Returns the strides of every convolution of a net, by the path of its kernel.

    The arguments are those of `convolution_geometry`.
    """
    return {path: strides for path, (strides, _) in convolution_geometry(model, input_shape, *inputs).items()}


def convolution_geometry(
    model: nn.Module, input_shape: Sequence[int], *inputs: Any
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Returns the strides and the groups of every convolution of a net, by the path of its kernel.

    The net is traced, not computed.

    Args:
      model: a Linen module that can be initialized with images and `inputs` only.
      input_shape: of an image, [H, W, C].
      *inputs: arrays, or their shapes, that the net takes after the images.
    """
    found = {}

    def record(call, args, kwargs, context):
        module = context.module
        if hasattr(module, 'kernel_size') and hasattr(module, 'strides'):
            settings = module.strides, getattr(module, 'feature_group_count', 1)
            found['/'.join((*module.path, 'kernel'))] = settings
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with nn.intercept_methods(record):
        variables = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), images, *inputs)
    # A block around a convolution has strides too, but no kernel.
    kernels = _kernels(variables['params'])
    return {
        path: (_strides(strides, path, kernels[path]), groups)
        for path, (strides, groups) in found.items()
        if path in kernels
    }


def make_ocnn_penalty(
    params: Mapping[str, Any],
    *,
    strides: Mapping[str, Ints],
    pattern: str | None = None,
    lags: Lags = 'published',
    groups: Mapping[str, int] | None = None,
) -> Callable[[Mapping[str, Any]], jax.Array]:
    """Returns the penalty of a net, the unweighted sum over the kernels that a pattern matches.

    1x1 kernels take `matrix_penalty`, larger ones `deconvolution_penalty`. The published training loss is mean
    cross-entropy + lambda * penalty; lambda is 1e-4 in the reported run and 1e-3 in the published config.

    Args:
      params: the net's parameters, or their shapes.
      strides: {path: an int or an int for each axis}, as `convolution_strides` returns, at least for the matched
        kernels above 1x1.
      pattern: see `kernel_paths`.
      lags: see `deconvolution_penalty`.
      groups: {path: groups of channels}; other kernels have one group.

    Returns:
      A pure function of the parameters that returns a float32 scalar.

    Raises:
      ValueError: a pattern that matches no kernel; missing strides; unknown `lags`.
    """
    if lags not in LAGS:
        raise UserError(f'lags={lags!r}: expected one of {LAGS}')
    kernels, groups = _kernels(params), groups or {}
    of_path: dict[str, tuple[int, ...] | None] = {}  # None takes `matrix_penalty`
    for path in kernel_paths(params, pattern):
        if is_pointwise(kernels[path]):
            of_path[path] = None
        elif path in strides:
            of_path[path] = _strides(strides[path], path, kernels[path])
        else:
            raise UserError(f'strides={sorted(strides)[:_MOST_LISTED]}: expected those of {path} among them')

    def penalty(params):
        kernels = _kernels(params)
        return sum(
            matrix_penalty(kernels[path], groups.get(path, 1))
            if s is None
            else deconvolution_penalty(kernels[path], s, lags, groups.get(path, 1))
            for path, s in of_path.items()
        )

    return penalty


def _strides(strides, path, kernel):
    return ints_for_axes(strides, f'strides of {path}', len(kernel.shape) - 2)


def _kernels(params):
    """The leaves named 'kernel' with one to three spatial axes, by their paths."""
    flat = traverse_util.flatten_dict(params)
    found = {'/'.join(path): leaf for path, leaf in flat.items() if path[-1] == 'kernel'}
    return {path: leaf for path, leaf in found.items() if len(leaf.shape) in (3, 4, 5)}


def _axis_lags(size, stride, lags):
    """The lags along an axis, ascending."""
    reach = 1 if lags == 'published' else (size - 1) // stride * stride
    return range(-reach, reach + 1, stride)


def _half(lag):
    """Whichever of the lag and its negative represents both."""
    return max(lag, tuple(-d for d in lag))


def _correlation(kernel, lag):
    """C(lag) of each group, [groups, cout, cout], of a kernel [..., cin, groups, cout]; see `deconvolution_penalty`."""
    ahead, behind = [], []
    for size, d in zip(kernel.shape, lag):
        overlap = max(size - abs(d), 0)
        ahead.append(slice(max(d, 0), max(d, 0) + overlap))
        behind.append(slice(max(-d, 0), max(-d, 0) + overlap))
    return jnp.einsum('...igo,...igp->gop', kernel[tuple(ahead)], kernel[tuple(behind)], precision=_EXACT)


def _energy(x):
    return jnp.square(x).sum()


def _root(energy):
    """The square root, with a gradient of 0 at zero."""
    dead = energy < np.finfo(np.float32).tiny
    return jnp.where(dead, 0.0, jnp.sqrt(jnp.where(dead, 1.0, energy)))
