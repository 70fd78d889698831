"""`convnormalize` for Flax NNX: replaces the convolutions of a model by ConvNorm.

::

    model, report = convnormalize(ResNet(rngs=nnx.Rngs(0)), images, rngs=nnx.Rngs(1))
    print(report)

`geometry` reads the geometry of the convolutions; `convnorm_jax.conversion` holds what all libraries share.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from convnorm_jax import conversion, dataflow
from convnorm_jax.conversion import Found, Refused, Report
from convnorm_jax.dataflow import Call
from convnorm_jax.layers import core
from convnorm_jax.nnx.geometry import geometry_of
from convnorm_jax.nnx.layers import ConvNorm, ConvNormTranspose, _NormalizedConvolution

_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
# These change the kernel of the layer inside before they call it.
_WRAPPERS = tuple(getattr(nnx, name) for name in ('SpectralNorm', 'WeightNorm') if hasattr(nnx, name))


def convnormalize(
    model: nnx.Module,
    images: jax.Array | jax.ShapeDtypeStruct,
    *,
    rngs: nnx.Rngs,
    where: Callable[[str], Any] | str | None = None,
    norms: type | tuple[type, ...] = (nnx.BatchNorm,),
    call: Callable[[Any, Any], Any] | None = None,
    **options: Any,
) -> tuple[nnx.Module, Report]:
    """Returns the model with a ConvNorm in place of every convolution and the normalization after it.

    A trace of `call` shows which normalization follows which convolution. A normalization becomes part of a ConvNorm if
    its input is the output of one convolution and nothing else reads that output. The ConvNorm takes the place of the
    normalization, where `train()`, `eval()` and `use_running_average` reach it, and an identity takes the place of the
    convolution. A convolution alone becomes a ConvNorm without BatchNorm and without state: its spectrum is always that
    of its kernel (spectrum='exact'). Layers that cannot be replaced stay, and the report says why.

    The new model is another function, so train it. It keeps the kernels, the bias of a convolution as `affine_bias`,
    and the scale, bias, momentum and epsilon of a BatchNorm. It does not keep running statistics, which are those of
    other arrays. The given model does not change.

    Args:
      model: with convolutions `nnx.Conv` or `nnx.ConvTranspose`.
      images: an example batch, or its shape and dtype.
      rngs: its stream 'params' gives the initial values of the channel-wise convolutions.
      where: which convolutions to replace: a function of a path such as 'layers/0/conv1', or a regular expression that
        is searched in the path. None replaces all.
      norms: types of normalizations to replace; others stay after their ConvNorm.
      call: `(model, images)` -> anything, how the model is called, if not as model(images).
      **options: of every ConvNorm: use_affine, momentum, spectrum, method, batch_norm_momentum, batch_norm_epsilon,
        dtype, precision.

    Returns:
      The new model, and the report; `print(report)` shows a table.

    Raises:
      ValueError: no convolution in the model, or `where` chooses none; an unknown option; a model whose code depends on
        the shape of an array between a convolution and its normalization.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from convnorm_jax.nnx import convnormalize
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Conv(3, 16, (3, 3), rngs=rngs), nnx.BatchNorm(16, rngs=rngs), nnx.relu)
      >>> model, report = convnormalize(model, jnp.ones((8, 32, 32, 3)), rngs=nnx.Rngs(1))
      >>> print(report)
      replaced (1):
        layers/0 + layers/1  ConvNorm 3x3, 3 -> 16
    """
    norms = norms if isinstance(norms, tuple) else (norms,)
    conversion.check_options(options)
    call = call or (lambda model, images: model(images))
    # Paths are taken from the model itself, because the attributes of a clone are in another order.
    layers = dict(enumerate(_layers(model, norms)))
    found = {
        n: Found('/'.join(map(str, path)), type(layer).__name__, refusal)
        for n, (path, layer, refusal) in layers.items()
    }
    convolutions = {n: f for n, f in found.items() if isinstance(layers[n][1], _CONVOLUTIONS)}
    following = {n: f for n, f in found.items() if n not in convolutions}
    chosen = conversion.selection(where, convolutions)
    flow, before = _trace(model, {path: n for n, (path, _, _) in layers.items()}, call, images)

    def build(number, norm, calls):
        return _build(layers[number][1], layers[norm][1] if norm is not None else None, calls, rngs, options)

    report, placed = conversion.convert(convolutions, following, flow, chosen, build)
    new = nnx.clone(model)
    ids = {id(_at(new, layers[n][0])): Identity() if layer is None else layer for n, layer in placed.items()}
    new = _replaced(new, ids, set())
    conversion.check_shapes(before, lambda: _shapes(new, call, images))
    return new, report


class Identity(nnx.Module):
    """Takes the place of a convolution that became part of the ConvNorm after it. It ignores further arguments."""

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns the input."""
        return inputs


