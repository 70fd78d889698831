"""Gathers the batch behind the named axis of a `jax.vmap`, and takes one example's part of a result.

Equinox calls a layer on one example at a time, but ConvNorm is one operation on the whole batch. So the layer gathers
the batch and takes its own example from the output. Both are primitives that `jax.vmap` replaces by no operation at
all. JAX's own operations would not do: `jax.lax.all_gather` raises within `jax.shard_map`, and XLA replicates the
operand of an index over the devices. Under `jax.pmap` they are an all-gather and an index.
"""

import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def index_in_batch(axis_name: Hashable) -> jax.Array | None:
    """Returns this example's index along a named axis, int32; None where there is no such axis."""
    try:
        return jax.lax.axis_index(axis_name)
    except NameError:
        return None


def whole_batch(x: jax.Array, index: jax.Array, axis_name: Hashable) -> jax.Array:
    """Returns x of all examples along the axis, [B, ...]; `index` comes from `index_in_batch`."""
    return _whole.bind(x, index, axis_name=axis_name)


def own_example(batch: jax.Array, index: jax.Array) -> jax.Array:
    """Returns batch[index], for a batch computed from `whole_batch`; `index` comes from `index_in_batch`."""
    return _own.bind(batch, index)


def _gathered(x, index, *, axis_name):
    del index
    return jax.lax.all_gather(x, axis_name)


def _taken(batch, index):
    return jax.lax.dynamic_index_in_dim(batch, index, keepdims=False)


def _batch_whole(arguments, axes, *, axis_name):
    (x, index), (axis_of_x, axis_of_index) = arguments, axes
    if axis_of_index is None:  # this vmap is over another axis
        return _whole.bind(jnp.moveaxis(x, axis_of_x, 0), index, axis_name=axis_name), 1
    if axis_of_x is None:
        return jnp.broadcast_to(x, (*index.shape, *x.shape)), None
    return jnp.moveaxis(x, axis_of_x, 0), None


def _batch_own(arguments, axes):
    (batch, index), (axis_of_batch, axis_of_index) = arguments, axes
    if axis_of_index is None:
        return _own.bind(jnp.moveaxis(batch, axis_of_batch, 1), index), 0
    if axis_of_batch is None:
        return batch, 0
    return jax.vmap(_taken, in_axes=axes)(batch, index), 0


def _transpose_whole(cotangent, x, index, *, axis_name):
    del x, index
    return [None if type(cotangent) is ad.Zero else jax.lax.psum_scatter(cotangent, axis_name), None]


def _transpose_own(cotangent, batch, index):
    if type(cotangent) is ad.Zero:
        return [None, None]
    return [jnp.zeros(batch.aval.shape, batch.aval.dtype).at[index].set(cotangent), None]


def _primitive(name, function, batch, transpose):
    primitive = Primitive(name)
    primitive.def_impl(function)
    abstract = lambda *given, **options: jax.make_jaxpr(functools.partial(function, **options))(*given).out_avals[0]
    primitive.def_abstract_eval(abstract)
    ad.defjvp(primitive, lambda tangent, _, index, **options: primitive.bind(tangent, index, **options), None)
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive


_whole = _primitive('whole_batch', _gathered, _batch_whole, _transpose_whole)
_own = _primitive('own_example', _taken, _batch_own, _transpose_own)
