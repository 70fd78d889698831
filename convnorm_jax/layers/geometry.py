"""Where a convolution's pixels and taps lie, in 1, 2 or 3 spatial dimensions, and the arguments that say so."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from convnorm_jax.errors import UserError

CIRCULAR = 'CIRCULAR'

_EXPECTED = {
    1: '[batch, width, channels]',
    2: '[batch, height, width, channels]',
    3: '[batch, depth, height, width, channels]',
}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where a convolution's pixels and taps lie on the grid of its full convolution, axis by axis.

    full[n] is the sum of x[i] * kernel[t] over all pixels i and taps t with inputs[i] + taps[t] = n, modulo the grid if
    it is circular.

    Attributes:
      grid: size of the full convolution, an int for each spatial axis.
      inputs, taps: for each axis a tuple of int: the place of each pixel, and of each tap.
      kept: for each axis the places of the full convolution that the layer keeps.
      groups: of channels, each with filters of its own.
      circular: the image is periodic; else it is zero outside.
    """

    grid: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    taps: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    groups: int = 1
    circular: bool = False

    @property
    def rank(self) -> int:
        """How many spatial axes there are."""
        return len(self.grid)

    @property
    def spans(self) -> tuple[int, ...]:
        """Pixels from a kernel's first tap to its last, on each axis: its size, dilated."""
        return tuple(max(taps) - min(taps) + 1 for taps in self.taps)

    @property
    def dilation(self) -> tuple[int, ...]:
        """From one tap to the next, on each axis."""
        return tuple(_step(taps) for taps in self.taps)

    @property
    def spread(self) -> tuple[int, ...]:
        """From one pixel to the next on the grid, on each axis: the strides of a transposed convolution."""
        return tuple(_step(places) for places in self.inputs)

    @property
    def mirrored(self) -> tuple[int, ...]:
        """Axes whose taps run forwards, as a convolution's do; a cross-correlation's run backwards."""
        return tuple(axis for axis, taps in enumerate(self.taps) if len(taps) > 1 and taps[0] < taps[-1])

    @property
    def plain(self) -> bool:
        """One group, no dilation, not circular."""
        return self.groups == 1 and not self.circular and set(self.dilation) == {1}

    def flattened(self) -> 'Geometry':
        """In 1 dimension: the same on an image with one row. Others are returned as they are."""
        if self.rank != 1:
            return self
        places = {name: ((0,), *getattr(self, name)) for name in ('inputs', 'taps', 'kept')}
        return dataclasses.replace(self, grid=(1, *self.grid), **places)


def _step(places):
    return abs(places[1] - places[0]) if len(places) > 1 else 1


