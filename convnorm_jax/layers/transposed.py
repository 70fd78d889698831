"""Transposed convolutions with the geometry of PyTorch's ConvTranspose2d, plain and as ConvNorm."""

import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers.channelwise import add_bias
from convnorm_jax.layers.convnorm import NormalizedConvolution
from convnorm_jax.layers.convolution import full_transposed_convolution
from convnorm_jax.layers.geometry import Ints, Padding, Pairs, canonical_transposed_padding, pair_of_ints
from convnorm_jax.layers.initializers import Initializer, torch_bias_init, torch_transposed_kernel_init


def transposed_convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int] = (1, 1),
    padding: Pairs = ((0, 0), (0, 0)),
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns a transposed convolution, as `torch.nn.functional.conv_transpose2d`.

    Args:
      x: [B, H, W, cin].
      kernel: [kh, kw, cin, cout]; see `full_transposed_convolution`.
      strides: (sh, sw).
      padding: what is cropped from the full transposed convolution, ((top, bottom), (left, right)).
      precision: of the products (`jax.lax.Precision`).

    Returns:
      [B, (H-1)*sh + kh - top - bottom, (W-1)*sw + kw - left - right, cout].
    """
    y = full_transposed_convolution(x, kernel, strides, precision)
    (top, bottom), (left, right) = padding
    return y[:, top : y.shape[1] - bottom, left : y.shape[2] - right]


class ConvTranspose(nn.Module):
    """A transposed convolution with the geometry and the initial values of `torch.nn.ConvTranspose2d`.

    Attributes:
      features: output channels.
      kernel_size, strides: an int or a pair.
      padding: what is cropped from the output, an int, or an int or a pair for each axis, between 0 and k-1 on each
        side. The output has the size (n-1)*s + k - 2p.
      use_bias: whether to add a learned bias.
      kernel_init: initializer of the kernel; None takes PyTorch's.
      dtype: of the computation and the output, as in `flax.linen.Conv`.
      param_dtype: of the parameters.
      precision: of the products (`jax.lax.Precision`).
    """

    features: int
    kernel_size: Ints = (4, 4)
    strides: Ints = (2, 2)
    padding: Padding = 1
    use_bias: bool = True
    kernel_init: Initializer | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer, [B, H, W, cin] -> [B, H', W', features].

        Raises:
          ValueError: x of another rank; padding outside 0 ... k-1.
        """
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
    r"""A transposed convolution whose output channels are normalized by their power spectrum, for generators.

    The full transposed convolution, of size (n-1)*s + k, is filtered as in `ConvNorm`, on its own grid:

    .. math::
        y_o = \sum_i (\uparrow_s x_i) * k_{io}, \qquad
        V_o(\omega) = \Bigl(\sum_i |F k_{io}(\omega)|^2\Bigr)^{-1/2}, \qquad
        z_o = S\,F^{-1}\bigl(V_o\, F y_o\bigr)

    where :math:`\uparrow_s` puts s - 1 zeros between the pixels and S crops. The learned channel-wise convolution with
    bias and BatchNorm follow. So the normalized kernel of each output channel has a power spectrum of one with respect
    to the image with zeros between its pixels, not with respect to the image. Parameters and statistics have the same
    names as in `ConvNorm`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from convnorm_jax import ConvNormTranspose
      >>> layer = ConvNormTranspose(features=16)
      >>> z = jnp.ones((8, 4, 4, 32))
      >>> variables = layer.init(jax.random.key(0), z, use_running_average=False)
      >>> layer.apply(variables, z, use_running_average=True).shape
      (8, 8, 8, 16)

    Attributes:
      features: output channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw), for 1, 2 or 3 spatial axes; one int k is (k, k).
      strides: an int, or an int for each axis.
      padding: what is cropped from the output, as by `torch.nn.ConvTranspose2d`: an int, or an int or a pair for each
        axis, between 0 and k-1 on each side. The output has the size (n-1)*s + k - 2p.
      use_affine, use_batch_norm, use_running_average, momentum, spectrum, method: see `ConvNorm`.
      batch_norm_momentum, batch_norm_epsilon, dtype, param_dtype, precision: see `ConvNorm`.
      kernel_dilation, feature_group_count: see `ConvNorm`.
    """

    kernel_size: Ints = (4, 4)
    strides: Ints = 2
    padding: Padding = 1

    transposed: ClassVar[bool] = True
