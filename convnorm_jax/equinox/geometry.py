"""The geometry of Equinox's convolutions in the terms of a ConvNorm."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx

from convnorm_jax import conversion
from convnorm_jax.conversion import Refused
from convnorm_jax.layers import geometry


def geometry_of(conv: eqx.nn.Conv | eqx.nn.ConvTranspose, sizes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Returns strides, padding, kernel_dilation and feature_group_count of the ConvNorm for a convolution.

    Args:
      conv: the convolution.
      sizes: of the images that it is called on.

    Raises:
      Refused: no ConvNorm has the geometry of this convolution.
    """
    rank = conv.num_spatial_dims
    if not 1 <= rank <= 3:
        raise Refused(f'{rank} spatial axes: ConvNorm has 1 to 3')
    if conv.weight.ndim != rank + 2:
        raise Refused(f'its weight has the shape {conv.weight.shape}: layers stacked by a transformation')
    spans = geometry.dilated_size(conv.kernel_size, conv.dilation)
    given = {'strides': conv.stride, 'kernel_dilation': conv.dilation, 'feature_group_count': conv.groups}
    if isinstance(conv, eqx.nn.ConvTranspose):
        if conv.padding_mode != 'ZEROS':
            raise Refused(f'padding_mode={conv.padding_mode!r} of a transposed convolution')
        return {**given, 'padding': conversion.transposed_crop(spans, _padding_transposed(conv, spans))}
    return {**given, 'padding': _padding(conv, spans, sizes)}


def _padding(conv, spans, sizes):
    """Returns the padding of the ConvNorm: one of `jax.lax`, or 'CIRCULAR'."""
    if conv.padding in ('SAME', 'VALID') and conv.padding_mode == 'ZEROS':
        return conv.padding
    if isinstance(conv.padding, str):
        pairs = conversion.named_padding(conv.padding, sizes, spans, conv.stride)
    else:
        pairs = [tuple(pair) for pair in conv.padding]
    if conv.padding_mode == 'ZEROS' or not any(map(any, pairs)):
        conversion.check_padding(pairs, spans)
        return pairs
    if conv.padding_mode != 'CIRCULAR':
        raise Refused(f'padding_mode={conv.padding_mode!r}')
    expected = [((k - 1) // 2, k // 2) for k in spans]
    if pairs != expected:
        raise Refused(f'circular padding of {pairs}; that of a ConvNorm is {expected}')
    return 'CIRCULAR'


def _padding_transposed(conv, spans):
    """Returns the padding of the dilated input in `eqx.nn.ConvTranspose` (Dumoulin and Visin, arXiv 1603.07285)."""
    if conv.padding == 'VALID':
        pairs, extra = [(0, 0)] * len(spans), conv.output_padding
    elif isinstance(conv.padding, str):
        total = [k - s + a for k, s, a in zip(spans, conv.stride, conv.output_padding)]
        extra = [max(-t, 0) for t in total]
        lower = int(conv.padding == 'SAME_LOWER')
        before = [(max(t, 0) + lower) // 2 for t in total]
        pairs = [(b, max(t, 0) - b) for b, t in zip(before, total)]
    else:
        pairs, extra = conv.padding, conv.output_padding
    return [(k - 1 - p, k - 1 - q + a) for k, (p, q), a in zip(spans, pairs, extra)]
