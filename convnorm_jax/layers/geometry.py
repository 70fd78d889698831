"""The positions of a convolution's pixels and taps, in 1, 2 or 3 spatial dimensions, and checks of its arguments."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeGuard

import jax
import numpy as np

from convnorm_jax.errors import UserError

# One int for all spatial axes, or an int for each.
Ints = int | Sequence[int]
# A name, one int for all sides, or an int or a pair for each spatial axis.
Padding = str | int | Sequence[int | Sequence[int]]
# A pair for each spatial axis.
Pairs = tuple[tuple[int, int], ...]

CIRCULAR: Literal['CIRCULAR'] = 'CIRCULAR'

_EXPECTED = {
    1: '[batch, width, channels]',
    2: '[batch, height, width, channels]',
    3: '[batch, depth, height, width, channels]',
}


@dataclasses.dataclass(frozen=True)
class Geometry:
    r"""The positions of a convolution's pixels and taps on the grid of its full convolution, axis by axis.

    The full convolution at position n is the sum over the pixels i and taps t that meet there:

    .. math::
        full[n] = \sum_{inputs[i] + taps[t] = n} x[i]\, kernel[t],

    modulo the size of the grid if the convolution is circular.

    Attributes:
      grid: size of the full convolution, an int for each spatial axis.
      inputs: for each axis a tuple of int, the position of each pixel.
      taps: for each axis a tuple of int, the position of each tap.
      kept: for each axis the positions of the full convolution that the layer keeps.
      groups: groups of channels, each with filters of its own.
      circular: whether the image is periodic; otherwise it is zero outside.
    """

    grid: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    taps: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    groups: int = 1
    circular: bool = False

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.grid)

    @property
    def spans(self) -> tuple[int, ...]:
        """The size of the dilated kernel: pixels from its first tap to its last, on each axis."""
        return tuple(max(taps) - min(taps) + 1 for taps in self.taps)

    @property
    def dilation(self) -> tuple[int, ...]:
        """The distance from one tap to the next, on each axis."""
        return tuple(_step(taps) for taps in self.taps)

    @property
    def spread(self) -> tuple[int, ...]:
        """The distance from one pixel to the next on the grid, on each axis: a transposed convolution's strides."""
        return tuple(_step(places) for places in self.inputs)

    @property
    def mirrored(self) -> tuple[int, ...]:
        """The axes whose taps run forwards, as in a convolution; in a cross-correlation they run backwards."""
        return tuple(axis for axis, taps in enumerate(self.taps) if len(taps) > 1 and taps[0] < taps[-1])

    @property
    def plain(self) -> bool:
        """Whether there is one group, no dilation and no circular padding."""
        return self.groups == 1 and not self.circular and set(self.dilation) == {1}

    def with_one_row(self) -> 'Geometry':
        """Returns a geometry in 1 dimension as one of images with a single row, another geometry as it is."""
        if self.rank != 1:
            return self
        inputs, taps, kept = (((0,), *places) for places in (self.inputs, self.taps, self.kept))
        return dataclasses.replace(self, grid=(1, *self.grid), inputs=inputs, taps=taps, kept=kept)


def _step(places):
    return abs(places[1] - places[0]) if len(places) > 1 else 1


def of_convolution(
    image_size: Sequence[int],
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: Literal['CIRCULAR'] | Pairs,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> Geometry:
    """Returns the geometry of a convolution in the sense of `jax.lax.conv`, a cross-correlation.

    Args:
      image_size, kernel_size, strides: an int for each axis.
      padding: as `canonical_padding` returns it.
      dilation: an int for each axis, or None for 1.
      groups: groups of channels, flax's `feature_group_count`.
    """
    dilation = dilation or (1,) * len(image_size)
    spans = dilated_size(kernel_size, dilation)
    if padding == CIRCULAR:  # as flax pads: (K-1)//2 before
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
        circular=padding == CIRCULAR,
    )


def of_transposed_convolution(
    image_size: Sequence[int],
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: Pairs,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> Geometry:
    """Returns the geometry of a transposed convolution, as PyTorch defines it.

    Args:
      image_size, kernel_size, strides: an int for each axis.
      padding: what is cropped from the full size (n-1)*s + K, as `canonical_transposed_padding` returns it.
      dilation: an int for each axis, or None for 1.
      groups: groups of channels.
    """
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
    """Returns the size of a dilated kernel, (k - 1) * d + 1 on each axis."""
    return tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation))


