"""When XLA:CPU computes an array, and how often."""

import jax
import jax.numpy as jnp


def computed_once(x, other):
    """x, as an array of its own and only after `other`: XLA:CPU makes it once, and keeps what it is made of no longer.

    It would compute a chain of cheap elementwise operations anew in each operation that reads the result, within
    transposes too, element by element (a layer's whole normalization: 109 ms where the transpose takes 1). It takes a
    division for too costly for that, and barriers are gone by then. So this divides by 1, which XLA can not know.
    Elsewhere than on the CPU it is x itself.

    Args:
      x: an array.
      other: an array that broadcasts with it. Where it is NaN, so is what comes out: of the same example, or a kernel.
    """
    if jax.default_backend() != 'cpu':
        return x
    # (Not a finite number for NaN: XLA would multiply by the reciprocals of both.)
    one = jnp.where(other == other, 1.0, jnp.nan).astype(x.dtype)
    return x / jax.lax.stop_gradient(one)
