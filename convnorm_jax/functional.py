"""ConvNorm as pure functions of arrays, for any JAX library or none.

The normalized convolution, for a given kernel::

    v = preconditioner(kernel, (32, 32))
    y = conv_norm(x, kernel, v)          # or conv_norm(x, kernel), which computes V from the kernel

The whole layer, as the layers for Linen, NNX and Equinox call it::

    settings = Settings(features=64, kernel_size=(3, 3))
    params = initial_params(settings, jax.random.key(0), features_in=3)
    state = initial_state(settings, params['kernel'], (32, 32))
    y, state = apply(settings, params, state, x, use_running_average=False)
"""

import jax
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers import core, operation
from convnorm_jax.layers.core import apply, initial_params, initial_state, running_average, update_weight
from convnorm_jax.layers.dtypes import widened
from convnorm_jax.layers.geometry import Ints, Padding, by_x, channels_in_a_group, ints_for_axes
from convnorm_jax.layers.method import Method
from convnorm_jax.layers.settings import Settings
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
    strides: Ints = 1,
    padding: Padding = 'SAME',
    dilation: Ints = 1,
    groups: int = 1,
    transposed: bool = False,
    method: Method | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""Returns a convolution with each output channel divided by the square root of its power spectrum.

    .. math::
        z_o = S\,F^{-1}\Bigl(V_o\, F\bigl(\textstyle\sum_i x_i * k_{io}\bigr)\Bigr), \qquad
        V_o(\omega) = \Bigl(\sum_i |F k_{io}(\omega)|^2\Bigr)^{-1/2}

    where :math:`x * k` is the full convolution and S crops and strides. The gradient treats V as a constant, as the
    paper does.

    Source: Liu et al., `arXiv 2103.00673 <https://arxiv.org/abs/2103.00673>`__, section 3.

    Args:
      x: `[B, *spatial, cin]`, float, with 1, 2 or 3 spatial axes.
      kernel: `[*kernel, cin / groups, cout]`, float.
      preconditioner: V on the grid of the full convolution, `[*grid, cout]`, real and even. None computes it from the
        kernel.
      strides, dilation: an int, or an int for each axis.
      padding: 'SAME', 'VALID', 'CIRCULAR', an int, or an int or a pair for each axis. For a transposed convolution it
        is what is cropped: an int, or an int or a pair for each axis.
      groups: groups of channels, each with filters of its own.
      transposed: whether it is a transposed convolution, as `torch.nn.functional.conv_transpose2d`.
      method, dtype, precision: see `convnorm_jax.ConvNorm`.

    Returns:
      `[B, *spatial', cout]`, in `dtype` or in the wider dtype of x and the kernel.

    Raises:
      ValueError: shapes or arguments that do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from convnorm_jax.functional import conv_norm
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
    image_size: Ints,
    *,
    strides: Ints = 1,
    padding: Padding = 'SAME',
    dilation: Ints = 1,
    groups: int = 1,
    transposed: bool = False,
) -> jax.Array:
    r"""Returns the preconditioner V of a kernel, for images of one size.

    .. math::
        V_o(\omega) = \Bigl(\sum_i |F k_{io}(\omega)|^2\Bigr)^{-1/2}

    The power spectrum is at least 1e-10 of its mean over the grid.

    Args:
      kernel: `[*kernel, cin / groups, cout]`, float.
      image_size: an int, or an int for each spatial axis.
      strides, padding, dilation, groups, transposed: see `conv_norm`.

    Returns:
      `[*grid, cout]`, float32 at least, a constant to differentiation. The grid is that of the full convolution, or of
      the image with circular padding. It has one point if the kernel has one tap.

    Raises:
      ValueError: shapes or arguments that do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from convnorm_jax.functional import preconditioner
      >>> preconditioner(jnp.ones((3, 3, 3, 16)), (8, 8)).shape
      (10, 10, 16)
    """
    settings = _settings(kernel, strides, padding, dilation, groups, transposed, None, None, None)
    size = ints_for_axes(image_size, 'image_size', settings.rank)
    return operation.preconditioner(kernel, settings.geometry(size), None, 1)


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
    channels_in_a_group(groups, kernel.shape[-2] * groups, kernel.shape[-1])  # raises for groups that do not fit
    return settings
