"""Functions with a hand-written reverse-mode derivative that remain differentiable in every mode.

`jax.custom_vjp` rules out forward mode. Here the tangents of a function are one primitive that is linear in them. Its
transpose is the hand-written gradient. In forward mode, and for higher derivatives, it is the tangent of an ordinary
JAX function that computes the same. The gradient is told with respect to which arguments it is needed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from convnorm_jax.layers.platforms import by_platform


@dataclasses.dataclass(frozen=True)
class Rule:
    """A function with its derivative. All three functions must be hashable.

    Attributes:
      function: `(*arguments)` -> tuple of arrays, the fast form.
      gradient: `(arguments, outputs, cotangents, wanted)` -> one array for each index in `wanted`, the gradient with
        respect to that argument. `outputs` holds the outputs of the function whose indices are in `kept`.
      ordinary: `(*arguments)` -> the same as `function`, by operations that JAX differentiates in every mode.
      kept: indices of the outputs that the gradient receives.
    """

    function: Callable[..., tuple[jax.Array, ...]]
    gradient: Callable[..., Sequence[jax.Array]]
    ordinary: Callable[..., tuple[jax.Array, ...]]
    kept: tuple[int, ...] = ()

    def tangents(
        self, primals: Sequence[jax.Array], given: Sequence[jax.Array], moved: Sequence[int]
    ) -> tuple[jax.Array, ...]:
        """Returns the tangents of the outputs.

        Args:
          primals: the arguments.
          given: tangents of the arguments whose indices are in `moved`; the other tangents are zero.
          moved: indices of arguments.
        """

        def of_moved(*changed):
            full = list(primals)
            for i, value in zip(moved, changed):
                full[i] = value
            return tuple(self.ordinary(*full))

        return jax.jvp(of_moved, [primals[i] for i in moved], list(given))[1]


def call(rule: Rule, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    """Returns `rule.function(*arguments)`, differentiated by the rule."""
    return _differentiable(rule)(*varying_alike(*arguments))


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays, all varying over the union of their mesh axes, so that `jax.shard_map` sums the gradients."""
    axes = [_axes_varied_over(a) for a in arrays]
    union = frozenset().union(*axes)
    return tuple(_vary(a, tuple(sorted(union - own))) if union - own else a for a, own in zip(arrays, axes))


def _axes_varied_over(x):
    kind = jax.typeof(x)
    if hasattr(kind, 'manual_axis_type'):  # from jax 0.10
        return kind.manual_axis_type.varying
    return kind.vma


def _vary(x, axes):
    if hasattr(jax.lax, 'pcast'):
        return jax.lax.pcast(x, axes, to='varying')
    return jax.lax.pvary(x, axes)  # before jax 0.8


@functools.lru_cache(maxsize=1024)
def _differentiable(rule):
    @jax.custom_jvp
    def function(*arguments):
        return rule.function(*arguments)

    @functools.partial(function.defjvp, symbolic_zeros=True)
    def jvp(primals, tangents):
        outputs = function(*primals)
        moved = tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))
        kept = [outputs[i] for i in rule.kept]
        outputs_like = tuple(jax.typeof(y) for y in outputs)
        given = [tangents[i] for i in moved]
        changes = _tangent.bind(*primals, *kept, *given, rule=rule, moved=moved, like=outputs_like)
        return outputs, tuple(changes)

    return function


# (*arguments, *kept outputs, *tangents of the arguments in `moved`) -> tangents of the outputs
_tangent = Primitive('tangent_with_gradient')
_tangent.multiple_results = True


def _parts(arguments, rule, moved):
    count = len(arguments) - len(moved) - len(rule.kept)
    kept = count + len(rule.kept)
    return arguments[:count], arguments[count:kept], arguments[kept:]


def _by_ordinary(*arguments, rule, moved, like):
    """The tangents of the outputs in forward mode."""
    del like
    primals, _, given = _parts(arguments, rule, moved)
    return list(rule.tangents(primals, given, moved))


def _abstract(*arguments, rule, moved, like):
    del arguments, rule, moved
    return list(like)


def _jvp(arguments, tangents, **parameters):
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(lambda *a: _by_ordinary(*a, **parameters), list(arguments), tangents)