class _Stateless(_NormalizedConvolution):
    """A ConvNorm in the place of a convolution: called as one, with any batch axes, and without state."""

    def __call__(self, inputs: jax.Array) -> jax.Array:  # type: ignore[override]  # called as a convolution is
        rank = self.settings.rank
        if inputs.ndim == rank + 2:
            return super().__call__(inputs, use_running_average=True)
        flat = inputs.reshape(-1, *inputs.shape[-rank - 1 :])
        y = super().__call__(flat, use_running_average=True)
        return y.reshape(*inputs.shape[: -rank - 1], *y.shape[1:])


class StatelessConvNorm(_Stateless, ConvNorm):
    """A ConvNorm without BatchNorm and running spectrum; see `convnormalize`."""


class StatelessConvNormTranspose(_Stateless, ConvNormTranspose):
    """A ConvNormTranspose without BatchNorm and running spectrum; see `convnormalize`."""


class BatchNormedConvNorm(ConvNorm, nnx.BatchNorm):  # type: ignore[misc]  # a BatchNorm for isinstance only
    """A ConvNorm in the place of a BatchNorm, for code that looks for `nnx.BatchNorm` among its layers."""


class BatchNormedConvNormTranspose(ConvNormTranspose, nnx.BatchNorm):  # type: ignore[misc]  # for isinstance only
    """A ConvNormTranspose in the place of a BatchNorm, for code that looks for `nnx.BatchNorm` among its layers."""


def _layers(model, norms) -> Iterator[tuple[tuple, Any, str]]:
    """Yields path, layer and refusal of each convolution and normalization, a shared one once."""
    owners: dict[int, list[nnx.Module]] = {}
    found: list[tuple[tuple, Any, str]] = []
    for path, node, parent in _walk(model, (), None, set()):
        if not isinstance(node, nnx.Module):
            continue
        for value in vars(node).values():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), []).append(node)
        own = type(node).__call__
        if isinstance(node, _CONVOLUTIONS):
            refusal = '' if own in (nnx.Conv.__call__, nnx.ConvTranspose.__call__) else 'a class with its own __call__'
            if isinstance(parent, _WRAPPERS):
                refusal = f'{type(parent).__name__} around it changes its kernel'
            found.append((path, node, refusal))
        elif isinstance(node, norms) and not isinstance(node, (ConvNorm, ConvNormTranspose)):
            refusal = '' if own in {kind.__call__ for kind in norms} else 'a class with its own __call__'
            if getattr(node, 'axis_name', None) is not None:
                refusal = f'axis_name={node.axis_name!r}: its statistics are those of several devices'
            found.append((path, node, refusal))
    for path, node, refusal in found:
        if isinstance(node, _CONVOLUTIONS) and len(owners[id(node.kernel)]) > 1:
            refusal = refusal or 'it shares its kernel with another layer'
        yield path, node, refusal


def _children(node):
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, nnx.Module):
        return [(name, value) for name, value in vars(node).items() if not name.startswith(('_pytree__', '_object__'))]
    return []


