"""Orthogonal convolutions by a penalty on the kernels (OCNN, Wang et al., arXiv 1911.12207).

A regulariser for any net: `make_ocnn_penalty` finds the kernels by their paths. The
penalties are Frobenius norms, not squared, as the published code has them.
"""

import collections
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from convnorm_jax.errors import UserError
from convnorm_jax.layers.geometry import ints_for_axes
from convnorm_jax.layers.orthogonal import as_matrix
from convnorm_jax.layers.spectral import is_pointwise

LAGS = ('published', 'paper')

# Which kernels `default_pattern` takes. With basic blocks, as published for ResNet-18 and -34:
# every block's first convolution and the shortcuts. VGG, SimpleCNN: all convolutions. The
# second SimpleCNN: all but the 5x5 of its stem. Nothing is published of the others: all convolutions of
# SequenceCNN, all but the stem of MobileNet.
_BASIC = r'(layer\d+_\d+/(conv1|shortcut)|(conv|depthwise|pointwise)\d+_\d+|conv[2-9])/(conv/)?kernel'
# With bottlenecks, as published for ResNet-50: all convolutions but the stem.
_BOTTLENECK = r'layer\d+_\d+/(conv[123]|shortcut)/(conv/)?kernel'

_MOST_LISTED = 8
_EXACT = jax.lax.Precision.HIGHEST


