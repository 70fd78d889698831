"""The linear layer with spectral norm."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.module import merge_param
from jax.typing import DTypeLike

from convnorm_jax.layers import spectral_norm
from convnorm_jax.layers.channelwise import add_bias
from convnorm_jax.layers.initializers import Initializer
from convnorm_jax.layers.power_iterated import check_iterations, power_iterated_norm


class SpectralNormDense(nn.Module):
    """A linear layer whose matrix is divided by its largest singular value.

    The norm is computed by power iteration, with u [features] and v [cin] in `batch_stats`, as in `SpectralNormConv`.

    Source: Miyato et al., `arXiv 1802.05957 <https://arxiv.org/abs/1802.05957>`__.

    Attributes:
      features: output features.
      use_bias: whether to add a learned bias, initially 0.
      kernel_init: initializer of the kernel, [cin, features].
      iterations, init_iterations, eps, use_running_average: see `SpectralNormConv`.
      dtype: of the product and the output, as in `flax.linen.Dense`. The kernel is divided in float32.
      param_dtype: of the parameters.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    iterations: int = 1
    init_iterations: int = 15
    eps: float = 1e-12
    use_running_average: bool | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Applies the layer, [..., cin] -> [..., features].

        Args:
          x: float.
          use_running_average: True at inference, False in training; None takes the attribute.

        Raises:
          ValueError: numbers of iterations that the layer cannot have.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        check_iterations(self)
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, (self.features,), self.param_dtype) if self.use_bias else None
        norm = power_iterated_norm(
            self,
            lambda w, _: spectral_norm.reshaped_operator(w[None, None]),
            kernel,
            kernel.shape[:1],
            use_running_average,
        )
        kernel = kernel.astype(jnp.float32) / spectral_norm.safe_divisor(norm)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.dot(x, kernel)
        return y if bias is None else add_bias(y, bias)
