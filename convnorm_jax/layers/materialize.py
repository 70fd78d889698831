"""Makes XLA:CPU compute an array once, and when its producers can be freed."""

import jax
import jax.numpy as jnp

from convnorm_jax.layers.platforms import by_platform


def materialize(x: jax.Array, other: jax.Array) -> jax.Array:
    """Materializes x after `other`, so that XLA:CPU neither recomputes its producers nor keeps them alive.

    XLA:CPU recomputes a chain of cheap elementwise operations in every operation that reads the result, even element by
    element within a transpose. It never recomputes a division, and it removes barriers before it fuses. So x is divided
    by a 1 that XLA cannot recognize. This is for programs for the CPU only, see `platforms`. benchmarks/README.md,
    "step", has the measurements.

    Args:
      x: an array.
      other: a scalar, or an array of the rank of x that broadcasts with it. Where it is NaN, so is the result.

    Returns:
      x, unchanged where `other` is not NaN.
    """
    # NaN, not another finite number: with two finite constants XLA would multiply by their reciprocals.
    one = jnp.where(other == other, 1.0, jnp.nan).astype(x.dtype)
    one = jax.lax.stop_gradient(one)
    # The product is a second reader of the divisor. Without it XLA replaces the division by a product with 1 / one,
    # which is cheap enough to be recomputed in every reader.
    return x * one / one


@jax.custom_jvp
def materialized_output(x: jax.Array, other: jax.Array) -> jax.Array:
    """Materializes x, a layer's output, so that the backward pass (a ReLU's mask) reads it instead of recomputing it.

    The derivative is that of x alone. On accelerators the result is x itself.
    """
    return by_platform(x, other, cpu=materialize, accelerator=lambda x, other: x)


@materialized_output.defjvp
def _output_jvp(primals, tangents):
    return materialized_output(*primals), tangents[0]
