"""`convnormalize` for Equinox: replaces the convolutions of a model by ConvNorm.

::

    model, state, report = convnormalize(model, state, images, key=key)
    print(report)

`geometry` reads the geometry of the convolutions; `convnorm_jax.conversion` holds what all libraries share.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from convnorm_jax import conversion, dataflow
from convnorm_jax.conversion import Found, Report
from convnorm_jax.dataflow import Call
from convnorm_jax.equinox.geometry import geometry_of
from convnorm_jax.equinox.layers import ConvNorm, ConvNormTranspose
from convnorm_jax.layers import core
from convnorm_jax.layers.settings import Settings

_CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.ConvTranspose)
_OURS = (ConvNorm, ConvNormTranspose)
# These read or change the weights of the layers inside, which are in the field named here.
_WRAPPERS = {eqx.nn.SpectralNorm: 'layer', eqx.nn.WeightNorm: 'layer', eqx.nn.Shared: 'pytree'}
# Without 'dtype', which is that of the weight.
_OPTIONS = tuple(name for name in conversion.OPTIONS if name != 'dtype')


def convnormalize(
    model: eqx.Module,
    state: eqx.nn.State | None,
    images: jax.Array | jax.ShapeDtypeStruct,
    *,
    key: jax.Array,
    where: Callable[[str], Any] | str | None = None,
    norms: type | tuple[type, ...] = (eqx.nn.BatchNorm,),
    call: Callable[[Any, Any, Any], Any] | None = None,
    **options: Any,
) -> tuple[eqx.Module, eqx.nn.State | None, Report]:
    """Returns the model with a ConvNorm in place of every convolution and the normalization after it.

    A trace of `call` shows which normalization follows which convolution. A normalization becomes part of a ConvNorm if
    its input is the output of one convolution and nothing else reads that output. The ConvNorm takes the place of the
    BatchNorm, where the state and `inference` reach it, and an identity takes the place of the convolution. A
    convolution without BatchNorm is called without state, so it becomes a ConvNorm without BatchNorm whose spectrum is
    always that of its kernel (spectrum='exact'). Layers that cannot be replaced stay, and the report says why.

    The new model is another function, so train it. It keeps the kernels, the bias of a convolution as `affine_bias`,
    and the scale, bias, momentum and epsilon of a BatchNorm. It does not keep running statistics, which are those of
    other arrays. A BatchNorm of mode='ema' normalizes by its running statistics in training too; a ConvNorm never does.
    The given model and state do not change.

    Args:
      model: with convolutions `eqx.nn.Conv` or `eqx.nn.ConvTranspose`.
      state: of the model, as `eqx.nn.make_with_state` returns it; None for a model without state.
      images: an example batch `[B, C, *spatial]`, or its shape and dtype.
      key: of the initial values of the channel-wise convolutions.
      where: which convolutions to replace: a function of a path such as 'layers/0/conv1', or a regular expression that
        is searched in the path. None replaces all.
      norms: types of normalizations to replace; others stay after their ConvNorm. The scale and bias of one without
        state are folded into the channel-wise convolution.
      call: `(model, state, images)` -> anything, how the model is called, if not under
        `jax.vmap(axis_name='batch', in_axes=(0, None), out_axes=(0, None))` as model(image, state), or as model(image)
        if the state is None.
      **options: of every ConvNorm: use_affine, momentum, spectrum (of those with BatchNorm), method,
        batch_norm_momentum, batch_norm_epsilon, precision.

    Returns:
      The new model, its state, and the report; `print(report)` shows a table.

    Raises:
      ValueError: no convolution in the model, or `where` chooses none; an unknown option; a model whose code depends on
        the shape of an array between a convolution and its normalization.
    """
    norms = norms if isinstance(norms, tuple) else (norms,)
    conversion.check_options(options, _OPTIONS)
    call = call or _call
    kinds = (*_CONVOLUTIONS, *norms)
    leaves, tree = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, kinds))
    layers = {n: leaf for n, (_, leaf) in enumerate(leaves) if isinstance(leaf, kinds) and not isinstance(leaf, _OURS)}
    wrapped = _wrapped(model)
    found = {n: _found(leaves[n][0], layer, wrapped, norms) for n, layer in layers.items()}
    convolutions = {n: f for n, f in found.items() if isinstance(layers[n], _CONVOLUTIONS)}
    following = {n: f for n, f in found.items() if n not in convolutions}
    chosen = conversion.selection(where, convolutions)
    spies = [_spy(leaf, n) if n in layers else leaf for n, (_, leaf) in enumerate(leaves)]
    flow, before = _trace(jax.tree.unflatten(tree, spies), state, call, images)
    keys = dict(zip(convolutions, jax.random.split(key, len(convolutions))))

    def build(number, norm, calls):
        return _build(layers[number], layers[norm] if norm is not None else None, calls, keys[number], options)

    report, placed = conversion.convert(convolutions, following, flow, chosen, build)
    stateful = {f'convnorm {found[n].path}': layer for n, layer in placed.items() if isinstance(layer, _OURS)}
    with_state, entries = eqx.nn.make_with_state(lambda: stateful)()
    placed = {n: with_state.get(f'convnorm {found[n].path}', layer) for n, layer in placed.items()}
    placed = {n: Identity() if layer is None else layer for n, layer in placed.items()}
    new = jax.tree.unflatten(tree, [placed.get(n, leaf) for n, (_, leaf) in enumerate(leaves)])
    state = _merged(state, [layers[n] for n in placed], entries)
    conversion.check_shapes(before, lambda: _shapes(new, state, call, images))
    return new, state, report


class Identity(eqx.Module):
    """Takes the place of a layer that became part of a ConvNorm. It ignores further arguments."""

    def __call__(self, x: jax.Array, state: eqx.nn.State | None = None, **ignored: Any) -> Any:
        """Returns the input, with the state if one is given."""
        return x if state is None else (x, state)


class StatelessConvNorm(eqx.Module):
    """A ConvNorm without BatchNorm and running spectrum, called as a convolution; see `convnormalize`."""

    params: dict[str, jax.Array]
    settings: Settings = eqx.field(static=True)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Applies the layer, `[in_channels, *spatial]` -> `[out_channels, *spatial']`; `key` is ignored."""
        y, _ = core.apply(self.settings, self.params, None, jnp.moveaxis(x, 0, -1)[None], use_running_average=True)
        return jnp.moveaxis(y[0], -1, 0)


