"""Full convolutions, ordinary and transposed, in the form that XLA:CPU differentiates well.

`reference.full_convolution` is the one that reads like the mathematics; a GPU's and a TPU's compilers take that.
"""

import functools

import jax
import jax.numpy as jnp

from convnorm_jax.layers import channelwise, derivatives, reference
from convnorm_jax.layers.geometry import Geometry, transposed_grid_size


def of_geometry(
    x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """`reference.full_convolution` by the functions below. Args and Returns: as there."""
    if not geometry.plain or geometry.rank != 2:
        return _general(x, kernel, geometry, precision)
    if not geometry.mirrored and geometry.spread == (1, 1):
        return full_convolution(x, kernel, precision)
    # Taps that run backwards on one axis only do not occur but for a single tap.
    return full_transposed_convolution(x, kernel, geometry.spread, precision)


def _general(x, kernel, geometry, precision):
    """Dilated, grouped, circular, in 1 to 3 dimensions."""
    depthwise = geometry.groups == x.shape[-1] == kernel.shape[-1]
    if set(geometry.spread) != {1} or geometry.mirrored:
        return reference.full_convolution(x, kernel, geometry, precision)
    mode = {'mode': 'wrap'} if geometry.circular else {}
    edges = [(k - 1, 0 if geometry.circular else k - 1) for k in geometry.spans]
    x = jnp.pad(x, [(0, 0), *edges, (0, 0)], **mode)  # by hand, see `full_convolution`
    if depthwise:  # products that XLA fuses: its grouped convolutions are slower
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


def full_convolution(x, kernel, precision=None):
    """Cross-correlation with zero padding k-1 on each side, [B, H+kh-1, W+kw-1, cout].

    Half of the padding is by hand, half by the convolution, which then is an ordinary
    'SAME' one. XLA:CPU differentiates only that well (32x32, 64 channels, batch 32,
    forward and both gradients, ms: all by the convolution 899, all by hand 80, so 38, a
    plain convolution 35).
    """
    inside = [(k - 1) // 2 for k in kernel.shape[:2]]
    by_hand = [(k - 1 - p,) * 2 for k, p in zip(kernel.shape[:2], inside)]
    return jax.lax.conv_general_dilated(
        jnp.pad(x, ((0, 0), *by_hand, (0, 0))),
        kernel,
        (1, 1),
        [(p, p) for p in inside],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision,
    )


def full_transposed_convolution(x, kernel, strides=(1, 1), precision=None):
    """Every pixel paints the kernel, `strides` apart: the adjoint of a strided convolution, uncropped.

    It is the full convolution of the picture with zeros put between its pixels. Computed
    without them: the kernel's taps fall into sh*sw groups, each making the rows and columns of
    one phase by an ordinary convolution. (XLA:CPU's own, by lhs_dilation, has a backward
    pass 10 times slower; 16x16 to 34x34, 64 channels, batch 32, forward and both gradients,
    ms: 1293 against 101, and 238 with the zeros.)

    Args:
      x: [B, H, W, cin].
      kernel: [kh, kw, cin, cout]; tap (a, b) of pixel (i, j) falls on (i*sh + a, j*sw + b),
        as those of `torch.nn.functional.conv_transpose2d`: its weight [cin, cout, kh, kw],
        transposed (2, 3, 0, 1).
      strides: (sh, sw).
      precision: of the products (`jax.lax.Precision`).

    Returns:
      [B, (H-1)*sh + kh, (W-1)*sw + kw, cout].
    """
    (kh, kw, cin, cout), (batch, height, width, _), (sh, sw) = kernel.shape, x.shape, strides
    th, tw = -(-kh // sh), -(-kw // sw)
    phases = jnp.pad(kernel, ((0, th * sh - kh), (0, tw * sw - kw), (0, 0), (0, 0))).reshape(th, sh, tw, sw, cin, cout)
    # A convolution, where lax has cross-correlations: mirrored.
    phases = phases[::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5).reshape(th, tw, cin, sh * sw * cout)
    y = full_convolution(x, phases, precision)
    rows, columns = y.shape[1:3]
    y = y.reshape(batch, rows, columns, sh, sw, cout).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, rows * sh, columns * sw, cout)
    full = transposed_grid_size((height, width), (kh, kw), strides)
    # A stride above the kernel's size leaves gaps, also behind the last pixel's taps.
    return y[:, : full[0], : full[1]]


def pointwise(x, kernel, strides, precision=None):
    """A 1x1 convolution, [B, H, W, cin] -> [B, ceil(H / sh), ceil(W / sw), cout]; kernel: [1, 1, cin, cout]."""
    return _pointwise(tuple(strides), precision)(x, kernel)


@functools.lru_cache(maxsize=64)  # the same function for the same layer: JAX then compiles it once in eager mode, too
def _pointwise(strides, precision):
    def product(x, kernel):
        return jnp.matmul(x[:, :: strides[0], :: strides[1]], kernel[0, 0], precision=precision)

    def convolution(x, kernel):
        # A product of a strided slice makes jax 0.10's XLA abort for a GPU, see benchmarks/README.md.
        return jax.lax.conv_general_dilated(
            x, kernel, strides, 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=precision
        )

    return derivatives.by_platform_differentiable(product, convolution)
