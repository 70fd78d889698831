"""ConvNorm as functions of arrays, for any JAX library or none.

The operation, for a kernel of one's own:

    v = preconditioner(kernel, (32, 32))
    y = conv_norm(x, kernel, v)          # or conv_norm(x, kernel): of the kernel as it is now

The whole layer, as the Linen, NNX and Equinox ones call it:

    settings = Settings(features=64, kernel_size=(3, 3))
    params = initial_params(settings, jax.random.key(0), features_in=3)
    state = initial_state(settings, params['kernel'], (32, 32))
    y, state = apply(settings, params, state, x, use_running_average=False)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from convnorm_jax.errors import UserError
from convnorm_jax.layers import core, operation
from convnorm_jax.layers.core import Settings, apply, initial_params, initial_state, running_average, update_weight
from convnorm_jax.layers.dtypes import widened
from convnorm_jax.layers.geometry import by_x, channels_in_a_group, ints_for_axes
from convnorm_jax.layers.spectral import is_pointwise

__all__ = [
    'Settings',
    'apply',
    'conv_norm',
    'initial_params',
    'initial_state',
    'preconditioner',
    'running_average',
    'update_weight',
]


def conv_norm(
    x: jax.Array,
    kernel: jax.Array,
    preconditioner: jax.Array | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence = 'SAME',
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    method: str | None = None,
    dtype: jnp.dtype | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""Convolution with each output channel divided by the square root of its power spectrum.

    .. math::
        z_o = S\,F^{-1}\bigl(V_o\, F(x * k_o)\bigr), \qquad
        V_o(\omega) = \Bigl(\sum_i |F k_{io}(\omega)|^2\Bigr)^{-1/2}

    with :math:`x * k` the full convolution and :math:`S` the crop and the stride (arXiv 2103.00673, section 3). The
    gradient takes V as a constant, as the paper does.

    Args:
      x: [B, \*spatial, cin], float, with 1, 2 or 3 spatial axes.
      kernel: [\*kernel, cin / groups, cout], float.
      preconditioner: V on the grid of the full convolution, [\*grid, cout], real and even; None is the kernel's own.
      strides, dilation: int, or an int for each axis.
      padding: 'SAME', 'VALID', 'CIRCULAR', int, or an int or a pair for each axis. Of a transposed convolution what is
        cropped, an int, or an int or a pair for each axis.
      groups: of channels, each with filters of its own.
      transposed: a transposed convolution, as `torch.nn.functional.conv_transpose2d`.
      method, dtype, precision: see `convnorm_jax.ConvNorm`.

    Returns:
      [B, \*spatial', cout], of `dtype`, or of x and kernel promoted.

    Raises:
      ValueError: shapes or arguments that do not belong together.

    Example:
      >>> x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
      >>> conv_norm(x, kernel, strides=2).shape
      (2, 4, 4, 16)
    """
    settings = _settings(kernel, strides, padding, dilation, groups, transposed, method, dtype, precision)
    settings.check_shape(x.shape)
    if x.shape[-1] != kernel.shape[-2] * groups:
        raise UserError(
            f'x.shape={x.shape} with kernel.shape={kernel.shape} and groups={groups}: '
            f'expected {kernel.shape[-2] * groups} channels'
        )
    geometry = settings.geometry(x.shape[1:-1])
    kernel = widened(kernel, dtype or x.dtype)
    if preconditioner is None:
        preconditioner = operation.preconditioner(kernel, geometry, method, x.shape[0])
    grid = (1,) * geometry.rank if is_pointwise(kernel) else geometry.grid
    if preconditioner.shape != (*grid, kernel.shape[-1]):
        raise UserError(
            f'preconditioner.shape={preconditioner.shape}: expected {(*grid, kernel.shape[-1])} for images of '
            f'{by_x(x.shape[1:-1])}'
        )
    return core.convolve(settings, x, kernel, preconditioner, geometry)


def preconditioner(
    kernel: jax.Array,
    image_size: int | Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence = 'SAME',
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
) -> jax.Array:
    r"""V of a kernel, for images of one size: :math:`V_o(\omega) = (\sum_i |F k_{io}(\omega)|^2)^{-1/2}`.

    Args:
      kernel: [\*kernel, cin / groups, cout], float.
      image_size: int, or an int for each spatial axis.
      The others: see `conv_norm`.

    Returns:
      [\*grid, cout], float32 at least, without gradient; the grid is that of the full convolution, or of the image if
      it is circular, and 1 where the kernel has one tap. The spectrum is at least 1e-10 of its mean.

    Example:
      >>> preconditioner(jnp.ones((3, 3, 3, 16)), (8, 8)).shape
      (10, 10, 16)
    """
    settings = _settings(kernel, strides, padding, dilation, groups, transposed, None, None, None)
    image_size = ints_for_axes(image_size, 'image_size', settings.rank)
    return operation.preconditioner(kernel, settings.geometry(image_size), None, 1)


def _settings(kernel, strides, padding, dilation, groups, transposed, method, dtype, precision):
    settings = Settings(
        features=kernel.shape[-1],
        kernel_size=kernel.shape[:-2],
        strides=strides,
        padding=padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
        transposed=transposed,
        method=method,
        dtype=dtype,
        precision=precision,
    )
    channels_in_a_group(groups, kernel.shape[-2] * groups, kernel.shape[-1])  # refuses others
    return settings