def _walk(node, path, parent, seen):
    """Yields path, node and parent of all modules and containers, each once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    yield path, node, parent
    for name, child in _children(node):
        if isinstance(child, (nnx.Module, list, tuple, dict)):
            yield from _walk(child, (*path, name), node, seen)


def _at(node, path):
    return functools.reduce(lambda node, name: dict(_children(node))[name], path, node)


def _replaced(node, new, seen):
    """Replaces, in place, the modules whose ids are keys of `new` by its values; returns the node."""
    if id(node) in new:
        return new[id(node)]
    if id(node) in seen or not _children(node):
        return node
    seen.add(id(node))
    changed = {}
    for name, child in _children(node):
        if isinstance(child, (nnx.Module, list, tuple, dict)):
            changed[name] = _replaced(child, new, seen)
    changed = {name: child for name, child in changed.items() if child is not dict(_children(node))[name]}
    if isinstance(node, tuple) and changed:
        values = [changed.get(i, value) for i, value in enumerate(node)]
        return type(node)(*values) if hasattr(node, '_fields') else tuple(values)
    for name, child in changed.items():
        if isinstance(node, nnx.Module):
            setattr(node, name, child)
        else:
            node[name] = child
    return node


@functools.lru_cache(maxsize=256)
def _spied(kind):
    """Returns a subclass that marks its output, or for a normalization its input."""

    def of_convolution(self, *args, **kwargs):
        given = args[0] if args else kwargs['inputs']
        y = kind.__call__(self, *args, **kwargs)
        refusal = 'it is called with out_sharding' if kwargs.get('out_sharding') is not None else ''
        return dataflow.mark(y, Call(self.number_of_layer, given.shape, y.shape, refusal))

    def of_norm(self, x, *args, **kwargs):
        refusal = 'it is called with a mask' if kwargs.get('mask') is not None else ''
        axis = getattr(self, 'axis', -1)
        if axis not in (-1, x.ndim - 1):
            refusal = f'axis={axis}: a ConvNorm normalizes the last one'
        x = dataflow.mark(x, Call(self.number_of_layer, x.shape, refusal=refusal))
        return kind.__call__(self, x, *args, **kwargs)

    function = of_convolution if issubclass(kind, _CONVOLUTIONS) else of_norm
    return type(kind.__name__, (kind,), {'__call__': function})


def _trace(model, numbers, call, images):
    """Returns the flow through the model and the shapes of its outputs."""
    spy = nnx.clone(model)
    for path, number in numbers.items():
        layer = _at(spy, path)
        object.__setattr__(layer, '__class__', _spied(type(layer)))
        layer.number_of_layer = number
    graph, state = nnx.split(spy)
    shapes = []

    def run(state, images):
        model = nnx.merge(graph, state)
        y = call(model, images)
        shapes.append(jax.tree.map(jax.numpy.shape, _arrays(y)))
        return y, nnx.state(model)

    return dataflow.trace(run, state, images), shapes[0]


def _shapes(model, call, images):
    """Returns the shapes of the arrays that the call returns."""
    graph, state = nnx.split(model)
    y = jax.eval_shape(lambda state, images: _arrays(call(nnx.merge(graph, state), images)), state, images)
    return [leaf.shape for leaf in y]


def _arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _build(conv, norm, calls, rngs, options):
    transposed = isinstance(conv, nnx.ConvTranspose)
    rank = len(conv.kernel_size)
    sizes = sorted({call.input[-rank - 1 : -1] for call in calls})
    given = {**geometry_of(conv, sizes), 'dtype': conv.dtype, 'precision': conv.precision}
    given['param_dtype'] = conv.kernel.dtype
    batch_norm = norm is not None
    running = options.get('spectrum') == 'running'
    if batch_norm or running:
        if len(calls) > 1:
            raise Refused(f"it is called {len(calls)} times; spectrum='running' is of one call")
        if len(calls[0].input) != rank + 2:
            raise Refused(f'its convolution is called on {calls[0].input}: a ConvNorm with state takes one batch axis')
    if batch_norm:
        given['batch_norm_epsilon'] = getattr(norm, 'epsilon', 1e-5)
        given['batch_norm_momentum'] = getattr(norm, 'momentum', 0.9)
        given['use_running_average'] = getattr(norm, 'use_running_average', False)
        kinds = (ConvNorm, ConvNormTranspose)
        if isinstance(norm, nnx.BatchNorm):
            kinds = (BatchNormedConvNorm, BatchNormedConvNormTranspose)
    elif running:
        kinds = (ConvNorm, ConvNormTranspose)
    else:
        kinds, given['spectrum'] = (StatelessConvNorm, StatelessConvNormTranspose), 'exact'
    given = {**given, **options, 'use_batch_norm': batch_norm}
    make = functools.partial(kinds[transposed], conv.in_features, conv.out_features, conv.kernel_size, **given)
    layer = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    for size in sizes:
        layer.settings.geometry(size)  # raises UserError
    known = _known(conv, norm, transposed)
    for name, value in core.draw_params(layer.settings, conv.in_features, rngs.params, known).items():
        setattr(layer, name, nnx.Param(value))
    if not (transposed and conv.transpose_kernel):  # with the same axes it keeps the type and metadata of the variable
        layer.kernel = nnx.clone(conv).kernel
        layer.kernel[...] = known['kernel']
    if batch_norm or running:
        layer._make_state(sizes[0], 1)
    return layer, conversion.details_of(layer.settings, conv.in_features, conv.bias is not None)


def _known(conv, norm, transposed):
    """Returns the parameters of the ConvNorm that the two layers have values for."""
    kernel = conv.kernel[...]
    if transposed and conv.transpose_kernel:
        kernel = kernel.swapaxes(-1, -2)
    elif transposed:  # `jax.lax` cross-correlates, where a transposed convolution of PyTorch and ours convolves
        kernel = jax.numpy.flip(kernel, tuple(range(len(conv.kernel_size))))
    variables = {
        'affine_bias': conv.bias,
        'scale': getattr(norm, 'scale', None),
        'bias': getattr(norm, 'bias', None),
    }
    return {'kernel': kernel, **{name: v[...] for name, v in variables.items() if v is not None}}