class BatchNormedConvNorm(ConvNorm, eqx.nn.BatchNorm):
    """A ConvNorm in the place of a BatchNorm, for code that looks for `eqx.nn.BatchNorm` among its layers."""


class BatchNormedConvNormTranspose(ConvNormTranspose, eqx.nn.BatchNorm):
    """A ConvNormTranspose in the place of a BatchNorm, for code that looks for `eqx.nn.BatchNorm` among its layers."""


def _call(model, state, images):
    if state is None:
        return jax.vmap(model, axis_name='batch')(images)
    return jax.vmap(model, axis_name='batch', in_axes=(0, None), out_axes=(0, None))(images, state)


def _path(keys):
    names = ('name', 'idx', 'key')
    return '/'.join(str(next(getattr(key, n) for n in names if hasattr(key, n))) for key in keys)


def _wrapped(model):
    """Returns the wrapper around each wrapped convolution, by the convolution's id."""
    found, kinds = {}, tuple(_WRAPPERS)
    for wrapper in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(wrapper, kinds):
            inside = getattr(wrapper, next(field for kind, field in _WRAPPERS.items() if isinstance(wrapper, kind)))
            for layer in jax.tree.leaves(inside, is_leaf=lambda x: isinstance(x, _CONVOLUTIONS)):
                found[id(layer)] = wrapper
    return found


def _found(keys, layer, wrapped, norms):
    kind, refusal = type(layer).__name__, ''
    originals = _CONVOLUTIONS if isinstance(layer, _CONVOLUTIONS) else norms
    if type(layer).__call__ not in {original.__call__ for original in originals}:
        refusal = 'a class with its own __call__'
    if id(layer) in wrapped:
        refusal = f'{type(wrapped[id(layer)]).__name__} around it changes its weight'
    if not isinstance(getattr(layer, 'axis_name', ''), str):
        refusal = f'axis_name={layer.axis_name!r}: a ConvNorm takes one name'
    return Found(_path(keys), kind, refusal, movable=isinstance(layer, eqx.nn.BatchNorm))


@functools.lru_cache(maxsize=256)
def _spied(kind):
    """Returns a subclass that marks its output, or for a normalization its input."""

    class OfConvolution(kind):
        number_of_layer: int = eqx.field(static=True)

        def __call__(self, x, **kwargs):
            y = kind.__call__(self, x, **kwargs)
            return dataflow.mark(y, Call(self.number_of_layer, x.shape, y.shape))

    class OfNorm(kind):
        number_of_layer: int = eqx.field(static=True)

        def __call__(self, x, *args, **kwargs):
            x = dataflow.mark(x, Call(self.number_of_layer, x.shape))
            return kind.__call__(self, x, *args, **kwargs)

    return OfConvolution if issubclass(kind, _CONVOLUTIONS) else OfNorm


def _instance(kind, **values):
    """Makes a module from the values of its fields, without its `__init__`."""
    made = object.__new__(kind)
    for field in dataclasses.fields(kind):
        object.__setattr__(made, field.name, values[field.name])
    return made


