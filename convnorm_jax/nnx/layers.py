"""ConvNorm and ConvNormTranspose for Flax NNX.

::

    from convnorm_jax.nnx import ConvNorm

    layer = ConvNorm(3, 64, (3, 3), image_size=(32, 32), rngs=nnx.Rngs(0))
    y = layer(images)      # training: the running statistics are updated
    layer.eval()           # inference from now on, as for nnx.BatchNorm
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers import core
from convnorm_jax.layers.geometry import Ints, Padding
from convnorm_jax.layers.method import Method
from convnorm_jax.layers.settings import Settings, SpectrumMode

_STATE = ('preconditioner', 'count', 'mean', 'var')


class _NormalizedConvolution(nnx.Module):
    """The base class of both layers; `ConvNorm` documents the arguments."""

    _transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Ints,
        strides: Ints = 1,
        *,
        padding: Padding = 'SAME',
        kernel_dilation: Ints = 1,
        feature_group_count: int = 1,
        image_size: Ints | None = None,
        use_affine: bool = True,
        use_batch_norm: bool = True,
        use_running_average: bool = False,
        momentum: float | None = None,
        spectrum: SpectrumMode = 'running',
        method: Method | None = None,
        batch_norm_momentum: float = 0.9,
        batch_norm_epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.use_running_average = use_running_average
        self.settings = Settings(
            features=out_features,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            transposed=self._transposed,
            use_affine=use_affine,
            use_batch_norm=use_batch_norm,
            momentum=momentum,
            spectrum=spectrum,
            method=method,
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
        )
        params = core.draw_params(self.settings, in_features, rngs.params)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        self._params = tuple(params)
        for name in _STATE:
            setattr(self, name, nnx.data(None))
        if image_size is not None:
            self._make_state(image_size, 1)

    def _make_state(self, image_size, batch):
        state = core.initial_state(self.settings, self.kernel[...], image_size, batch)
        for name, value in state.items():
            setattr(self, name, nnx.BatchStat(value))

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Applies the layer to a batch of images.

        Args:
          x: `[B, *spatial, in_features]`, float.
          use_running_average: True at inference, False in training; None takes the attribute, which `train()` and
            `eval()` set.

        Returns:
          `[B, *spatial', out_features]`.

        Raises:
          ValueError: x of another rank or number of channels, or of another size than the running spectrum.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        self.settings.check_shape(x.shape)
        if x.shape[-1] != self.in_features:
            raise UserError(f'x.shape={x.shape}: expected in_features={self.in_features} channels')
        variables = {name: getattr(self, name) for name in _STATE}
        if variables['preconditioner'] is None and not (use_running_average and self._needs_no_state()):
            self._make_state(x.shape[1:-1], x.shape[0])
            variables = {name: getattr(self, name) for name in _STATE}
        params = {name: getattr(self, name)[...] for name in self._params}
        state = {name: value[...] for name, value in variables.items() if value is not None}
        y, state = core.apply(self.settings, params, state, x, use_running_average=use_running_average)
        if not use_running_average:
            for name, value in state.items():
                getattr(self, name)[...] = value
        return y

    def _needs_no_state(self):
        return self.settings.spectrum == 'exact' and not self.settings.use_batch_norm


class ConvNorm(_NormalizedConvolution):
    """A convolution whose output channels are normalized by their power spectrum, for Flax NNX.

    It replaces a convolution and the normalization after it, and computes the same as `convnorm_jax.ConvNorm` (Linen),
    which documents the mathematics. Parameters are `nnx.Param`. The running spectrum, its number of updates, and
    BatchNorm's running mean and variance are `nnx.BatchStat`.

    Args:
      in_features: input channels.
      out_features: output channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw), for 1, 2 or 3 spatial axes; one int k is (k, k).
      strides: an int, or an int for each axis.
      image_size: size of the images without channels, an int or an int for each spatial axis. The running spectrum has
        one value for each of their frequencies. None takes the size of the first batch; call the layer on it outside of
        transformations that cannot add to a module's state.
      use_running_average: True at inference. `layer.train()` and `layer.eval()` set it.
      rngs: its stream 'params' gives the initial values.
      padding, kernel_dilation, feature_group_count, use_affine, use_batch_norm: see `convnorm_jax.ConvNorm`.
      momentum, spectrum, method, batch_norm_momentum, batch_norm_epsilon: see `convnorm_jax.ConvNorm`.
      dtype, param_dtype, precision: see `convnorm_jax.ConvNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from convnorm_jax.nnx import ConvNorm
      >>> layer = ConvNorm(3, 16, (3, 3), strides=2, image_size=(32, 32), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 32, 32, 3))).shape
      (8, 16, 16, 16)
      >>> layer.preconditioner.shape
      (34, 34, 16)
    """


class ConvNormTranspose(_NormalizedConvolution):
    """A transposed convolution whose output channels are normalized by their power spectrum, for Flax NNX.

    It computes the same as `convnorm_jax.ConvNormTranspose` (Linen), which documents the mathematics.

    Args:
      in_features, out_features, kernel_size, strides, rngs: see `ConvNorm`.
      padding: what is cropped from the output, as by PyTorch's ConvTranspose2d: an int, or an int or a pair for each
        axis.
      **options: further arguments of `ConvNorm`.
    """

    _transposed: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Ints,
        strides: Ints = 2,
        *,
        padding: Padding = 1,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, kernel_size, strides, padding=padding, rngs=rngs, **options)
