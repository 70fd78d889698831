"""The spectral norm of a kernel, as a matrix or as a convolution, by power iteration: pure functions of arrays."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from convnorm_jax.layers.orthogonal import as_matrix
from convnorm_jax.layers.reference import layouts

LinearMap = Callable[[jax.Array], jax.Array]

# Up to this many power iterations are unrolled; more go through a loop.
_MOST_UNROLLED = 2

# Products of float32 stay float32; the default on accelerators is TF32 or bfloat16.
_EXACT = jax.lax.Precision.HIGHEST


def normalized(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Returns x / max(||x||, eps), for an array of any shape."""
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum()), eps)


def safe_divisor(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Returns x, and 1 where `|x| < eps`, so that a kernel of zeros can be divided by its norm."""
    return jnp.where(jnp.abs(x) < eps, 1.0, x)


def reshaped_operator(kernel: jax.Array) -> LinearMap:
    """Returns the linear map v -> `as_matrix(kernel)` v, PyTorch's notion of a convolution as a matrix."""
    matrix = as_matrix(kernel)
    return lambda v: jnp.dot(matrix, v, precision=_EXACT)


def convolution_operator(
    kernel: jax.Array,
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    groups: int = 1,
) -> LinearMap:
    """Returns the convolution itself as a linear map, [H, W, cin] -> [H', W', cout], float32.

    Args:
      kernel: [kh, kw, cin, cout].
      strides, padding, groups: see `convolve`.
    """
    kernel = kernel.astype(jnp.float32)
    return lambda v: convolve(v[None], kernel, strides, padding, _EXACT, groups)[0]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    precision: jax.lax.PrecisionLike = None,
    groups: int = 1,
) -> jax.Array:
    """Returns the cross-correlation of a batch of images with a kernel, [B, H', W', cout].

    Args:
      x: [B, H, W, cin], or with 1 or 3 spatial axes.
      kernel: [kh, kw, cin / groups, cout].
      strides: an int for each axis.
      padding: as in `jax.lax.conv_general_dilated`, or 'CIRCULAR' as in `flax.linen.Conv`: the image is periodic, and
        padded by (k-1)//2 before and k//2 after.
      precision: of the products (`jax.lax.Precision`).
      groups: groups of channels, flax's `feature_group_count`.
    """
    if padding == 'CIRCULAR':
        pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:-2]]
        x = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode='wrap')
        padding = 'VALID'
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=layouts(kernel.ndim - 2),
        feature_group_count=groups,
        precision=precision,
    )


def power_iteration(
    operator: LinearMap, u: jax.Array, v: jax.Array, iterations: int = 1, eps: float = 1e-12
) -> tuple[jax.Array, jax.Array]:
    r"""Returns u and v after iterations towards the leading left and right singular vectors of a linear map A.

    One iteration is that of `torch.nn.utils.spectral_norm`:

    .. math::
        v \leftarrow A^T u / \|A^T u\|, \qquad u \leftarrow A v / \|A v\|

    A result of zeros, from a kernel of zeros, is discarded, because the iteration could never leave it. The function is
    not meant to be differentiated.

    Args:
      operator: the linear map A, from arrays of v's shape to arrays of u's shape.
      u, v: float32.
      iterations: number of iterations; 0 returns u and v.
      eps: see `normalized`.
    """

    def step(_, pair):
        u, v = pair
        # Only the transpose of the vjp is used, and that of a linear map is the same everywhere.
        v = _moved(v, jax.vjp(operator, v)[1](u)[0], eps)
        return _moved(u, operator(v), eps), v

    if iterations > _MOST_UNROLLED:
        return jax.lax.fori_loop(0, iterations, step, (u, v))
    for i in range(iterations):
        u, v = step(i, (u, v))
    return u, v


def _moved(old, new, eps):
    return jnp.where(jnp.any(new != 0), normalized(new, eps), old)


def norm_estimate(operator: LinearMap, u: jax.Array, v: jax.Array) -> jax.Array:
    """Returns the estimate <u, A v> of the norm of a linear map A, float32 scalar.

    It equals the norm once u and v have converged, and for unit u and v it is never above. u and v are constants to
    differentiation, so the gradient with respect to A is u v^T.
    """
    u, v = jax.lax.stop_gradient((u, v))
    return (u * operator(v)).sum()


def convolution_norm(
    kernel: jax.Array,
    image_size: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    iterations: int = 100,
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns the operator norm of a convolution on images of one size, by power iteration.

    It is an estimate from below, exact only in the limit: report it as measured.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      image_size: (H, W).
      strides, padding: see `convolve`.
      iterations: number of power iterations.
      key: of the random start; None takes a fixed one.

    Returns:
      float32 scalar, differentiable with respect to the kernel.
    """
    operator = convolution_operator(kernel, strides, padding)
    constant = convolution_operator(jax.lax.stop_gradient(kernel), strides, padding)
    key = jax.random.key(0) if key is None else key
    v = normalized(jax.random.normal(key, (*image_size, kernel.shape[2]), jnp.float32))
    u, v = power_iteration(constant, normalized(constant(v)), v, iterations)
    return norm_estimate(operator, u, v)
