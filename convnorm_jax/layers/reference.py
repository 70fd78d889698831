"""ConvNorm's normalized convolution as the paper writes it: the file to read first (arXiv 2103.00673).

    y = full convolution of x with the kernel                 [B, Hf, Wf, cout]
    V[o](w) = (sum_i |fft2(kernel[i, o])(w)|^2)^(-1/2)        the preconditioner, a constant to differentiation
    output = irfft2(V * rfft2(y)), then crop and stride

Every line is an ordinary JAX operation, so this form is differentiable in every mode and runs everywhere. `operation`
chooses between it and the faster forms, which compute the same: `filters` (a convolution, and the filter as products
with small matrices) and `frequency` (all of it in the frequency domain, for XLA:CPU).
"""

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.layers.bilinear import Geometry
from convnorm_jax.layers.dtypes import at_least_float32


def normalized_convolution(
    x: jax.Array, kernel: jax.Array, v: jax.Array, geometry: Geometry, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Full convolution, irfft2(V * rfft2(.)), crop and stride.

    Args:
      x: [B, H, W, cin], float.
      kernel: [kh, kw, cin, cout], float; rounded to the dtype of x.
      v: [Hf, Wf, cout], real and even.
      geometry: where the pixels and the taps lie on the grid, and what is kept of it.
      precision: of the convolution.

    Returns:
      [B, len(kept rows), len(kept columns), cout], the dtype of x. The transforms are float32 at least.
    """
    y = full_convolution(x, kernel.astype(x.dtype), geometry, precision)
    height, width = geometry.grid
    spectrum = jnp.fft.rfft2(y.astype(at_least_float32(y.dtype)), axes=(1, 2))
    half = v[None, :, : width // 2 + 1].astype(spectrum.dtype)
    filtered = jnp.fft.irfft2(spectrum * half, s=(height, width), axes=(1, 2))
    rows, columns = geometry.kept
    return filtered[:, np.array(rows)][:, :, np.array(columns)].astype(x.dtype)


def full_convolution(
    x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Convolution with every tap that touches a pixel: zero padding k-1 on each side, stride 1.

    Args:
      x: [B, H, W, cin]. kernel: [kh, kw, cin, cout], the dtype of x.
      geometry: its `inputs` may lie `stride` apart, as a transposed convolution's do; its `taps` run backwards for a
        cross-correlation, forwards for a convolution.

    Returns:
      [B, Hf, Wf, cout].
    """
    flipped = tuple(axis for axis, taps in enumerate(geometry.taps) if len(taps) > 1 and taps[0] < taps[-1])
    return jax.lax.conv_general_dilated(
        x,
        jnp.flip(kernel, flipped) if flipped else kernel,
        window_strides=(1, 1),
        padding=[(k - 1, k - 1) for k in kernel.shape[:2]],
        lhs_dilation=tuple(places[1] - places[0] if len(places) > 1 else 1 for places in geometry.inputs),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision,
    )


def power_spectrum(kernel: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """sum_i |fft2(kernel[..., i, o], grid)|^2 on the full grid, [Hf, Wf, cout]; kernel: [kh, kw, cin, cout]."""
    return jnp.square(jnp.abs(jnp.fft.fft2(kernel, s=grid, axes=(0, 1)))).sum(axis=2)
