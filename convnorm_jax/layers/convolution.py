"""Full convolutions, ordinary and transposed, in a form that XLA:CPU differentiates well.

`reference.full_convolution` reads like the mathematics, and is the form for GPUs and TPUs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from convnorm_jax.layers import channelwise, derivatives, reference
from convnorm_jax.layers.geometry import Geometry, transposed_grid_size


def of_geometry(
    x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Returns the full convolution of a geometry; arguments and result as of `reference.full_convolution`."""
    if not geometry.plain or geometry.rank != 2:
        return _general(x, kernel, geometry, precision)
    if not geometry.mirrored and geometry.spread == (1, 1):
        return full_convolution(x, kernel, precision)
    # Not a cross-correlation, so a transposed convolution: only an axis with a single tap could be either.
    return full_transposed_convolution(x, kernel, geometry.spread, precision)


def _general(x, kernel, geometry, precision):
    """The full convolution with dilation, groups, circular padding, or 1 or 3 spatial axes."""
    depthwise = geometry.groups == x.shape[-1] == kernel.shape[-1]
    if set(geometry.spread) != {1} or geometry.mirrored:
        return reference.full_convolution(x, kernel, geometry, precision)
    mode = {'mode': 'wrap'} if geometry.circular else {}
    edges = [(k - 1, 0 if geometry.circular else k - 1) for k in geometry.spans]
    x = jnp.pad(x, [(0, 0), *edges, (0, 0)], **mode)  # as an array, see `full_convolution`
    if depthwise:  # XLA fuses these products; its grouped convolutions are slower
        starts = (range(0, k, d) for k, d in zip(geometry.spans, geometry.dilation))
        parts = channelwise.views(x, geometry.grid, starts)
        return channelwise.sum_of_products(parts, kernel.reshape(-1, kernel.shape[-1])).astype(x.dtype)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,) * geometry.rank,
        padding=[(0, 0)] * geometry.rank,
        rhs_dilation=geometry.dilation,
        dimension_numbers=reference.layouts(geometry.rank),
        feature_group_count=geometry.groups,
        precision=precision,
    )


def full_convolution(x: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Returns the cross-correlation with zero padding k-1 on each side, [B, H+kh-1, W+kw-1, cout].

    Half of the padding is a padded array, half is the convolution's own, which then is an ordinary 'SAME' convolution:
    XLA:CPU differentiates only those well. benchmarks/README.md, "Full convolutions on a CPU", has the measurements.

    Args:
      x: [B, H, W, cin], float.
      kernel: [kh, kw, cin, cout], the dtype of x.
      precision: of the products (`jax.lax.Precision`).
    """
    inside = [(k - 1) // 2 for k in kernel.shape[:2]]
    outside = [(k - 1 - p,) * 2 for k, p in zip(kernel.shape[:2], inside)]
    return jax.lax.conv_general_dilated(
        jnp.pad(x, ((0, 0), *outside, (0, 0))),
        kernel,
        (1, 1),
        [(p, p) for p in inside],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision,
    )


def full_transposed_convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int] = (1, 1),
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns the transposed convolution without any crop, the adjoint of a strided convolution.

    Each pixel adds its multiple of the kernel to the output, `strides` apart. This equals the full convolution of the
    image with zeros between its pixels, but is computed without the zeros: the taps fall into sh*sw groups, and an
    ordinary convolution with each group gives the rows and columns of one phase. XLA:CPU's own form, by lhs_dilation,
    has a slow backward pass; benchmarks/README.md, "Full convolutions on a CPU", has the measurements.

    Args:
      x: [B, H, W, cin].
      kernel: [kh, kw, cin, cout]; tap (a, b) of pixel (i, j) falls on (i*sh + a, j*sw + b), as in
        `torch.nn.functional.conv_transpose2d`, whose weight [cin, cout, kh, kw] transposed by (2, 3, 0, 1) this is.
      strides: (sh, sw).
      precision: of the products (`jax.lax.Precision`).

    Returns:
      [B, (H-1)*sh + kh, (W-1)*sw + kw, cout].
    """
    (kh, kw, cin, cout), (batch, height, width, _), (sh, sw) = kernel.shape, x.shape, strides
    th, tw = -(-kh // sh), -(-kw // sw)
    phases = jnp.pad(kernel, ((0, th * sh - kh), (0, tw * sw - kw), (0, 0), (0, 0))).reshape(th, sh, tw, sw, cin, cout)
    # Mirrored, for this is a convolution, and lax computes cross-correlations.
    phases = phases[::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5).reshape(th, tw, cin, sh * sw * cout)
    y = full_convolution(x, phases, precision)
    rows, columns = y.shape[1:3]
    y = y.reshape(batch, rows, columns, sh, sw, cout).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, rows * sh, columns * sw, cout)
    full = transposed_grid_size((height, width), (kh, kw), strides)
    # A stride above the kernel's size leaves gaps, also after the last pixel's taps.
    return y[:, : full[0], : full[1]]


def pointwise(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Returns a 1x1 convolution, [B, ceil(H / sh), ceil(W / sw), cout].

    Args:
      x: [B, H, W, cin].
      kernel: [1, 1, cin, cout].
      strides: (sh, sw).
      precision: of the products (`jax.lax.Precision`).
    """
    return _pointwise(tuple(strides), precision)(x, kernel)


@functools.lru_cache(maxsize=64)  # one function object for each layer, so that JAX compiles it once in eager mode too
def _pointwise(strides, precision):
    def product(x, kernel):
        return jnp.matmul(x[:, :: strides[0], :: strides[1]], kernel[0, 0], precision=precision)

    def convolution(x, kernel):
        # XLA of jax 0.10 aborts on a product of a strided slice on a GPU, see benchmarks/README.md.
        return jax.lax.conv_general_dilated(
            x, kernel, strides, 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=precision
        )

    return derivatives.by_platform_differentiable(product, convolution)
