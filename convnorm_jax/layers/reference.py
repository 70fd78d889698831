"""ConvNorm's normalized convolution as the paper writes it (arXiv 2103.00673): the file to read first.

::

    y = full convolution of x with the kernel                 [B, Hf, Wf, cout]
    V[o](w) = (sum_i |fft2(kernel[i, o])(w)|^2)^(-1/2)        the preconditioner, a constant to differentiation
    output = irfft2(V * rfft2(y)), then crop and stride

Every line is an ordinary JAX operation, so this form runs everywhere and is differentiable in every mode. `operation`
chooses between it and the faster forms, which compute the same: `filters` (a convolution, and the filter as products
with small matrices) and `frequency` (all in the frequency domain, for XLA:CPU).
"""

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.layers.dtypes import at_least_float32
from convnorm_jax.layers.geometry import Geometry


def normalized_convolution(
    x: jax.Array, kernel: jax.Array, v: jax.Array, geometry: Geometry, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Returns the full convolution, filtered by V, cropped and strided.

    Args:
      x: [B, H, W, cin], float, or with another number of spatial axes, here and below.
      kernel: [kh, kw, cin / groups, cout], float; it is rounded to the dtype of x.
      v: [Hf, Wf, cout], real and even: V(w) = V(-w).
      geometry: the positions of pixels and taps on the grid, and which positions of the grid are kept.
      precision: of the convolution.

    Returns:
      [B, len(kept rows), len(kept columns), cout], the dtype of x. The transforms are float32 at least.
    """
    y = full_convolution(x, kernel.astype(x.dtype), geometry, precision)
    axes = tuple(range(1, 1 + geometry.rank))
    spectrum = jnp.fft.rfftn(y.astype(at_least_float32(y.dtype)), axes=axes)
    half = v[None, ..., : geometry.grid[-1] // 2 + 1, :].astype(spectrum.dtype)
    z = jnp.fft.irfftn(spectrum * half, s=geometry.grid, axes=axes)
    for axis, places in zip(axes, geometry.kept):
        z = jnp.take(z, np.array(places), axis=axis)
    return z.astype(x.dtype)


def full_convolution(
    x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Returns the full convolution: stride 1, and zero padding K-1 on each side with K = (k-1) d + 1.

    A periodic image (`geometry.circular`) is padded with its last K-1 pixels before the first one instead.

    Args:
      x: [B, H, W, cin].
      kernel: [kh, kw, cin / groups, cout], the dtype of x.
      geometry: its `inputs` may be `stride` apart, as in a transposed convolution; its `taps` run backwards for a
        cross-correlation, forwards for a convolution.

    Returns:
      [B, Hf, Wf, cout].
    """
    edges = [(k - 1, k - 1) for k in geometry.spans]
    if geometry.circular:
        x = jnp.pad(x, [(0, 0), *((k - 1, 0) for k in geometry.spans), (0, 0)], mode='wrap')
        edges = [(0, 0)] * geometry.rank
    return jax.lax.conv_general_dilated(
        x,
        jnp.flip(kernel, geometry.mirrored) if geometry.mirrored else kernel,
        window_strides=(1,) * geometry.rank,
        padding=edges,
        lhs_dilation=geometry.spread,
        rhs_dilation=geometry.dilation,
        dimension_numbers=layouts(geometry.rank),
        feature_group_count=geometry.groups,
        precision=precision,
    )


def layouts(rank: int) -> tuple[str, str, str]:
    """Returns the layouts of image, kernel and output for `jax.lax.conv_general_dilated`, with channels last."""
    axes = 'DHW'[-rank:]
    return f'N{axes}C', f'{axes}IO', f'N{axes}C'


def power_spectrum(kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns the power spectrum `sum_i |fft2(kernel[..., i, o])(w)|^2` on the full grid, [Hf, Wf, cout].

    Args:
      kernel: [kh, kw, cin / groups, cout], float.
      geometry: of the layer.
    """
    for axis, (taps, n) in enumerate(zip(geometry.taps, geometry.grid)):  # each tap to its position on the grid
        places = np.equal.outer(np.arange(n), np.array(taps) % n).astype(kernel.dtype)
        kernel = jnp.moveaxis(jnp.tensordot(places, kernel, (1, axis), precision='highest'), 0, axis)
    return jnp.square(jnp.abs(jnp.fft.fftn(kernel, axes=tuple(range(geometry.rank))))).sum(axis=-2)
