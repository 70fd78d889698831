"""ConvNorm, convolutional normalization, as a Linen module (arXiv 2103.00673)."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers import core, folding, frequency
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.channelwise import add_bias, channelwise_convolution
from convnorm_jax.layers.dtypes import widened
from convnorm_jax.layers.geometry import Ints, Padding, by_x
from convnorm_jax.layers.materialize import materialized_output
from convnorm_jax.layers.method import Method
from convnorm_jax.layers.operation import normalized_convolution, preconditioner
from convnorm_jax.layers.settings import Settings, SpectrumMode


def _refuse_explicit_axes():
    # A mesh with explicit axes needs a sharding for every intermediate array, which flax has no way to specify.
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        raise UserError(
            f'the mesh in use has explicit axes ({mesh.axis_names}): make it with '
            f'jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})'
        )


class NormalizedConvolution(nn.Module):
    """The base class of `ConvNorm` and `ConvNormTranspose`; `ConvNorm` documents the attributes."""

    features: int
    kernel_size: Ints = (3, 3)
    strides: Ints = 1
    padding: Padding = 'SAME'
    use_affine: bool = True
    use_batch_norm: bool = True
    use_running_average: bool | None = None
    momentum: float | None = None
    spectrum: SpectrumMode = 'running'
    method: Method | None = None
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_dilation: Ints = 1
    feature_group_count: int = 1

    transposed: ClassVar[bool] = False

    @functools.cached_property
    def settings(self) -> Settings:
        """The attributes as the functions of `core` take them."""
        names = [field.name for field in dataclasses.fields(Settings) if field.name != 'transposed']
        return Settings(**{name: getattr(self, name) for name in names}, transposed=self.transposed)

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Applies the layer to a batch of images.

        Args:
          x: [B, H, W, C], float; [B, W, C] or [B, D, H, W, C] with a `kernel_size` of 1 or 3 ints.
          use_running_average: True at inference, False in training; None takes the attribute.

        Returns:
          [B, H', W', features], where H' and W' are those of a (transposed) convolution with the same padding and
          strides.

        Raises:
          ValueError: x of another rank; padding outside 0 ... k-1; images of another size than that of the running
            spectrum, where it is used.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        _refuse_explicit_axes()
        settings = self.settings
        settings.check_shape(x.shape)
        named = settings.initializers(x.shape[-1])
        geometry = settings.geometry(x.shape[1:-1])
        if use_running_average and self.has_variable(folding.COLLECTION, 'bias'):
            return self._folded(x, geometry)
        kernel = self.param('kernel', *named['kernel'], self.param_dtype)
        kernel = widened(kernel, self.dtype or x.dtype)
        v = self._spectrum(kernel, geometry, x.shape[0], use_running_average)
        y = core.convolve(settings, x, kernel, v, geometry)
        affine = self._affine(named, self.dtype or y.dtype) if self.use_affine else None
        if self.use_batch_norm:
            y = BatchNorm(
                use_running_average=use_running_average,
                momentum=self.batch_norm_momentum,
                epsilon=self.batch_norm_epsilon,
                use_affine=self.use_affine,
                param_dtype=self.param_dtype,
                name='batch_norm',
            )(y, channelwise=affine, circular=geometry.circular)
        elif affine is not None:
            kernel_of_channels, bias = affine
            y = add_bias(channelwise_convolution(y, kernel_of_channels, geometry.circular), bias)
        if folding.is_folding() and self.is_mutable_collection(folding.COLLECTION):
            self._fold(kernel, v, geometry, self.method or folding.choose_folded_method(geometry, x, kernel))
        return materialized_output(y, kernel[(0,) * kernel.ndim])

    def _spectrum(self, kernel, geometry, batch, use_running_average):
        """Returns V of this pass, [Hf, Wf, features], and in training updates the running average."""
        settings = self.settings
        # Initialization makes the state in every mode, so that its structure never depends on the mode.
        if self.spectrum == 'exact' and use_running_average and not self.is_initializing():
            return preconditioner(kernel, geometry, self.method, batch)
        initial = lambda: preconditioner(kernel, geometry, self.method, batch).astype(settings.state_dtype)
        running = self.variable('batch_stats', 'preconditioner', initial)
        # A float32 count keeps its dtype in a training loop that averages batch_stats over devices.
        count = self.variable('batch_stats', 'count', lambda: jnp.zeros((), jnp.float32))
        state = {'preconditioner': running.value, 'count': count.value}
        name = '/'.join(self.path) or type(self).__name__
        v, changed = core.spectrum(settings, kernel, geometry, batch, state, use_running_average, name)
        if changed and not self.is_initializing():
            running.value, count.value = changed['preconditioner'], changed['count']
        return v

    def _affine(self, named, dtype):
        """Returns the kernel and bias of the channel-wise convolution."""
        kernel, bias = (self.param(name, *named[name], self.param_dtype) for name in ('affine_kernel', 'affine_bias'))
        return kernel[..., 0, :].astype(dtype), bias.astype(dtype)

    def _fold(self, kernel, v, geometry, method):
        """Writes the values that `fold_for_inference` collects."""
        params, statistics = (self.variables.get(name, {}) for name in ('params', 'batch_stats'))
        values = folding.folded_values(kernel, v, params, statistics, self.batch_norm_epsilon, geometry, method)
        for name, value in values.items():
            self.put_variable(folding.COLLECTION, name, value)

    def _folded(self, x, geometry):
        """Returns the output at inference from the folded values."""
        values = {name: jnp.asarray(value) for name, value in self.variables[folding.COLLECTION].items()}
        x, settings = x.astype(self.dtype or x.dtype), self.settings
        if values['grid'].shape != geometry.grid:
            folded, given = (by_x(settings.image_size(grid)) for grid in (values['grid'].shape, geometry.grid))
            raise UserError(
                f'{"/".join(self.path) or type(self).__name__}: folded for images of {folded}, got '
                f'{given}; call fold_for_inference with images of this size'
            )
        if 'filters' in values:
            y = frequency.filtered(x, values['filters'], 1, geometry, self.precision)
        elif 'v' in values:
            method = 'reference' if self.method == 'reference' or geometry.rank == 3 else 'spatial'
            y = normalized_convolution(x, values['kernel'], values['v'], geometry, method, self.precision)
        else:
            y = core.pointwise(settings, x, values['kernel'].astype(x.dtype), geometry)
        if 'affine_kernel' in values:
            y = channelwise_convolution(y, values['affine_kernel'].astype(x.dtype), geometry.circular)
        return add_bias(y, values['bias'])


class ConvNorm(NormalizedConvolution):
    r"""A convolution whose output channels are normalized by their power spectrum.

    It replaces a convolution and the normalization after it. Each output channel o of the full convolution y is divided
    by the square root of the power spectrum of its filters, in the Fourier domain, then cropped and strided (S):

    .. math::
        y_o = \sum_i x_i * k_{io}, \qquad
        V_o(\omega) = \Bigl(\sum_i |F k_{io}(\omega)|^2\Bigr)^{-1/2}, \qquad
        z_o = S\,F^{-1}\bigl(V_o\, F y_o\bigr)

    A learned channel-wise convolution with bias and, by default, batch normalization follow. The gradient treats V as a
    constant.

    Training uses the V of the current kernel. Inference uses its running average, which the collection `batch_stats`
    holds next to BatchNorm's statistics: `preconditioner`, float32 [Hf, Wf, features], and `count`, the number of
    updates, float32.

    Source: Liu et al., *Convolutional Normalization: Improving Deep Convolutional Network Robustness and Training*,
    NeurIPS 2021, `arXiv 2103.00673 <https://arxiv.org/abs/2103.00673>`__, section 3.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from convnorm_jax import ConvNorm
      >>> layer = ConvNorm(features=16, strides=2)
      >>> images = jnp.ones((8, 32, 32, 3))
      >>> variables = layer.init(jax.random.key(0), images, use_running_average=False)
      >>> y, changed = layer.apply(variables, images, use_running_average=False, mutable=['batch_stats'])
      >>> y.shape
      (8, 16, 16, 16)
      >>> changed['batch_stats']['preconditioner'].shape
      (34, 34, 16)

    Attributes:
      features: output channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw), for 1, 2 or 3 spatial axes; one int k is (k, k).
      strides: an int, or an int for each axis.
      padding: 'SAME', 'VALID', 'CIRCULAR', an int, or an int or a pair for each axis, between 0 and k-1 on each side,
        with k the size of the dilated kernel. 'SAME' is that of XLA: with strides it can be one less on the top and
        left than in PyTorch. With 'CIRCULAR' the image is periodic, for the channel-wise convolution too, and at
        stride 1 each output channel has a flat spectrum.
      use_affine: whether to apply the channel-wise convolution and BatchNorm's scale and bias.
      use_batch_norm: whether to end with BatchNorm.
      use_running_average: True at inference, False in training. Give it here or in the call.
      momentum: share of the old running spectrum that an update keeps; None takes the published schedule, see
        `convnorm_jax.functional.update_weight`.
      spectrum: 'running' or 'exact': whether inference uses the running average or recomputes the spectrum from the
        kernel. With 'exact' images may have another size than those trained on.
      method: the algorithm. 'spatial' is a direct convolution followed by the filter, 'frequency' computes all in the
        frequency domain, 'reference' uses FFTs as the paper writes it. The results are the same up to rounding. None
        takes the fastest for the platform that the program is compiled for.
      batch_norm_momentum, batch_norm_epsilon: of BatchNorm.
      dtype: of the computation and the output, as in `flax.linen.Conv`. Statistics are always float32.
      param_dtype: of the parameters.
      precision: of the convolution's products (`jax.lax.Precision`).
      kernel_dilation: distance from one tap to the next, an int or an int for each axis.
      feature_group_count: groups of channels with kernels of their own. With as many groups as input channels it is a
        depthwise convolution.
    """
