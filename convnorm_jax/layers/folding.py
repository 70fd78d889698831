"""A trained net's ConvNorm layers, folded for inference: equal up to rounding, with fewer operations."""

import contextlib
import threading
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.errors import UserError
from convnorm_jax.layers import frequency
from convnorm_jax.layers.channelwise import over_channels
from convnorm_jax.layers.geometry import Geometry
from convnorm_jax.layers.method import choose_method
from convnorm_jax.layers.spectral import is_pointwise

# The collection that `ConvNorm` takes its folded values from, where a net's variables have one.
COLLECTION = 'folded'


def fold_for_inference(model, variables, images, *others, platform=None):
    """Variables with which a net's inference takes fewer operations; the net stays as it is.

    In every ConvNorm and ConvNormTranspose the running preconditioner goes into the kernel's filters, and BatchNorm's
    running statistics, scale and bias into the channel-wise convolution (or, without one, into the filters): a layer is
    then a transform, products over the channels, a transform back, the channel-wise convolution and a bias. Nothing of
    the kernel is computed at inference any more. By the method 'spatial' the preconditioner stays a factor of its own.

    Args:
      model: a Linen module that takes `images` and `train`, as the nets of `convnorm_jax.models`.
      variables: of the trained net.
      images: of the shape that it will be given, [B, H, W, C], an array or a `jax.ShapeDtypeStruct`.
      *others: what the net takes next to them, likewise: the labels of a generator, whose `images` are latents.
      platform: that the program will run on, 'cpu', 'cuda', 'rocm' or 'tpu'; None for the device at hand.

    Returns:
      The variables with one collection more, 'folded', for `model.apply(folded, images, train=False)`. About 1.5 values
      a grid point and pair of channels: 0.7 GB for ResNet-18 on 32x32 images. They do not follow
      the parameters: fold again after further training.

    Raises:
      ValueError: a net without ConvNorm; images of another size than those trained on; layers inside `nn.scan` or
        another lifted transformation that does not carry the collection.
    """
    variables = _unfolded(variables)
    with _asked_for(platform) as met:
        fold = lambda variables, *inputs: model.apply(variables, *inputs, train=False, mutable=[COLLECTION])[1]
        folded = jax.jit(fold)(variables, *_zeros(images, *others))
    if not met:
        raise UserError('fold_for_inference: there is no ConvNorm in this net, nothing to fold')
    missing = sorted('/'.join(path) for path in met if not _holds(folded.get(COLLECTION, {}), path))
    if missing:
        raise UserError(
            f'fold_for_inference: {len(missing)} of {len(met)} layers are inside a transformation that does not carry '
            f'the collection {COLLECTION!r}, the first is {missing[0]!r}; add it there, as in '
            f"nn.scan(..., variable_axes={{'params': 0, 'batch_stats': 0, {COLLECTION!r}: 0}})"
        )
    return {**variables, **folded}


def is_foldable(model, variables, images, *others) -> bool:
    """Whether there is a ConvNorm in a net; arguments: see `fold_for_inference`."""
    with _asked_for() as met:
        run = lambda variables, *inputs: model.apply(variables, *inputs, train=False)
        jax.eval_shape(run, _unfolded(variables), *_zeros(images, *others))
    return bool(met)


def without_originals(variables):
    """The variables of a folded net that its inference reads: none of what the folded values stand for."""
    folded = variables[COLLECTION]
    return {name: tree if name == COLLECTION else _needed(tree, folded) for name, tree in variables.items()}


def _needed(tree, folded):
    if not isinstance(tree, Mapping):
        return tree
    if not isinstance(folded.get('grid', {}), Mapping):  # of a layer; a module may have that name, too
        return {}
    return {name: _needed(part, folded.get(name, {})) for name, part in tree.items()}


def _unfolded(variables):
    return {name: tree for name, tree in variables.items() if name != COLLECTION}


def _zeros(*inputs):
    return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), inputs)


class _Asked(threading.local):
    layers = None  # the paths of the layers that were met, while a net is folded
    platform = None  # that it is folded for


_ASKED = _Asked()


@contextlib.contextmanager
def _asked_for(platform=None):
    _ASKED.layers, _ASKED.platform = set(), platform
    try:
        with nn.intercept_methods(_note):
            yield _ASKED.layers
    finally:
        _ASKED.layers = _ASKED.platform = None


def _note(call, arguments, settings, context):
    if hasattr(context.module, '_fold') and context.method_name == '__call__':
        _ASKED.layers.add(context.module.path)
    return call(*arguments, **settings)


def _holds(tree, path):
    for name in path:
        tree = tree.get(name, {})
    return 'bias' in tree


def is_asked_for() -> bool:
    """Whether a net is being folded in this thread: nothing else writes folded values."""
    return _ASKED.layers is not None


def method(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> str:
    """The method to fold for: that of the platform asked for, or of the device at hand."""
    plane = geometry.rank == 2 and (_ASKED.platform or jax.default_backend()) == 'cpu'
    return choose_method(geometry, x.shape[0], *kernel.shape[2:]) if plane else 'spatial'


def folded_values(kernel, v, params, statistics, epsilon, geometry, method):
    """What one layer keeps for inference.

    Args:
      kernel: [kh, kw, cin, cout]. v: its preconditioner, [Hf, Wf, cout], or [1, 1, cout] of a 1x1 kernel.
      params, statistics: of the layer; 'affine_kernel', 'affine_bias' and 'batch_norm' where it has them.
      epsilon: BatchNorm's.
      geometry, method: see `geometry.Geometry` and `layers.method`.

    Returns:
      A dict of float32 arrays: 'grid' [Hf, Wf], zeros, of which the shape counts;
      'filters' [R, cin, cout] (method 'frequency'), or 'kernel' (and 'v', unless it is 1x1);
      'affine_kernel' [kh, kw, cout] where there is one, unless it is 1x1; 'bias' [cout].
    """
    scale, shift = jnp.ones(kernel.shape[-1:]), jnp.zeros(kernel.shape[-1:])
    if 'batch_norm' in statistics:
        scale, shift = _batch_norm_factors(statistics['batch_norm'], params.get('batch_norm', {}), epsilon)
    folded, pointwise = {'grid': jnp.zeros(geometry.grid, bool)}, is_pointwise(kernel)
    if 'affine_kernel' in params:
        affine = params['affine_kernel'][..., 0, :]
        affine = affine * over_channels(scale, affine)
        shift = params['affine_bias'] * scale + shift
        if pointwise:
            v = v * affine
        else:
            folded['affine_kernel'] = affine
    else:
        v = v * over_channels(scale, v)
    folded['bias'] = shift
    if pointwise:
        return folded | {'kernel': kernel * v[..., None, :]}
    if method != 'frequency':
        return folded | {'kernel': kernel, 'v': v}
    return folded | {'filters': frequency.kernel_filters(kernel, geometry) * frequency.on_rows(v, geometry)}


def _batch_norm_factors(statistics, params, epsilon):
    """BatchNorm at inference, x * scale + shift: (scale, shift)."""
    scale = jax.lax.rsqrt(statistics['var'] + epsilon) * params.get('scale', 1.0)
    return scale, params.get('bias', 0.0) - statistics['mean'] * scale