def deconvolution_penalty(kernel, strides=1, lags='published', groups=1):
    """How far a convolution is from having orthonormal outputs.

    With C(d)[o, p] = sum over u, i of kernel[u + d, i, o] kernel[u, i, p], the correlation of
    two filters a lag of d pixels apart, it is sqrt(sum over lags of |C(d) - I(d)|^2), where
    I(d) is the identity at one lag and zero at the others.

    With lags='paper' these are all multiples of the stride at which two filters overlap, and
    the identity stands at lag 0. It is then |M M^T - I| / sqrt(number of output pixels), with M
    the matrix of the strided convolution on a torus of at least 2k - 1 pixels. 'published' is what
    the authors' code computes for every kernel size, and what published figures rest on:
    pixels -1, -1 + stride ... up to 1, the identity at the middle one of them, the later of
    two: with stride 1 the lags -1, 0 and 1, with stride 2 the lags -1 and 1, the identity at 1.

    Filters of different groups have no channel in common, and no correlation: the sum is over pairs of a group.

    Args:
      kernel: [kh, kw, cin / groups, cout], any float dtype; or any other number of spatial axes.
      strides: int or (sh, sw).
      lags: one of `LAGS`.
      groups: of channels.

    Returns:
      float32 scalar. Its gradient is finite everywhere, and 0 where the penalty is.

    Raises:
      ValueError: an unknown `lags`, strides that are none.
    """
    if lags not in LAGS:
        raise UserError(f'lags={lags!r}: expected one of {LAGS}')
    sizes = kernel.shape[:-2]
    kernel = kernel.astype(jnp.float32).reshape(*kernel.shape[:-1], groups, -1)
    axes = [_axis_lags(k, s, lags) for k, s in zip(sizes, ints_for_axes(strides, 'strides', len(sizes)))]
    centre = tuple(lag[len(lag) // 2] for lag in axes)
    # C(-d) is the transpose of C(d): one of the two is enough.
    counts = collections.Counter(_half(lag) for lag in itertools.product(*axes) if lag != centre)
    energy = _energy(_correlation(kernel, _half(centre)) - jnp.eye(kernel.shape[-1]))
    for lag, count in counts.items():
        energy += count * _energy(_correlation(kernel, lag))
    return _root(energy)


def matrix_penalty(kernel, groups=1):
    """|W^T W - I|, or |W W^T - I| if that matrix is the smaller, W the kernel as a matrix.

    The right condition for 1x1 kernels, and for strides not below the kernel's size. Of a grouped convolution W is
    the matrix with a block for each group.

    Args:
      kernel: [kh, kw, cin / groups, cout], any float dtype; or any other number of spatial axes.
      groups: of channels.

    Returns:
      float32 scalar. Its gradient is finite everywhere, and 0 where the penalty is.
    """
    matrix = as_matrix(kernel)
    matrix = matrix.reshape(groups, -1, matrix.shape[1])
    _, cout, fan_in = matrix.shape
    gram = jnp.einsum('goi,gpi->gop' if cout < fan_in else 'goi,goj->gij', matrix, matrix, precision=_EXACT)
    return _root(_energy(gram - jnp.eye(gram.shape[-1])))


def default_pattern(params):
    """The pattern of the published choice of kernels; see `_BASIC` and `_BOTTLENECK`.

    ResNet-18 and -34: the first 3x3 of every block and the 1x1 shortcuts. Bottleneck ResNets:
    every convolution but the stem. VGG and the small nets: all 3x3 kernels.
    """
    bottleneck = any(re.fullmatch(r'layer\d+_\d+/conv3/.*', path) for path in _kernels(params))
    return _BOTTLENECK if bottleneck else _BASIC


def kernel_paths(params, pattern=None):
    """Paths of the convolution kernels that a pattern matches, sorted.

    Args:
      params: the net's parameters, or their shapes.
      pattern: regular expression for the whole path, the names joined by '/', as in
        'layer1_0/conv1/conv/kernel'; None is `default_pattern`. Only leaves named 'kernel' with
        one to three spatial axes are candidates.

    Raises:
      ValueError: it matches none, or is no regular expression.
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


def convolution_strides(model, input_shape, *inputs):
    """{path of its kernel: strides} of every convolution of a net; Args as `convolution_geometry`."""
    return {path: strides for path, (strides, _) in convolution_geometry(model, input_shape, *inputs).items()}


def convolution_geometry(model, input_shape, *inputs):
    """{path of its kernel: (strides, groups of channels)} of every convolution of a net, found by tracing it.

    Args:
      model: a Linen module that can be initialized with images and `inputs` only.
      input_shape: [H, W, C].
      inputs: arrays, or their shapes, that the net takes behind the images.
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
    # A block around a convolution has its strides too, but no kernel.
    kernels = _kernels(variables['params'])
    return {
        path: (_strides(strides, path, kernels[path]), groups)
        for path, (strides, groups) in found.items()
        if path in kernels
    }


def make_ocnn_penalty(params, *, strides, pattern=None, lags='published', groups=None):
    """The penalty of a net: the sum, without weights, over the kernels that a pattern matches.

    1x1 kernels get `matrix_penalty`, larger ones `deconvolution_penalty`. The published
    training loss is mean cross-entropy + lambda * penalty; lambda was 1e-4 in the reported
    run, 1e-3 in the published config.

    Args:
      params: the net's parameters, or their shapes.
      strides: {path: int or (sh, sw)}, as `convolution_strides` gives; at least for the
        matched kernels above 1x1.
      pattern: see `kernel_paths`.
      lags: see `deconvolution_penalty`.
      groups: {path: groups of channels}; kernels that are not in it have one.

    Returns:
      A pure function params -> float32 scalar.

    Raises:
      ValueError: a pattern that matches none, strides that are missing, unknown `lags`.
    """
    if lags not in LAGS:
        raise UserError(f'lags={lags!r}: expected one of {LAGS}')
    kernels, groups = _kernels(params), groups or {}
    of_path = {}
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
    """{path: leaf} of the leaves named 'kernel' with one to three spatial axes."""
    flat = traverse_util.flatten_dict(params)
    found = {'/'.join(path): leaf for path, leaf in flat.items() if path[-1] == 'kernel'}
    return {path: leaf for path, leaf in found.items() if len(leaf.shape) in (3, 4, 5)}


def _axis_lags(size, stride, lags):
    """Lags along an axis, rising."""
    reach = 1 if lags == 'published' else (size - 1) // stride * stride
    return range(-reach, reach + 1, stride)


def _half(lag):
    """The lag or its negative, the same for both."""
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
    """Square root whose gradient at zero is 0."""
    dead = energy < np.finfo(np.float32).tiny
    return jnp.where(dead, 0.0, jnp.sqrt(jnp.where(dead, 1.0, energy)))
