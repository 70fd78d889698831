"""The library-independent part of `convnormalize`: which layers become a ConvNorm, and the report."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from convnorm_jax.dataflow import Call, Flow
from convnorm_jax.errors import UserError
from convnorm_jax.layers.geometry import by_x
from convnorm_jax.layers.settings import Settings, ints

# The options of a ConvNorm that a caller may choose; the geometry is that of the convolution.
OPTIONS = (
    'use_affine',
    'momentum',
    'spectrum',
    'method',
    'batch_norm_momentum',
    'batch_norm_epsilon',
    'dtype',
    'precision',
)


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A convolution that became a ConvNorm.

    Attributes:
      path: of the convolution.
      norm: path of the normalization that became part of the ConvNorm, or None.
      place: path of the new layer. It is that of the normalization, whose calls tell whether the model trains, or
        without a normalization that of the convolution.
      layer: class of the new layer, 'ConvNorm' or 'ConvNormTranspose'.
      details: its kernel size, channels and the like.
    """

    path: str
    norm: str | None
    place: str
    layer: str
    details: str


@dataclasses.dataclass(frozen=True)
class Left:
    """A convolution or normalization that stays as it is.

    Attributes:
      path: of the layer.
      kind: its class.
      reason: why it stays.
    """

    path: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of what `convnormalize` did; `print(report)` shows a table.

    Attributes:
      replaced: the convolutions that became a ConvNorm, in the order of the model.
      left: the layers that stay, in the order of the model.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        rows = [(r.path + (f' + {r.norm}' if r.norm else ''), f'{r.layer} {r.details}') for r in self.replaced]
        rows_left = [(entry.path, f'{entry.kind}: {entry.reason}') for entry in self.left]
        width = max((len(name) for name, _ in rows + rows_left), default=0)
        table = lambda rows: [f'  {name:{width}}  {text}' for name, text in rows]
        lines = [f'replaced ({len(rows)}):', *table(rows)]
        if rows_left:
            lines += [f'left ({len(rows_left)}):', *table(rows_left)]
        return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Found:
    """A convolution or a normalization of a model.

    Attributes:
      path: such as 'layers/0/conv1'.
      kind: its class.
      refusal: why it can never become a ConvNorm or part of one; '' if it can.
      movable: for a normalization, whether a ConvNorm can take its place; otherwise the ConvNorm takes the place of the
        convolution.
    """

    path: str
    kind: str
    refusal: str = ''
    movable: bool = True


class Refused(Exception):
    """A layer cannot become a ConvNorm; the message says why."""


class NewLayer(Protocol):
    """A layer of any library that `convnormalize` puts into a model."""

    settings: Settings


def check_options(options: Mapping[str, Any], known: Sequence[str] = OPTIONS) -> None:
    """Raises UserError for an option that the caller may not choose, and for a value that it cannot have."""
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f'convnormalize({unknown[0]}=...): expected options of ConvNorm: {", ".join(known)}')
    Settings(features=1, **options)  # raises for a wrong value now, instead of leaving every layer because of it


def selection(where: Callable[[str], Any] | str | None, convolutions: Mapping[int, Found]) -> set[int]:
    """Returns the numbers of the convolutions that `where` chooses.

    Args:
      where: a function of a convolution's path, or a regular expression that is searched in the path; None chooses all.
      convolutions: by their numbers.

    Raises:
      UserError: there are no convolutions, or `where` chooses none.
    """
    if not convolutions:
        raise UserError('convnormalize: the model has no convolution that could become a ConvNorm')
    try:
        chosen = where if callable(where) else re.compile(where or '').search
    except re.error as error:
        raise UserError(f'convnormalize(where={where!r}): no regular expression, {error}') from None
    found = {number for number, layer in convolutions.items() if chosen(layer.path)}
    if not found:
        paths = [layer.path for layer in convolutions.values()]
        shown = ', '.join(paths[:5]) + (', ...' if len(paths) > 5 else '')
        raise UserError(f'convnormalize(where={where!r}): it matches none of the convolutions {shown}')
    return found


def convert(
    convolutions: Mapping[int, Found],
    norms: Mapping[int, Found],
    flow: Flow,
    chosen: set[int],
    build: Callable[[int, int | None, list[Call]], tuple[NewLayer, str]],
) -> tuple[Report, dict[int, Any]]:
    """Builds a ConvNorm for each convolution that can become one.

    Args:
      convolutions, norms: the layers, by their numbers in the flow.
      flow: of the model's call.
      chosen: numbers of the convolutions to replace.
      build: `(convolution, normalization or None, calls of the convolution)` -> `(new layer, details for the report)`,
        where both layers are given by number. It raises Refused or UserError if there can be no such layer. A
        convolution that cannot be replaced together with its normalization is tried alone.

    Returns:
      The report, and by the number of each replaced layer what takes its place, None for nothing.
    """
    followers = _followers(convolutions, norms, flow)
    replaced: list[Replaced] = []
    left: list[Left] = []
    new: dict[int, Any] = {}
    reasons = {number: _why_alone(number, convolutions, norms, flow) for number in norms}
    for number, layer in convolutions.items():
        norm, calls = followers.get(number), flow.calls.get(number, [])
        for together in [norm] if norm is None else [norm, None]:
            try:
                _check(layer, number in chosen, calls)
                made, details = build(number, together, calls)
            except (Refused, UserError) as error:
                reason = str(error)
                if together is not None:
                    reasons[together] = reason
                continue
            place = number if together is None or not norms[together].movable else together
            new.update({n: None for n in (number, together) if n is not None})
            new[place] = made
            path = {**convolutions, **norms}[place].path
            name = 'ConvNormTranspose' if made.settings.transposed else 'ConvNorm'
            gone = None if together is None else norms[together].path
            replaced.append(Replaced(layer.path, gone, path, name, details))
            break
        else:
            left.append(Left(layer.path, layer.kind, reason))
            if norm is not None:
                reasons[norm] = f'its convolution {layer.path} is left'
    left += [Left(layer.path, layer.kind, reasons[n]) for n, layer in norms.items() if n not in new]
    return Report(tuple(replaced), tuple(left)), new


