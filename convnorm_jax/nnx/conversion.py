"""`convnormalize` for Flax NNX: ConvNorm in place of the convolutions of a model.

    model, report = convnormalize(ResNet(rngs=nnx.Rngs(0)), images, rngs=nnx.Rngs(1))
    print(report)

The geometry of the convolutions is in `geometry`, what all libraries share in `convnorm_jax.conversion`.
"""

import functools
from collections.abc import Callable, Iterator

import jax
from flax import nnx

from convnorm_jax import conversion, dataflow
from convnorm_jax.conversion import Found, Refused, Report
from convnorm_jax.dataflow import Call
from convnorm_jax.layers import core
from convnorm_jax.nnx.geometry import geometry_of
from convnorm_jax.nnx.layers import ConvNorm, ConvNormTranspose

_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
# They change the kernel of the layer inside before they call it.
_WRAPPERS = tuple(getattr(nnx, name) for name in ('SpectralNorm', 'WeightNorm') if hasattr(nnx, name))


def convnormalize(
    model: nnx.Module,
    images: jax.Array | jax.ShapeDtypeStruct,
    *,
    rngs: nnx.Rngs,
    where: Callable[[str], bool] | str | None = None,
    norms: type | tuple[type, ...] = (nnx.BatchNorm,),
    call: Callable | None = None,
    **options,
) -> tuple[nnx.Module, Report]:
    """The model with a ConvNorm in place of every convolution and of the normalization that follows it.

    Which normalization follows which convolution is read off a trace of `call`: one goes into a ConvNorm if its input
    is the output of one convolution, and nothing else takes that output. The ConvNorm is then at the normalization's
    place, where `train()`, `eval()` and `use_running_average` reach it, and at the convolution's there is nothing. A
    convolution alone becomes a ConvNorm without BatchNorm, which keeps no state: its spectrum is always that of its
    kernel (spectrum='exact'). Layers that cannot be replaced stay; the report says why.

    The new model is another function: train it. What it keeps are the kernels, the bias of a convolution as
    `affine_bias`, and the scale, bias, momentum and epsilon of a BatchNorm, not its running statistics, which are those
    of other arrays. The model that is given is not changed.

    Args:
      images: an example batch, or its shape and dtype.
      rngs: its stream 'params' gives the initial values of the channel-wise convolutions.
      where: which convolutions, a function of a path such as 'layers/0/conv1', or a regular expression that is searched
        in it; None is all.
      norms: types of normalizations to replace; others stay behind their ConvNorm.
      call: (model, images) -> anything: how the model is called, if not as model(images).
      options: of every ConvNorm: use_affine, momentum, spectrum, method, batch_norm_momentum, batch_norm_epsilon,
        dtype, precision.

    Returns:
      The new model, and the report: `print(report)`.

    Raises:
      UserError: no convolution in the model, or `where` chooses none; an unknown option; a model whose code depends on
        the shape of an array between a convolution and its normalization.
    """
    norms = norms if isinstance(norms, tuple) else (norms,)
    conversion.check_options(options)
    call = call or (lambda model, images: model(images))
    # The paths are those of the model itself: a clone has its attributes in another order.
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
    """Where a convolution was that is part of the ConvNorm behind it. It ignores further arguments."""

    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        """The input."""
        return inputs


class _Stateless:
    """A ConvNorm at the place of a convolution: called as one, with any batch axes, and without state."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
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


class BatchNormedConvNorm(ConvNorm, nnx.BatchNorm):
    """A ConvNorm at the place of a BatchNorm, for code that looks for `nnx.BatchNorm` among its layers."""


class BatchNormedConvNormTranspose(ConvNormTranspose, nnx.BatchNorm):
    """A ConvNormTranspose at the place of a BatchNorm, for code that looks for `nnx.BatchNorm` among its layers."""


def _layers(model, norms) -> Iterator[tuple[tuple, nnx.Module, str]]:
    """(path, layer, refusal) of each convolution and normalization, a shared one once."""
    owners, found = {}, []
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
                refusal = f'{type(parent).__name__} around it has a hand in its kernel'
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
    """(path, node, parent) of all modules and containers, each once."""
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
    """The same with the modules in `new`, {id: module}, in place of those."""
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
    """A subclass that marks the layer's output, or its input if it is a normalization."""

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
    """The flow through the model, and the shapes of its outputs."""
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
    """Of the arrays that the call returns."""
    graph, state = nnx.split(model)
    y = jax.eval_shape(lambda state, images: _arrays(call(nnx.merge(graph, state), images)), state, images)
    return [leaf.shape for leaf in y]


def _arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _build(conv, norm, calls, rngs, options):
    transposed = isinstance(conv, nnx.ConvTranspose)
    rank = len(conv.kernel_size)
    sizes = sorted({call.input[-rank - 1 : -1] for call in calls})
    given = {**geometry_of(conv, transposed, sizes), 'dtype': conv.dtype, 'precision': conv.precision}
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
    if not (transposed and conv.transpose_kernel):  # the same axes: of the same type, with the same metadata
        layer.kernel = nnx.clone(conv).kernel
        layer.kernel[...] = known['kernel']
    if batch_norm or running:
        layer._make_state(sizes[0], 1)
    return layer, conversion.details_of(layer.settings, conv.in_features, conv.bias is not None)


def _known(conv, norm, transposed):
    """The parameters of the ConvNorm that the two layers have values for."""
    kernel = conv.kernel[...]
    if transposed and conv.transpose_kernel:
        kernel = kernel.swapaxes(-1, -2)
    elif transposed:  # lax correlates, a transposed convolution of PyTorch and ours convolves
        kernel = jax.numpy.flip(kernel, tuple(range(len(conv.kernel_size))))
    variables = {
        'affine_bias': conv.bias,
        'scale': getattr(norm, 'scale', None),
        'bias': getattr(norm, 'bias', None),
    }
    return {'kernel': kernel, **{name: v[...] for name, v in variables.items() if v is not None}}