def of_convolution(
    image_size: Sequence[int],
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> Geometry:
    """Of a convolution in the sense of `jax.lax.conv`, a cross-correlation.

    Args:
      padding: as `canonical_padding` returns it.
      The others: ints for each axis; `groups` as `feature_group_count`.
    """
    dilation = dilation or (1,) * len(image_size)
    spans = dilated_size(kernel_size, dilation)
    circular = padding == CIRCULAR
    if circular:  # as flax pads: (K-1)//2 before
        grid = tuple(image_size)
        kept = tuple(
            tuple((place + k // 2) % n for place in range(0, n, s)) for n, k, s in zip(image_size, spans, strides)
        )
    else:
        grid = tuple(n + k - 1 for n, k in zip(image_size, spans))
        kept = tuple(
            tuple(range(k - 1 - before, n - (k - 1 - after), s))
            for n, k, (before, after), s in zip(grid, spans, padding, strides)
        )
    return Geometry(
        grid,
        inputs=tuple(tuple(range(n)) for n in image_size),
        taps=tuple(tuple(range(k - 1, -1, -d)) for k, d in zip(spans, dilation)),  # mirrored
        kept=kept,
        groups=groups,
        circular=circular,
    )


def of_transposed_convolution(
    image_size: Sequence[int],
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> Geometry:
    """Of a transposed convolution, `padding` cropped from its full size (n-1)*s + K, as PyTorch's."""
    dilation = dilation or (1,) * len(image_size)
    spans = dilated_size(kernel_size, dilation)
    grid = transposed_grid_size(image_size, spans, strides)
    return Geometry(
        grid,
        inputs=tuple(tuple(range(0, n * s, s)) for n, s in zip(image_size, strides)),
        taps=tuple(tuple(range(0, k, d)) for k, d in zip(spans, dilation)),
        kept=tuple(tuple(range(before, n - after)) for n, (before, after) in zip(grid, padding)),
        groups=groups,
    )


def dilated_size(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """(k - 1) * d + 1 on each axis."""
    return tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation))


def transposed_grid_size(image_size, kernel_size, strides):
    """Size of the full transposed convolution: (n - 1) * stride + kernel on each axis."""
    return tuple((n - 1) * s + k for n, k, s in zip(image_size, kernel_size, strides))


def canonical_padding(padding, image_size, kernel_size, strides):
    """Padding as pairs, ((top, bottom), (left, right)) in 2 dimensions, or 'CIRCULAR'.

    Args:
      padding: 'SAME' or 'VALID' (as in `jax.lax`), 'CIRCULAR', one int for all sides, or an int or a pair an axis.
      image_size, strides: ints for each axis. kernel_size: the same, dilated.

    Raises:
      ValueError: another form, or a padding outside 0 ... k-1, which ConvNorm's crop of
        the full convolution cannot give.
    """
    if isinstance(padding, str) and padding == CIRCULAR:
        return CIRCULAR
    if isinstance(padding, str) and padding in ('SAME', 'VALID'):
        pairs = jax.lax.padtype_to_pads(image_size, kernel_size, strides, padding)
    else:
        pairs = padding_pairs(padding, len(image_size), ('SAME', 'VALID', CIRCULAR))
    for pair, n, k in zip(pairs, image_size, kernel_size):
        if not all(0 <= p <= k - 1 for p in pair):
            raise UserError(
                f'padding={padding!r} with kernel_size={tuple(kernel_size)}: '
                'expected between 0 and kernel_size - 1 on each side'
            )
        if n + sum(pair) < k:
            raise UserError(
                f'images of {by_x(image_size)} with padding={padding!r}: '
                f'smaller than kernel_size={tuple(kernel_size)}, nothing would be left'
            )
    return tuple((int(a), int(b)) for a, b in pairs)


def canonical_transposed_padding(padding, image_size, kernel_size, strides):
    """Padding as pairs for each axis: what is cropped from the full transposed convolution.

    Args:
      padding: an int, or an int or a pair for each axis.
      image_size, kernel_size, strides: ints for each axis.

    Raises:
      ValueError: another form, a padding outside 0 ... k-1, or nothing left.
    """
    pairs = padding_pairs(padding, len(image_size))
    if not all(0 <= p <= k - 1 for pair, k in zip(pairs, kernel_size) for p in pair):
        raise UserError(
            f'padding={padding!r} with kernel_size={tuple(kernel_size)}: '
            'expected between 0 and kernel_size - 1 on each side'
        )
    full = transposed_grid_size(image_size, kernel_size, strides)
    if any(n - sum(pair) < 1 for n, pair in zip(full, pairs)):
        raise UserError(
            f'padding={padding!r} of images of {by_x(image_size)}: '
            f'the full transposed convolution is {by_x(full)}, nothing would be left'
        )
    return tuple((int(a), int(b)) for a, b in pairs)


def by_x(size):
    """A size for a message: '32x32'."""
    return 'x'.join(map(str, size))


def is_int(value):
    """Whether it is an int, Python's or NumPy's; bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _axes(rank):
    return {1: 'the axis', 2: 'each of the two axes', 3: 'each of the three axes'}[rank]


def padding_pairs(padding, rank=2, names=()):
    """Padding as a pair for each of `rank` axes, from an int, or an int or a pair for each axis.

    Raises:
      ValueError: anything else; `names` are those that it could also have had.
    """
    sides = [padding] * rank if is_int(padding) else padding
    if isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == rank:
        pairs = [(p, p) if is_int(p) else p for p in sides]
        if all(isinstance(p, Sequence) and len(p) == 2 and all(map(is_int, p)) for p in pairs):
            return pairs
    others = ''.join(f'{name!r}, ' for name in names)
    raise UserError(f'padding={padding!r}: expected {others}an int or a pair for {_axes(rank)}')


def ints_for_axes(value, name, rank=2):
    """A kernel size, strides, a dilation or an image size as `rank` positive ints, from one int or `rank`.

    None is ones, but for the size of a kernel or an image.

    Raises:
      ValueError: anything else.
    """
    if value is None and name not in ('kernel_size', 'image_size'):
        value = 1
    ints = (value,) * rank if is_int(value) else value
    if not isinstance(ints, Sequence) or len(ints) != rank or not all(is_int(v) and v >= 1 for v in ints):
        count = {1: 'a positive int', 2: 'a positive int or two of them', 3: 'a positive int or three of them'}[rank]
        raise UserError(f'{name}={value!r}: expected {count}')
    return tuple(int(v) for v in ints)


def spatial_axes(kernel_size) -> int:
    """How many spatial axes a kernel size is of; 2 for one int, and for what is no size at all."""
    count = len(kernel_size) if isinstance(kernel_size, Sequence) else 2
    return count if count in (1, 3) else 2


def check_shape(shape, kernel_size):
    """Raises ValueError unless `shape` is one of a batch of images with an axis for each of `kernel_size`."""
    if len(shape) != len(kernel_size) + 2:
        raise UserError(
            f'x.shape={tuple(shape)}: expected {_EXPECTED[len(kernel_size)]} with kernel_size={tuple(kernel_size)}'
        )


def channels_in_a_group(groups, features_in, features):
    """Input channels of each group of a convolution.

    Raises:
      ValueError: a number of groups that does not divide the channels of both sides.
    """
    if not is_int(features_in) or features_in < 1:
        raise UserError(f'{features_in!r} input channels: expected a positive int')
    if not is_int(groups) or groups < 1 or features_in % groups or features % groups:
        raise UserError(
            f'feature_group_count={groups!r} with {features_in} channels and features={features}: '
            'expected a positive int that divides both'
        )
    return features_in // groups


def pair_of_ints(value, name):
    """`ints_for_axes` of 2 axes."""
    return ints_for_axes(value, name, 2)
