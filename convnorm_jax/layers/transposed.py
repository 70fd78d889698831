"""Transposed convolutions, with the geometry of PyTorch's ConvTranspose2d, and ConvNorm's form of them."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from convnorm_jax.errors import UserError
from convnorm_jax.layers.channelwise import add_bias
from convnorm_jax.layers.convnorm import NormalizedConvolution
from convnorm_jax.layers.convolution import full_transposed_convolution
from convnorm_jax.layers.geometry import canonical_transposed_padding, pair_of_ints
from convnorm_jax.layers.initializers import torch_bias_init, torch_transposed_kernel_init


def transposed_convolution(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), precision=None):
    """`full_transposed_convolution` less `padding` ((top, bottom), (left, right)).

    Returns:
      [B, (H-1)*sh + kh - top - bottom, (W-1)*sw + kw - left - right, cout].
    """
    y = full_transposed_convolution(x, kernel, strides, precision)
    (top, bottom), (left, right) = padding
    return y[:, top : y.shape[1] - bottom, left : y.shape[2] - right]


class ConvTranspose(nn.Module):
    """Transposed convolution, with PyTorch's geometry and initial values.

    Attributes:
      features: output channels.
      kernel_size, strides: int or pair.
      padding: int or pairs, between 0 and k-1 on each side, cropped from the output:
        PyTorch's. The output is (n-1)*s + k - 2p large.
      use_bias: add a learned bias.
      kernel_init: of the kernel; None is PyTorch's.
      dtype: of the computation and the output, as in `flax.linen.Conv`.
      param_dtype: of the parameters.
      precision: of the products (`jax.lax.Precision`).
    """

    features: int
    kernel_size: int | Sequence[int] = (4, 4)
    strides: int | Sequence[int] = (2, 2)
    padding: int | Sequence[int | tuple[int, int]] = 1
    use_bias: bool = True
    kernel_init: Callable | None = None
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    precision: jax.lax.PrecisionLike = None

    @nn.compact
    def __call__(self, x):
        """[B, H, W, cin] -> [B, H', W', features]."""
        if x.ndim != 4:
            raise UserError(f'x.shape={x.shape}: expected [batch, height, width, channels]')
        kernel_size = pair_of_ints(self.kernel_size, 'kernel_size')
        strides = pair_of_ints(self.strides, 'strides')
        padding = canonical_transposed_padding(self.padding, x.shape[1:3], kernel_size, strides)
        init = self.kernel_init or torch_transposed_kernel_init
        kernel = self.param('kernel', init, (*kernel_size, x.shape[-1], self.features), self.param_dtype)
        bias = None
        if self.use_bias:
            bias_init = torch_bias_init(math.prod(kernel_size) * self.features)
            bias = self.param('bias', bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = transposed_convolution(x, kernel, strides, padding, self.precision)
        return y if bias is None else add_bias(y, bias)


class ConvNormTranspose(NormalizedConvolution):
    """Transposed convolution whose output channels are normalized by their power spectrum.

    `ConvNorm` for generators: full transposed convolution, of size (n-1)*s + k, division by
    the square root of each output channel's power spectrum on that grid, crop, then the learned
    channel-wise convolution with bias and BatchNorm. Its parameters and statistics have
    ConvNorm's names. The normalized kernel of each output channel has a power spectrum of one, as
    ConvNorm's has: over the picture with zeros between its pixels, not over the picture.

    Attributes:
      features: output channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw), for 1, 2 or 3 spatial axes; an int is a square of 2.
      strides: int, or an int for each axis.
      padding: int or pairs, between 0 and k-1 on each side, cropped from the output as by
        PyTorch's ConvTranspose2d: the output is (n-1)*s + k - 2p large.
      use_affine, use_batch_norm, use_running_average, momentum, spectrum, method, batch_norm_momentum,
        batch_norm_epsilon, dtype, param_dtype, precision, kernel_dilation, feature_group_count: see `ConvNorm`.
    """

    kernel_size: int | Sequence[int] = (4, 4)
    strides: int | Sequence[int] = 2
    padding: int | Sequence[int | tuple[int, int]] = 1

    transposed = True
