"""ConvNorm and ConvNormTranspose for Equinox (an extra: `pip install 'convnorm_jax[equinox]'`).

from convnorm_jax.equinox import ConvNorm
layer, state = eqx.nn.make_with_state(ConvNorm)(3, 64, 3, padding=1, image_size=(32, 32), key=key)
y, state = jax.vmap(layer, axis_name='batch', in_axes=(0, None), out_axes=(0, None))(images, state)
layer = eqx.nn.inference_mode(layer)      # inference from now on, as for eqx.nn.BatchNorm
"""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from convnorm_jax.errors import UserError
from convnorm_jax.layers import core
from convnorm_jax.layers.batch_axis import index_in_batch, own_example, whole_batch

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    if error.name != 'equinox':
        raise
    raise UserError("convnorm_jax.equinox needs Equinox: pip install 'convnorm_jax[equinox]'") from None


class _NormalizedConvolution(eqx.nn.StatefulLayer):
    """What the two layers share; see `ConvNorm`."""

    kernel: jax.Array
    affine_kernel: jax.Array | None
    affine_bias: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None
    state_index: eqx.nn.StateIndex
    inference: bool
    in_channels: int = eqx.field(static=True)
    axis_name: Hashable = eqx.field(static=True)
    settings: core.Settings = eqx.field(static=True)

    _transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        image_size: int | Sequence[int] | None = None,
        axis_name: Hashable = 'batch',
        inference: bool = False,
        use_affine: bool = True,
        use_batch_norm: bool = True,
        momentum: float | None = None,
        spectrum: str = 'running',
        method: str | None = None,
        batch_norm_momentum: float = 0.9,
        batch_norm_epsilon: float = 1e-5,
        dtype: jnp.dtype | None = None,
        precision: jax.lax.PrecisionLike = None,
        key: jax.Array,
    ):
        self.settings = core.Settings(
            features=out_channels,
            kernel_size=kernel_size,
            strides=stride,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=groups,
            transposed=self._transposed,
            use_affine=use_affine,
            use_batch_norm=use_batch_norm,
            momentum=momentum,
            spectrum=spectrum,
            method=method,
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            param_dtype=jnp.dtype(dtype or jnp.result_type(float)),
            precision=precision,
        )
        if image_size is None and spectrum != 'exact':
            raise UserError(
                "image_size=None with spectrum='running': give the size of the images, whose frequencies the running "
                "spectrum belongs to, or set spectrum='exact'"
            )
        self.in_channels, self.axis_name, self.inference = in_channels, axis_name, inference
        params = core.initial_params(self.settings, key, in_channels)
        self.kernel = params['kernel']
        self.affine_kernel, self.affine_bias = params.get('affine_kernel'), params.get('affine_bias')
        self.scale, self.bias = params.get('scale'), params.get('bias')
        self.state_index = eqx.nn.StateIndex(core.initial_state(self.settings, self.kernel, image_size))

    @property
    def params(self) -> dict[str, jax.Array]:
        """The parameters that there are, by their names in `convnorm_jax.functional`."""
        names = ('kernel', 'affine_kernel', 'affine_bias', 'scale', 'bias')
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __call__(
        self, x: jax.Array, state: eqx.nn.State, *, key: jax.Array | None = None, inference: bool | None = None
    ) -> tuple[jax.Array, eqx.nn.State]:
        r"""Applies the layer to one example of a batch.

        Args:
          x: [in_channels, \*spatial], float.
          state: of the model.
          key: ignored, as by `eqx.nn.BatchNorm`.
          inference: True at inference, False in training; None is the attribute, which `eqx.nn.inference_mode` sets.

        Returns:
          [out_channels, \*spatial'], and the new state.

        Raises:
          ValueError: x of another rank or number of channels, or of another size than the running spectrum; training
            with BatchNorm outside of a `jax.vmap` with `axis_name`.
        """
        del key
        inference = self.inference if inference is None else inference
        if x.ndim != self.settings.rank + 1 or x.shape[0] != self.in_channels:
            raise UserError(
                f'x.shape={x.shape}: expected one example, [{self.in_channels}, *spatial] with '
                f'kernel_size={self.settings.kernel_size}; batches go through jax.vmap'
            )
        index = index_in_batch(self.axis_name)
        if index is None and self.settings.use_batch_norm and not inference:
            raise UserError(
                f'training with BatchNorm outside of the axis {self.axis_name!r}: call the model as '
                f'jax.vmap(model, axis_name={self.axis_name!r}, in_axes=(0, None), out_axes=(0, None))(images, state)'
            )
        # The layer is one operation on the batch: each example sees the whole of it, and keeps its own output.
        batch = x[None] if index is None else whole_batch(x, index, self.axis_name)
        y, changed = core.apply(
            self.settings,
            self.params,
            state.get(self.state_index),
            jnp.moveaxis(batch, 1, -1),
            use_running_average=inference,
        )
        y = jnp.moveaxis(y, -1, 1)
        if not inference:
            state = state.set(self.state_index, changed)
        return (y[0] if index is None else own_example(y, index)), state


class ConvNorm(_NormalizedConvolution):
    r"""Convolution whose output channels are normalized by their power spectrum, for Equinox.

    Stands in for "convolution, then normalization". The same as `convnorm_jax.ConvNorm` (Linen), which has the
    mathematics and the meaning of each argument; with Equinox's names, images and paddings: channels first, one example
    at a time under `jax.vmap(axis_name='batch')`, no padding by default. The running spectrum, its number of updates
    and BatchNorm's running mean and variance are in the model's `eqx.nn.State`.

    Args:
      in_channels, out_channels: channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw); an int is a square of 2 spatial axes.
      stride, dilation: int, or an int for each axis.
      padding: 'SAME', 'VALID', 'CIRCULAR', an int, or an int or a pair for each axis.
      groups: of channels with kernels of their own.
      image_size: of the images, without channels, int or an int for each spatial axis: the running spectrum has one
        value for each of their
        frequencies. None with spectrum='exact': images of any size then.
      axis_name: of the batch, in `jax.vmap`.
      inference: `eqx.nn.inference_mode` sets it.
      dtype: of the parameters; the computation is in the wider one of those of the image and of the parameters.
      key: of the initial values.
      The others: see `convnorm_jax.ConvNorm`.
    """


class ConvNormTranspose(_NormalizedConvolution):
    """`ConvNorm` for transposed convolutions; the same as `convnorm_jax.ConvNormTranspose` (Linen).

    Args: see `ConvNorm`. `padding` is an int, or an int or a pair for each axis, cropped from the output as by
      `eqx.nn.ConvTranspose` and by PyTorch's ConvTranspose2d. Named, as all that follows the stride: in
      `eqx.nn.ConvTranspose` the output's padding comes there first.
    """

    _transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        *,
        padding: int | Sequence = 0,
        key: jax.Array,
        **options,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, key=key, **options)
