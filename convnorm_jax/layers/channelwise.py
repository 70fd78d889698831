"""The channel-wise convolution: every channel with its own filter. It is the learned affine part of ConvNorm."""

import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from convnorm_jax.layers import derivatives
from convnorm_jax.layers.dtypes import at_least_float32
from convnorm_jax.layers.platforms import by_platform


def channelwise_convolution(x: jax.Array, kernel: jax.Array, circular: bool = False) -> jax.Array:
    """Returns every channel convolved with its own filter, at stride 1 and with the size of x.

    The padding is (k-1)//2 before and k//2 after on each axis. It is computed as k*k shifted multiply-adds, which XLA
    fuses into one pass; on the CPU `feature_group_count` was slower.

    Args:
      x: [B, H, W, C], or with another number of spatial axes.
      kernel: [kh, kw, C], with as many spatial axes.
      circular: True pads periodically, False with zeros.

    Returns:
      An array of the shape and dtype of x.
    """
    return derivatives.call(_rule(circular), x, kernel)[0]


def weighted_sum(x: jax.Array, kernel: jax.Array, circular: bool = False) -> jax.Array:
    """Returns `channelwise_convolution` in float32 at least, with JAX's own derivatives."""
    return sum_of_products(shifted(x, kernel.shape[:-1], circular), kernel.reshape(-1, kernel.shape[-1]))


def sum_of_products(parts: Sequence[jax.Array], taps: jax.Array) -> jax.Array:
    """Returns the sum over n of parts[n] * taps[n], [B, H, W, C], float32 at least; taps: [number, C]."""
    wide = at_least_float32(parts[0].dtype)  # a sum in bfloat16 would round each of its k*k terms
    # `jax.lax`, here and below: the operators of jax.numpy take five times as long to trace.
    products = [
        jax.lax.mul(jax.lax.convert_element_type(part, wide), over_channels(tap, part))
        for part, tap in zip(parts, taps.astype(wide))
    ]
    return functools.reduce(jax.lax.add, products)


def over_channels(a: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a, [C], reshaped to [1, ..., C] so that it broadcasts with x."""
    return a.reshape((1,) * (x.ndim - 1) + a.shape)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x + bias, [..., C], in the dtype of x.

    The addition, and so the sum that is the gradient of the bias, is in float32 at least.
    """
    wide = at_least_float32(x.dtype)
    return (x.astype(wide) + over_channels(bias.astype(wide), x)).astype(x.dtype)


def shifted(x: jax.Array, kernel_size: tuple[int, ...], circular: bool = False) -> list[jax.Array]:
    """Returns the k*k shifted views of x that the taps of a channel-wise convolution multiply, in the order of taps."""
    size = x.shape[1:-1]
    if circular:
        x = jnp.pad(x, [(0, 0), *(((k - 1) // 2, k // 2) for k in kernel_size), (0, 0)], mode='wrap')
    else:
        edges = [(0, 0, 0), *(((k - 1) // 2, k // 2, 0) for k in kernel_size), (0, 0, 0)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
    return views(x, size, map(range, kernel_size))


def views(x: jax.Array, size: Sequence[int], starts: Iterable[range]) -> list[jax.Array]:
    """Returns slices of x, [B, H, W, C], of one `size`, one for every combination of the starts on each axis."""

    def view(origin):
        part = x
        for axis, (start, n) in enumerate(zip(origin, size), 1):
            part = jax.lax.slice_in_dim(part, start, start + n, axis=axis)
        return part

    return [view(origin) for origin in itertools.product(*starts)]


def transpose(y: jax.Array, kernel: jax.Array, circular: bool = False) -> jax.Array:
    """Returns the adjoint of x -> weighted_sum(x, kernel), applied to y: the same sum with the flipped filter."""
    # An even filter reaches further right than left, so the flipped one must reach further left.
    even = [(0, 1 - k % 2) for k in kernel.shape[:-1]]
    flipped = jnp.flip(kernel, tuple(range(kernel.ndim - 1)))
    return weighted_sum(y, jnp.pad(flipped, (*even, (0, 0))), circular)


def tap_products(x: jax.Array, y: jax.Array, kernel_size: tuple[int, ...], circular: bool = False) -> jax.Array:
    """Returns the gradient with respect to the kernel, [kh, kw, C], for the cotangent y.

    For each tap it is the sum over batch and image of y times the shifted x.
    """
    wide = at_least_float32(x.dtype)
    y = y.astype(wide)
    products = [jax.lax.mul(jax.lax.convert_element_type(part, wide), y) for part in shifted(x, kernel_size, circular)]
    sums = by_platform(*products, cpu=_sums_in_one_pass, tpu=_sums_each, accelerator=_sums_of_stack)
    return sums.reshape(*kernel_size, -1)


def _sums_of_stack(*products):
    # XLA makes one GPU kernel of this, but nine kernels, with their partial sums, of nine reductions.
    stack = jnp.stack(products)
    return stack.sum(tuple(range(1, stack.ndim - 1)))


def _sums_each(*products):
    # On a TPU XLA would materialize the stack; it fuses separate reductions.
    return jnp.stack([product.sum(tuple(range(product.ndim - 1))) for product in products])


def _sums_in_one_pass(*products):
    # One pass for all taps, first over the rows only: short sums keep float32 accurate. Not over the batch: XLA has no
    # all-reduce of nine sums at once, and would gather a batch that is sharded over devices.
    zeros, axis = [jnp.zeros((), products[0].dtype)] * len(products), products[0].ndim - 2
    sums = jax.lax.reduce(list(products), zeros, lambda a, b: [jax.lax.add(p, q) for p, q in zip(a, b)], (axis,))
    stack = jnp.stack(jax.lax.optimization_barrier(sums))
    return stack.sum(tuple(range(1, stack.ndim - 1)))


@functools.cache
def _rule(circular):
    @jax.jit
    def function(x, kernel):
        return (weighted_sum(x, kernel, circular).astype(x.dtype),)

    @functools.partial(jax.jit, static_argnums=(3,))
    def gradient(arguments, _, cotangents, wanted):
        x, kernel = arguments
        # Without the barriers XLA:CPU recomputes the cotangent for each tap that reads it.
        cotangent = jax.lax.optimization_barrier(cotangents[0])
        found = {}
        if 0 in wanted:
            found[0] = jax.lax.optimization_barrier(transpose(cotangent, kernel, circular).astype(x.dtype))
        if 1 in wanted:
            found[1] = tap_products(x, cotangent, kernel.shape[:-1], circular).astype(kernel.dtype)
        return tuple(found[i] for i in wanted)

    return derivatives.Rule(function, gradient, function)