def _transpose(cotangents, *arguments, rule, moved, like):
    primals, kept, _ = _parts(arguments, rule, moved)
    fixed = [None] * (len(primals) + len(kept))
    if all(type(c) is ad.Zero for c in cotangents):
        return fixed + [None] * len(moved)
    filled = [ad.instantiate_zeros(c) for c in cotangents]
    primals = varying_alike(*primals, *filled)[: len(primals)]
    return fixed + list(rule.gradient(primals, kept, filled, moved))


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A rule under `jax.vmap`; tangents, outputs and gradients are mapped over their first axis."""

    rule: 'Rule | _Mapped'
    axes: tuple[int | None, ...]  # of the arguments, as `in_axes` of `jax.vmap`
    kept_axes: tuple[int | None, ...]

    @property
    def kept(self):
        return self.rule.kept

    def tangents(self, primals, given, moved):
        tangents = lambda primals, given: self.rule.tangents(primals, given, moved)
        return jax.vmap(tangents, in_axes=(self.axes, 0))(tuple(primals), tuple(given))

    def gradient(self, primals, kept, cotangents, wanted):
        gradient = lambda *given: tuple(self.rule.gradient(*given, wanted))
        mapped = jax.vmap(gradient, in_axes=(self.axes, self.kept_axes, 0))
        return mapped(tuple(primals), tuple(kept), tuple(cotangents))


def _batch(arguments, axes, *, rule, moved, like):
    size = next(a.shape[axis] for a, axis in zip(arguments, axes) if axis is not None)
    front = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arguments, axes)]
    axes = tuple(None if axis is None else 0 for axis in axes)
    count = len(arguments) - len(moved)
    # Every tangent is broadcast over the examples, so that the transpose of the broadcast sums over them.
    for i in range(count, len(front)):
        if axes[i] is None:
            front[i] = jnp.broadcast_to(front[i], (size, *front[i].shape))
    split = count - len(rule.kept)
    parameters = {'rule': _Mapped(rule, axes[:split], axes[split:count]), 'moved': moved}
    types = jax.make_jaxpr(functools.partial(_by_ordinary, **parameters, like=()))(*front).out_avals
    like = tuple(kind.update(weak_type=False) for kind in types)
    return _tangent.bind(*front, **parameters, like=like), [0] * len(like)


_tangent.def_impl(_by_ordinary)
_tangent.def_abstract_eval(_abstract)
ad.primitive_jvps[_tangent] = _jvp
ad.primitive_transposes[_tangent] = _transpose
batching.primitive_batchers[_tangent] = _batch
mlir.register_lowering(_tangent, mlir.lower_fun(_by_ordinary, multiple_results=True))


def by_platform_differentiable(cpu: Callable, accelerator: Callable) -> Callable:
    """Returns a function of arrays that runs `cpu` or `accelerator`, by the platform of the program.

    Both compute the same array, and each is differentiated on its own.
    """

    def gradient(arguments, _, cotangents, wanted):
        forms = (functools.partial(_gradients_of, form, wanted) for form in (cpu, accelerator))
        return by_platform(*arguments, *cotangents, cpu=next(forms), accelerator=next(forms))

    rule = Rule(
        lambda *a: (by_platform(*a, cpu=cpu, accelerator=accelerator),), gradient, lambda *a: (accelerator(*a),)
    )
    return lambda *arguments: call(rule, *arguments)[0]


def _gradients_of(function, wanted, *given):
    *arguments, cotangent = given
    return wanted_gradients(function, arguments, cotangent, wanted)


def wanted_gradients(
    function: Callable, arguments: Sequence[jax.Array], cotangent: Any, wanted: Sequence[int]
) -> tuple[jax.Array, ...]:
    """Returns JAX's own gradients of `function(*arguments)` with respect to the arguments whose indices are `wanted`.

    Args:
      cotangent: of the function's output, a pytree of the same structure.
    """

    def of_wanted(*changed):
        full = list(arguments)
        for i, value in zip(wanted, changed):
            full[i] = value
        return function(*full)

    return jax.vjp(of_wanted, *(arguments[i] for i in wanted))[1](cotangent)
