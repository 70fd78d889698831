"""The geometry of Equinox's convolutions in the terms of a ConvNorm."""

from collections.abc import Sequence

import equinox as eqx

from convnorm_jax import conversion
from convnorm_jax.conversion import Refused
from convnorm_jax.layers import geometry


def geometry_of(conv: eqx.nn.Conv | eqx.nn.ConvTranspose, transposed: bool, sizes: Sequence[tuple[int, ...]]) -> dict:
    """strides, padding, kernel_dilation and feature_group_count of `core.Settings`, for images of these sizes.

    Raises:
      Refused: there are none.
    """
    rank = conv.num_spatial_dims
    if not 1 <= rank <= 3:
        raise Refused(f'{rank} spatial axes: ConvNorm has 1 to 3')
    if conv.weight.ndim != rank + 2:
        raise Refused(f'its weight has the shape {conv.weight.shape}: layers stacked by a transformation')
    spans = geometry.dilated_size(conv.kernel_size, conv.dilation)
    given = {'strides': conv.stride, 'kernel_dilation': conv.dilation, 'feature_group_count': conv.groups}
    if transposed:
        if conv.padding_mode != 'ZEROS':
            raise Refused(f'padding_mode={conv.padding_mode!r} of a transposed convolution')
        return {**given, 'padding': conversion.transposed_crop(spans, _padding_transposed(conv, spans))}
    return {**given, 'padding': _padding(conv, spans, sizes)}


def _padding(conv, spans, sizes):
    """Of the ConvNorm: for `jax.lax`, or 'CIRCULAR'."""
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
    """What `eqx.nn.ConvTranspose` pads its dilated input with (Dumoulin and Visin, arXiv 1603.07285)."""
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