def _fields(module):
    return {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}


def _spy(layer, number):
    return _instance(_spied(type(layer)), **_fields(layer), number_of_layer=number)


def _trace(model, state, call, images):
    """Returns the flow through the model and the shapes of its outputs."""
    arrays, static = eqx.partition(model, eqx.is_array)
    shapes = []

    def run(arrays, state, images):
        y = call(eqx.combine(arrays, static), state, images)
        shapes.append([a.shape for a in _arrays(y)])
        return y

    flow = dataflow.trace(run, arrays, state, images)
    return flow, shapes[0]


def _shapes(model, state, call, images):
    """Returns the shapes of the arrays that the call returns."""
    arrays, static = eqx.partition(model, eqx.is_array)
    run = lambda arrays, state, images: _arrays(call(eqx.combine(arrays, static), state, images))
    return [leaf.shape for leaf in jax.eval_shape(run, arrays, state, images)]


def _arrays(tree):
    """Returns the arrays without those of a state, whose entries differ in the new model."""
    is_state = lambda x: isinstance(x, eqx.nn.State)
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_state) if isinstance(leaf, jax.Array)]


def _merged(state, gone, entries):
    """Returns the state without the entries of the layers in `gone`, and with `entries`."""
    if state is None:
        return None
    is_index = lambda x: isinstance(x, eqx.nn.StateIndex)
    markers = {leaf.marker for leaf in jax.tree.leaves(gone, is_leaf=is_index) if is_index(leaf)}
    found = {}
    for part in (state, entries):
        values, keys = part.tree_flatten()
        found.update({key: value for key, value in zip(keys, values) if key not in markers})
    return eqx.nn.State.tree_unflatten(tuple(found), tuple(found.values()))


def _build(conv, norm, calls, key, options):
    transposed = isinstance(conv, eqx.nn.ConvTranspose)
    sizes = sorted({call.input[1:] for call in calls})
    batch_norm = isinstance(norm, eqx.nn.BatchNorm)
    given = {**geometry_of(conv, sizes), 'param_dtype': conv.weight.dtype, **options}
    if batch_norm:
        given = {'batch_norm_epsilon': norm.eps, 'batch_norm_momentum': norm.momentum, **given}
    else:
        given['spectrum'] = 'exact'
    settings = Settings(
        features=conv.out_channels,
        kernel_size=conv.kernel_size,
        transposed=transposed,
        use_batch_norm=batch_norm,
        **given,
    )
    for size in sizes:
        settings.geometry(size)  # raises UserError
    params = _params(settings, conv, norm, batch_norm, iter(jax.random.split(key, 5)).__next__)
    details = conversion.details_of(settings, conv.in_channels, conv.bias is not None)
    if not batch_norm:
        return StatelessConvNorm(params, settings), details
    # The fields of the BatchNorm are kept for code that reads them, but not its state, weight and bias.
    nothing = {name: None for name, value in _fields(norm).items() if isinstance(value, (eqx.nn.StateIndex, jax.Array))}
    names = ('kernel', 'affine_kernel', 'affine_bias', 'scale', 'bias')
    kind = BatchNormedConvNormTranspose if transposed else BatchNormedConvNorm
    layer = _instance(
        kind,
        **{
            **_fields(norm),
            **nothing,
            **{name: params.get(name) for name in names},
            'state_index': eqx.nn.StateIndex(core.initial_state(settings, params['kernel'], sizes[0])),
            'in_channels': conv.in_channels,
            'settings': settings,
        },
    )
    return layer, details


def _params(settings, conv, norm, batch_norm, next_key):
    """Returns the parameters, with the values that the convolution and the normalization have for them."""
    kernel = jnp.moveaxis(conv.weight, (0, 1), (-1, -2))
    if settings.transposed:  # `jax.lax` cross-correlates, where a transposed convolution of PyTorch and ours convolves
        kernel = jnp.flip(kernel, tuple(range(settings.rank)))
    scale, bias = getattr(norm, 'weight', None), getattr(norm, 'bias', None)
    known = {'kernel': kernel, 'affine_bias': None if conv.bias is None else conv.bias.reshape(-1)}
    if batch_norm:
        known |= {'scale': scale, 'bias': bias}
    params = core.draw_params(settings, conv.in_channels, next_key, known)
    if not batch_norm and settings.use_affine:  # a stateless normalization: folded into the affine part
        if scale is not None and scale.shape == (settings.features,):
            params = {**params, **{name: params[name] * scale for name in ('affine_kernel', 'affine_bias')}}
        if bias is not None and bias.shape == (settings.features,):
            params['affine_bias'] = params['affine_bias'] + bias
    return params