def transposed_grid_size(
    image_size: Sequence[int], kernel_size: Sequence[int], strides: Sequence[int]
) -> tuple[int, ...]:
    """Returns the size of the full transposed convolution, (n - 1) * stride + kernel on each axis."""
    return tuple((n - 1) * s + k for n, k, s in zip(image_size, kernel_size, strides))


def canonical_padding(
    padding: Padding, image_size: Sequence[int], kernel_size: Sequence[int], strides: Sequence[int]
) -> Literal['CIRCULAR'] | Pairs:
    """Returns a padding as a pair for each axis, ((top, bottom), (left, right)) in 2 dimensions, or 'CIRCULAR'.

    Args:
      padding: 'SAME' or 'VALID' (as in `jax.lax`), 'CIRCULAR', one int for all sides, or an int or a pair for each
        axis.
      image_size, strides: an int for each axis.
      kernel_size: of the dilated kernel, an int for each axis.

    Raises:
      ValueError: another form, or a padding outside 0 ... k-1, which a crop of the full convolution cannot give.
    """
    pairs: Sequence[Sequence[int]]
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


def canonical_transposed_padding(
    padding: Padding, image_size: Sequence[int], kernel_size: Sequence[int], strides: Sequence[int]
) -> Pairs:
    """Returns the padding of a transposed convolution, what is cropped from the full one, as a pair for each axis.

    Args:
      padding: an int, or an int or a pair for each axis.
      image_size, kernel_size, strides: an int for each axis.

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


def by_x(size: Iterable[int]) -> str:
    """Returns a size as text for a message, such as '32x32'."""
    return 'x'.join(map(str, size))


def is_int(value: Any) -> TypeGuard[int]:
    """Returns whether a value is an int of Python or NumPy; a bool does not count."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _axes(rank):
    return {1: 'the axis', 2: 'each of the two axes', 3: 'each of the three axes'}[rank]


def padding_pairs(padding: Padding, rank: int = 2, names: Sequence[str] = ()) -> Sequence[Sequence[int]]:
    """Returns a padding as a pair for each of `rank` axes.

    Args:
      padding: an int, or an int or a pair for each axis.
      rank: number of spatial axes.
      names: of the paddings that the caller accepts as well, for the message.

    Raises:
      ValueError: anything else.
    """
    sides = [padding] * rank if is_int(padding) else padding
    if isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == rank:
        pairs = [(p, p) if is_int(p) else p for p in sides]
        found = [p for p in pairs if isinstance(p, Sequence) and len(p) == 2 and all(map(is_int, p))]
        if len(found) == rank:
            return found
    others = ''.join(f'{name!r}, ' for name in names)
    raise UserError(f'padding={padding!r}: expected {others}an int or a pair for {_axes(rank)}')


def ints_for_axes(value: Ints | None, name: str, rank: int = 2) -> tuple[int, ...]:
    """Returns a kernel size, strides, a dilation or an image size as `rank` positive ints.

    Args:
      value: one int for all axes, or an int for each. None stands for 1, except for the size of a kernel or an image.
      name: of the argument, for the message.
      rank: number of spatial axes.

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


def spatial_axes(kernel_size: Ints) -> int:
    """Returns the number of spatial axes of a kernel size: 2 for one int, and for anything that is no kernel size."""
    count = len(kernel_size) if isinstance(kernel_size, Sequence) else 2
    return count if count in (1, 3) else 2


def check_shape(shape: Sequence[int], kernel_size: Sequence[int]) -> None:
    """Raises ValueError unless `shape` is the shape of a batch of images with as many axes as `kernel_size` has."""
    if len(shape) != len(kernel_size) + 2:
        raise UserError(
            f'x.shape={tuple(shape)}: expected {_EXPECTED[len(kernel_size)]} with kernel_size={tuple(kernel_size)}'
        )


def channels_in_a_group(groups: int, features_in: int, features: int) -> int:
    """Returns the number of input channels in each group of a convolution.

    Raises:
      ValueError: a number of groups that does not divide both the input and the output channels.
    """
    if not is_int(features_in) or features_in < 1:
        raise UserError(f'{features_in!r} input channels: expected a positive int')
    if not is_int(groups) or groups < 1 or features_in % groups or features % groups:
        raise UserError(
            f'feature_group_count={groups!r} with {features_in} channels and features={features}: '
            'expected a positive int that divides both'
        )
    return features_in // groups


def pair_of_ints(value: Ints | None, name: str) -> tuple[int, int]:
    """Returns `ints_for_axes` for 2 axes."""
    height, width = ints_for_axes(value, name, 2)
    return height, width