def _check(layer, chosen, calls):
    refusals = [
        '' if chosen else 'not chosen by `where`',
        layer.refusal,
        '' if calls else 'the call of the model does not reach it',
        *(call.refusal for call in calls),
    ]
    for refusal in refusals:
        if refusal:
            raise Refused(refusal)


def _followers(convolutions, norms, flow):
    """The normalization that takes the output of each convolution, where nothing else does, by number."""
    found = {}
    for number in norms:
        if not _why_alone(number, convolutions, norms, flow):
            found[flow.source(number)] = number
    return found


def _why_alone(number, convolutions, norms, flow):
    """Why a normalization cannot become part of a ConvNorm; '' if it can."""
    if not flow.calls.get(number):
        return 'the call of the model does not reach it'
    if not flow.once(number):
        return 'it is called more than once'
    source = flow.source(number)
    if source is None:
        return 'its input is not the output of a convolution'
    path = convolutions[source].path
    if not flow.once(source):
        return f'{path} is called more than once'
    if flow.uses(source) > 1:
        return f'the output of {path} is used elsewhere, too'
    call = flow.calls[number][0]
    if norms[number].movable and call.input != flow.calls[source][0].output:
        return f'it is called on {call.input}, not on the output of {path}'
    return call.refusal or norms[number].refusal


def details_of(settings: Settings, features_in: int, had_bias: bool) -> str:
    """Returns the details of a layer for the report, such as '3x3, 16 -> 32, strides 2x2'.

    Args:
      settings: of the layer.
      features_in: its input channels.
      had_bias: whether the convolution had a bias.
    """
    parts = [by_x(ints(settings.kernel_size)), f'{features_in} -> {settings.features}']
    for value, text in ((ints(settings.strides), 'strides'), (ints(settings.kernel_dilation), 'dilation')):
        if set(value) != {1}:
            parts.append(f'{text} {by_x(value)}')
    if settings.feature_group_count > 1:
        parts.append(f'{settings.feature_group_count} groups')
    if settings.padding == 'CIRCULAR':
        parts.append('circular')
    if not settings.use_batch_norm:
        parts.append('no BatchNorm')
    if had_bias and not settings.use_affine:
        parts.append('without the bias of the convolution')
    return ', '.join(parts)


def transposed_crop(spans: Sequence[int], padding: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the crop of a ConvNormTranspose for a `jax.lax` padding of the dilated input, as a pair for each axis.

    Args:
      spans: size of the dilated kernel.
      padding: a pair for each axis.

    Raises:
      Refused: more padding than the full transposed convolution has.
    """
    crop = [(k - 1 - before, k - 1 - after) for k, (before, after) in zip(spans, padding)]
    if any(c < 0 for pair in crop for c in pair):
        raise Refused(
            f'its output reaches beyond the full transposed convolution: padding {tuple(padding)} of the dilated '
            f'input with kernel_size={tuple(spans)}'
        )
    return crop


def named_padding(
    name: str, sizes: Sequence[Sequence[int]], spans: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Returns a padding such as 'SAME_LOWER' as a pair for each axis.

    Raises:
      Refused: the pairs are not the same for images of all `sizes`.
    """
    found = {tuple(jax.lax.padtype_to_pads(size, spans, strides, name)) for size in sizes}
    if len(found) > 1:
        raise Refused(f'padding={name!r} of images of several sizes')
    return [(int(before), int(after)) for before, after in found.pop()]


CAUSAL = 'causal padding: the filter of a ConvNorm sees the whole sequence'


def check_padding(padding: Sequence[Sequence[int]], spans: Sequence[int]) -> None:
    """Raises Refused for the padding of a causal convolution of sequences."""
    if len(spans) == 1 and spans[0] > 1 and tuple(padding[0]) == (spans[0] - 1, 0):
        raise Refused(CAUSAL)


def check_shapes(before: list[tuple[int, ...]], after: Callable[[], list[tuple[int, ...]]]) -> None:
    """Raises UserError unless the outputs of the new model, which `after` traces, have the same shapes as `before`."""
    advice = (
        "the model's code depends on the shape of an array between a convolution and its normalization; leave that "
        'convolution by `where`'
    )
    try:
        found = after()
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f'convnormalize: the new model cannot be called; maybe {advice}') from error
    if before != found:
        raise UserError(f'convnormalize: the output would have the shapes {found}, not {before}: {advice}')
