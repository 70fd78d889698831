"""A batch behind the named axis of a `jax.vmap`: all of it at once, and each example's own part.

A layer that is one operation on a batch is called on one example at a time in Equinox. It gathers the batch, which under
`vmap` costs nothing, and takes its own example from what it computes. As an index that would be a gather, whose operand
XLA replicates over devices; `own_example` is instead a primitive that `vmap` undoes without any operation.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def index_in_batch(axis_name) -> jax.Array | None:
    """Which example of the axis this is, int32; None where there is no such axis."""
    try:
        return jax.lax.axis_index(axis_name)
    except NameError:
        return None


def own_example(batch: jax.Array, index: jax.Array) -> jax.Array:
    """batch[index]; `index` is `index_in_batch` of the axis that the first axis of `batch` was gathered over."""
    return _own.bind(batch, index)


_own = Primitive('own_example')


def _taken(batch, index):
    return jax.lax.dynamic_index_in_dim(batch, index, keepdims=False)


def _abstract(batch, index):
    return jax.make_jaxpr(_taken)(batch, index).out_avals[0]


def _batch(arguments, axes):
    batch, index = arguments
    if axes[0] is None and index.shape == (batch.shape[0],):
        return batch, 0
    return jax.vmap(_taken, in_axes=axes)(batch, index), 0


def _transpose(cotangent, batch, index):
    if type(cotangent) is ad.Zero:
        return [None, None]
    return [jnp.zeros(batch.aval.shape, batch.aval.dtype).at[index].set(cotangent), None]


_own.def_impl(_taken)
_own.def_abstract_eval(_abstract)
ad.defjvp(_own, lambda tangent, batch, index: _own.bind(tangent, index), None)
ad.primitive_transposes[_own] = _transpose
batching.primitive_batchers[_own] = _batch
mlir.register_lowering(_own, mlir.lower_fun(_taken, multiple_results=False))
