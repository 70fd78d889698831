"""Finds which layer's output is which layer's input, from the jaxpr of a model's call.

A convolution marks its output, and a normalization marks its input. The mark is a primitive that does nothing and stays
in the jaxpr under `jit`, `vmap` and `remat`. The model is traced, never computed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import ad, batching, mlir


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer, with shapes as the layer sees them: without the axes of a `vmap` around it.

    Attributes:
      layer: number of the layer.
      input: shape of its input.
      output: shape of its output, or None for a normalization.
      refusal: why a ConvNorm cannot be called in this way; '' if it can.
    """

    layer: int
    input: tuple[int, ...]
    output: tuple[int, ...] | None = None
    refusal: str = ''


_mark = Primitive('convnorm_mark')


def mark(x: jax.Array, call: Call) -> jax.Array:
    """Returns x, marked in the jaxpr as the output of a convolution or the input of a normalization."""
    return _mark.bind(jnp.asarray(x), call=call)


_mark.def_impl(lambda x, call: x)
_mark.def_abstract_eval(lambda x, call: x)
# The tangent is not marked: it would be a second call.
ad.primitive_jvps[_mark] = lambda primals, tangents, call: (_mark.bind(*primals, call=call), tangents[0])
batching.primitive_batchers[_mark] = lambda arrays, axes, call: (_mark.bind(*arrays, call=call), axes[0])
mlir.register_lowering(_mark, mlir.lower_fun(lambda x, call: x, multiple_results=False))

# After these primitives an array still counts as the layer's output.
_TRANSPARENT = {'convert_element_type', 'copy', 'copy_p', 'name', 'optimization_barrier', 'sharding_constraint'}
# The arguments and results of these primitives are those of the jaxpr inside, one by one.
_CALLS = {
    'jit',
    'pjit',
    'closed_call',
    'core_closed_call',
    'core_call',
    'call',
    'checkpoint',
    'remat',
    'remat2',
    'custom_jvp_call',
    'custom_vjp_call',
    'custom_vjp_call_jaxpr',
    'shard_map',
}
_LOOPS = {'scan', 'while'}


class _Value:
    """An array of the program, whatever its names in the nested jaxprs, with the layer that made it and its readers."""

    def __init__(self, layer=None):
        self.layer, self.uses = layer, 0


class Flow:
    """The flow of arrays between the layers that marked a trace.

    Args:
      jaxpr: of the model's call.

    Attributes:
      calls: the calls of each layer, by its number; a call inside a loop is there twice.
    """

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.calls: dict[int, list[Call]] = {}
        self._outputs: dict[int, list[_Value]] = {}
        self._inputs: dict[int, list[_Value]] = {}
        for value in self._walk(jaxpr, [_Value() for _ in jaxpr.invars], looped=False):
            value.uses += 1

    def once(self, layer: int) -> bool:
        """Returns whether the layer is called exactly once."""
        return len(self.calls.get(layer, ())) == 1

    def source(self, norm: int) -> int | None:
        """Returns the convolution whose output is the input of a normalization, or None if there is none."""
        return self._inputs[norm][0].layer if self.once(norm) else None

    def uses(self, convolution: int) -> int:
        """Returns how many operations and layers read the output of a convolution that is called once."""
        return self._outputs[convolution][0].uses

    def _walk(self, jaxpr, given, looped):
        """Returns the values of a jaxpr's results, from those of its arguments."""
        values = dict(zip(jaxpr.invars, given))

        def value_of(variable):
            if hasattr(variable, 'val'):  # a literal
                return _Value()
            return values.setdefault(variable, _Value())

        for equation in jaxpr.eqns:
            given, name = [value_of(v) for v in equation.invars], equation.primitive.name
            inside = [j for parameter in equation.params.values() for j in _jaxprs(parameter)]
            if equation.primitive is _mark:
                results = [self._marked(given[0], equation.params['call'], looped)]
            elif name in _TRANSPARENT and len(given) == len(equation.outvars):
                results = given
            elif name in _CALLS and inside and len(inside[0].invars) == len(given):
                results = self._walk(inside[0], given, looped)
            else:
                for value in given:
                    value.uses += 1
                for part in inside:
                    again = looped or name in _LOOPS
                    for value in self._walk(part, [_Value() for _ in part.invars], again):
                        value.uses += 1
                results = [_Value() for _ in equation.outvars]
            values.update(zip(equation.outvars, results))
        return [value_of(v) for v in jaxpr.outvars]

    def _marked(self, value, call, looped):
        self.calls.setdefault(call.layer, []).extend([call] * (2 if looped else 1))
        if call.output is None:
            value.uses += 1
            self._inputs.setdefault(call.layer, []).append(value)
            return _Value()
        result = _Value(call.layer)
        self._outputs.setdefault(call.layer, []).append(result)
        return result


def _jaxprs(parameter):
    """The jaxprs in a parameter of an equation."""
    parts = parameter if isinstance(parameter, (tuple, list)) else [parameter]
    opened = [getattr(p, 'jaxpr', p) for p in parts]
    return [p for p in opened if hasattr(p, 'eqns') and hasattr(p, 'invars')]


def trace(function: Callable, *arguments: Any) -> Flow:
    """Returns the flow through `function(*arguments)`; arguments are pytrees of arrays or `jax.ShapeDtypeStruct`."""
    arrays = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return Flow(jax.make_jaxpr(lambda *given: arrays(function(*given)))(*arguments).jaxpr)
