"""Which layer's output is which other layer's input: read off the jaxpr of a model's call, not off names.

Every layer of interest marks an array on its way: a convolution its output, a normalization its input. The mark is a
primitive that does nothing; it stays in the jaxpr under `jit`, `vmap` and `remat`. The model is traced, never computed.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer, as the layer sees it: without the axes of a `vmap` around it.

    Attributes:
      layer: its number.
      input, output: shapes; None for what is not known yet.
      refusal: why this call is none of a ConvNorm's, '' if it is.
    """

    layer: int
    input: tuple[int, ...]
    output: tuple[int, ...] | None = None
    refusal: str = ''


_mark = Primitive('convnorm_mark')


def mark(x: jax.Array, call: Call) -> jax.Array:
    """x, and a note in the jaxpr that it is the output of a convolution, or the input of a normalization."""
    return _mark.bind(jnp.asarray(x), call=call)


_mark.def_impl(lambda x, call: x)
_mark.def_abstract_eval(lambda x, call: x)
# The tangent is not marked: it would be a second call.
ad.primitive_jvps[_mark] = lambda primals, tangents, call: (_mark.bind(*primals, call=call), tangents[0])
batching.primitive_batchers[_mark] = lambda arrays, axes, call: (_mark.bind(*arrays, call=call), axes[0])
mlir.register_lowering(_mark, mlir.lower_fun(lambda x, call: x, multiple_results=False))

# An array that went through these only is still the layer's output.
_TRANSPARENT = {'convert_element_type', 'copy', 'copy_p', 'name', 'optimization_barrier', 'sharding_constraint'}
# Their arguments and results are those of the jaxpr inside, one by one.
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
    """An array in the program, under all the names that it has in the jaxprs it is handed through."""

    def __init__(self, layer=None):
        self.layer, self.uses = layer, 0


class Flow:
    """What the trace of a model says about the layers that marked it.

    Attributes:
      calls: {layer: its calls}; one inside a loop is there twice.
    """

    def __init__(self, jaxpr):
        self.calls: dict[int, list[Call]] = {}
        self._outputs: dict[int, list[_Value]] = {}
        self._inputs: dict[int, list[_Value]] = {}
        for value in self._walk(jaxpr, [_Value() for _ in jaxpr.invars], looped=False):
            value.uses += 1

    def once(self, layer: int) -> bool:
        """Whether the layer is called exactly once."""
        return len(self.calls.get(layer, ())) == 1

    def source(self, norm: int) -> int | None:
        """The convolution whose output is this normalization's input, if it is one's."""
        return self._inputs[norm][0].layer if self.once(norm) else None

    def uses(self, convolution: int) -> int:
        """How many operations and layers take the output of a convolution that is called once."""
        return self._outputs[convolution][0].uses

    def _walk(self, jaxpr, given, looped):
        """The values of a jaxpr's results, from those of its arguments."""
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


def trace(function: Callable, *arguments) -> Flow:
    """The flow through `function(*arguments)`, any function of pytrees of arrays or `jax.ShapeDtypeStruct`."""
    arrays = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return Flow(jax.make_jaxpr(lambda *given: arrays(function(*given)))(*arguments).jaxpr)
