"""ConvNorm and ConvNormTranspose for Equinox (an extra: `pip install 'convnorm_jax[equinox]'`).

::

    from convnorm_jax.equinox import ConvNorm

    layer, state = eqx.nn.make_with_state(ConvNorm)(3, 64, 3, padding=1, image_size=(32, 32), key=key)
    y, state = jax.vmap(layer, axis_name='batch', in_axes=(0, None), out_axes=(0, None))(images, state)
    layer = eqx.nn.inference_mode(layer)      # inference from now on, as for eqx.nn.BatchNorm
"""

from collections.abc import Hashable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers import core
from convnorm_jax.layers.batch_axis import index_in_batch, own_example, whole_batch
from convnorm_jax.layers.geometry import Ints, Padding
from convnorm_jax.layers.method import Method
from convnorm_jax.layers.settings import Settings, SpectrumMode

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    if error.name != 'equinox':
        raise
    raise UserError("convnorm_jax.equinox needs Equinox: pip install 'convnorm_jax[equinox]'") from None


class _NormalizedConvolution(eqx.nn.StatefulLayer):
    """The base class of both layers; `ConvNorm` documents the arguments."""

    kernel: jax.Array
    affine_kernel: jax.Array | None
    affine_bias: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None
    state_index: eqx.nn.StateIndex
    inference: bool
    in_channels: int = eqx.field(static=True)
    axis_name: Hashable = eqx.field(static=True)
    settings: Settings = eqx.field(static=True)

    _transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        *,
        image_size: Ints | None = None,
        axis_name: Hashable = 'batch',
        inference: bool = False,
        use_affine: bool = True,
        use_batch_norm: bool = True,
        momentum: float | None = None,
        spectrum: SpectrumMode = 'running',
        method: Method | None = None,
        batch_norm_momentum: float = 0.9,
        batch_norm_epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        key: jax.Array,
    ) -> None:
        self.settings = Settings(
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
        """The layer's parameters, by their names in `convnorm_jax.functional`."""
        names = ('kernel', 'affine_kernel', 'affine_bias', 'scale', 'bias')
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __call__(
        self, x: jax.Array, state: eqx.nn.State, *, key: jax.Array | None = None, inference: bool | None = None
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Applies the layer to one example of a batch.

        Args:
          x: `[in_channels, *spatial]`, float.
          state: of the model.
          key: ignored, as by `eqx.nn.BatchNorm`.
          inference: True at inference, False in training; None takes the attribute, which `eqx.nn.inference_mode` sets.

        Returns:
          `[out_channels, *spatial']`, and the new state.

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
        # The layer is one operation on the batch, so each example gathers the batch and takes its own output.
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
    """A convolution whose output channels are normalized by their power spectrum, for Equinox.

    It replaces a convolution and the normalization after it, and computes the same as `convnorm_jax.ConvNorm` (Linen),
    which documents the mathematics. Names, images and paddings are Equinox's: channels first, one example at a time
    under `jax.vmap(axis_name='batch')`, no padding by default. The running spectrum, its number of updates, and
    BatchNorm's running mean and variance are in the model's `eqx.nn.State`.

    Args:
      in_channels: input channels.
      out_channels: output channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw), for 1, 2 or 3 spatial axes; one int k is (k, k).
      stride, dilation: an int, or an int for each axis.
      padding: 'SAME', 'VALID', 'CIRCULAR', an int, or an int or a pair for each axis.
      groups: groups of channels with kernels of their own.
      image_size: size of the images without channels, an int or an int for each spatial axis. The running spectrum has
        one value for each of their frequencies. It may be None with spectrum='exact', for images of any size.
      axis_name: of the batch, in `jax.vmap`.
      inference: True at inference; `eqx.nn.inference_mode` sets it.
      dtype: of the parameters. The computation is in the wider dtype of the image and the parameters.
      key: of the initial values.
      use_affine, use_batch_norm, momentum, spectrum, method, batch_norm_momentum, batch_norm_epsilon, precision: see
        `convnorm_jax.ConvNorm`.

    Example:
      >>> import equinox as eqx
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from convnorm_jax.equinox import ConvNorm
      >>> make = eqx.nn.make_with_state(ConvNorm)
      >>> layer, state = make(3, 16, 3, padding=1, image_size=(32, 32), key=jax.random.key(0))
      >>> over_batch = jax.vmap(layer, axis_name='batch', in_axes=(0, None), out_axes=(0, None))
      >>> y, state = over_batch(jnp.ones((8, 3, 32, 32)), state)
      >>> y.shape
      (8, 16, 32, 32)
    """


class ConvNormTranspose(_NormalizedConvolution):
    """A transposed convolution whose output channels are normalized by their power spectrum, for Equinox.

    It computes the same as `convnorm_jax.ConvNormTranspose` (Linen), which documents the mathematics. All arguments
    after the stride must be named, because in `eqx.nn.ConvTranspose` the padding of the output comes first.

    Args:
      in_channels, out_channels, kernel_size, stride, key: see `ConvNorm`.
      padding: what is cropped from the output, as by `eqx.nn.ConvTranspose` and PyTorch's ConvTranspose2d: an int, or
        an int or a pair for each axis.
      **options: further arguments of `ConvNorm`.
    """

    _transposed: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        *,
        padding: Padding = 0,
        key: jax.Array,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, key=key, **options)
