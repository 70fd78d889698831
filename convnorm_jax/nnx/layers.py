"""ConvNorm and ConvNormTranspose for Flax NNX.

from convnorm_jax.nnx import ConvNorm
layer = ConvNorm(3, 64, (3, 3), image_size=(32, 32), rngs=nnx.Rngs(0))
y = layer(images)      # training: the running statistics are updated
layer.eval()           # inference from now on, as for nnx.BatchNorm
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from convnorm_jax.errors import UserError
from convnorm_jax.layers import core

_STATE = ('preconditioner', 'count', 'mean', 'var')


class _NormalizedConvolution(nnx.Module):
    """What the two layers share; see `ConvNorm`."""

    _transposed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: str | int | Sequence = 'SAME',
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        image_size: int | Sequence[int] | None = None,
        use_affine: bool = True,
        use_batch_norm: bool = True,
        use_running_average: bool = False,
        momentum: float | None = None,
        spectrum: str = 'running',
        method: str | None = None,
        batch_norm_momentum: float = 0.9,
        batch_norm_epsilon: float = 1e-5,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.out_features = in_features, out_features
        self.use_running_average = use_running_average
        self.settings = core.Settings(
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
        """Applies the layer.

        Args:
          x: [B, *spatial, in_features], float.
          use_running_average: True at inference, False in training; None is the attribute, which `train()` and
            `eval()` set.

        Returns:
          [B, *spatial', out_features].

        Raises:
          ValueError: x of another rank or number of channels, or of another size than the running spectrum.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        self.settings.check_shape(x.shape)
        if x.shape[-1] != self.in_features:
            raise UserError(f'x.shape={x.shape}: expected in_features={self.in_features} channels')
        if self.preconditioner is None and not (use_running_average and self._needs_no_state()):
            self._make_state(x.shape[1:-1], x.shape[0])
        params = {name: getattr(self, name)[...] for name in self._params}
        variables = {name: getattr(self, name) for name in _STATE}
        state = {name: value[...] for name, value in variables.items() if value is not None}
        y, state = core.apply(self.settings, params, state, x, use_running_average=use_running_average)
        if not use_running_average:
            for name, value in state.items():
                getattr(self, name)[...] = value
        return y

    def _needs_no_state(self):
        return self.settings.spectrum == 'exact' and not self.settings.use_batch_norm


class ConvNorm(_NormalizedConvolution):
    """Convolution whose output channels are normalized by their power spectrum, for Flax NNX.

    Stands in for "convolution, then normalization". The same as `convnorm_jax.ConvNorm` (Linen), which has the
    mathematics and the meaning of each argument. Parameters are `nnx.Param`; the running spectrum, its number of
    updates and BatchNorm's running mean and variance are `nnx.BatchStat`.

    Args:
      in_features, out_features: channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw); an int is a square of 2 spatial axes.
      strides: int, or an int for each axis.
      image_size: of the images, without channels, int or an int for each spatial axis: the running spectrum has one
        value for each of their
        frequencies. None takes the size of the first batch, which must then be seen outside of transformations that
        cannot add to a module's state.
      use_running_average: inference. `layer.train()` and `layer.eval()` set it.
      rngs: its stream 'params' gives the initial values.
      The others: see `convnorm_jax.ConvNorm`.
    """


class ConvNormTranspose(_NormalizedConvolution):
    """`ConvNorm` for transposed convolutions; the same as `convnorm_jax.ConvNormTranspose` (Linen).

    Args: see `ConvNorm`. `padding` is an int, or an int or a pair for each axis, cropped from the output as by
      PyTorch's ConvTranspose2d.
    """

    _transposed = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 2,
        *,
        padding: int | Sequence = 1,
        rngs: nnx.Rngs,
        **options,
    ):
        super().__init__(in_features, out_features, kernel_size, strides, padding=padding, rngs=rngs, **options)
