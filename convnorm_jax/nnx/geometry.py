"""The geometry of Flax NNX's convolutions in the terms of a ConvNorm."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from convnorm_jax import conversion
from convnorm_jax.conversion import Refused
from convnorm_jax.layers import geometry


def geometry_of(conv: nnx.Conv | nnx.ConvTranspose, sizes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Returns strides, padding, kernel_dilation and feature_group_count of the ConvNorm for a convolution.

    Args:
      conv: the convolution.
      sizes: of the images that it is called on.

    Raises:
      Refused: no ConvNorm has the geometry of this convolution.
    """
    rank = len(conv.kernel_size)
    if not 1 <= rank <= 3:
        raise Refused(f'{rank} spatial axes: ConvNorm has 1 to 3')
    if conv.kernel[...].ndim != rank + 2:
        raise Refused(f'its kernel has the shape {conv.kernel.shape}: layers stacked by a transformation')
    if conv.mask is not None:
        raise Refused('a mask on its kernel')
    if getattr(conv, 'preferred_element_type', None) is not None:
        raise Refused('preferred_element_type')
    strides = geometry.ints_for_axes(conv.strides, 'strides', rank)
    dilation = geometry.ints_for_axes(conv.kernel_dilation, 'kernel_dilation', rank)
    spans = geometry.dilated_size(conv.kernel_size, dilation)
    given: dict[str, Any] = {'strides': strides, 'kernel_dilation': dilation}
    padding: Any = conv.padding
    transposed = isinstance(conv, nnx.ConvTranspose)
    if padding == 'CAUSAL':
        raise Refused(conversion.CAUSAL)
    if padding == 'REFLECT' or (transposed and padding == 'CIRCULAR'):
        raise Refused(f'padding={padding!r}' + (' of a transposed convolution' if transposed else ''))
    if isinstance(conv, nnx.ConvTranspose):
        return {**given, 'padding': _crop(padding, conv.kernel_size, spans, strides, dilation)}
    if set(geometry.ints_for_axes(conv.input_dilation, 'input_dilation', rank)) != {1}:
        raise Refused(f'input_dilation={conv.input_dilation}')
    if conv.conv_general_dilated is not lax.conv_general_dilated:
        raise Refused('a conv_general_dilated of its own')
    if isinstance(padding, str) and padding not in ('SAME', 'VALID', 'CIRCULAR'):
        padding = conversion.named_padding(padding, sizes, spans, strides)
    if not isinstance(padding, str):
        padding = [tuple(pair) for pair in geometry.padding_pairs(padding, rank)]
        conversion.check_padding(padding, spans)
    return {**given, 'padding': padding, 'feature_group_count': conv.feature_group_count}


def _crop(padding, kernel_size, spans, strides, dilation):
    """What `jax.lax.conv_transpose` crops from the full transposed convolution."""
    if not isinstance(padding, str):
        return conversion.transposed_crop(spans, geometry.padding_pairs(padding, len(spans)))
    # Read off a trace, because JAX does not export the function that computes this padding.
    x, kernel = (jax.ShapeDtypeStruct(shape, 'float32') for shape in ((1, *spans, 1), (*kernel_size, 1, 1)))
    traced = jax.make_jaxpr(lambda x, k: lax.conv_transpose(x, k, strides, padding, rhs_dilation=dilation))(x, kernel)
    found = next(e for e in traced.jaxpr.eqns if e.primitive.name == 'conv_general_dilated')
    return conversion.transposed_crop(spans, found.params['padding'])
