"""ConvNorm, convolutional normalization, as a Linen module (arXiv 2103.00673)."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param

from convnorm_jax.errors import UserError
from convnorm_jax.layers import core, folding, frequency
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.channelwise import add_bias, channelwise_convolution
from convnorm_jax.layers.dtypes import widened
from convnorm_jax.layers.geometry import by_x
from convnorm_jax.layers.materialize import materialized_output
from convnorm_jax.layers.operation import normalized_convolution, preconditioner


def _refuse_explicit_axes():
    """A mesh with explicit axes would need a sharding for every intermediate array, which flax has no way to say."""
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        raise UserError(
            f'the mesh in use has explicit axes ({mesh.axis_names}): make it with '
            f'jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})'
        )


class NormalizedConvolution(nn.Module):
    """What `ConvNorm` and `ConvNormTranspose` share. Attributes: see `ConvNorm`."""

    features: int
    kernel_size: int | Sequence[int] = (3, 3)
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[int | tuple[int, int]] = 'SAME'
    use_affine: bool = True
    use_batch_norm: bool = True
    use_running_average: bool | None = None
    momentum: float | None = None
    spectrum: str = 'running'
    method: str | None = None
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1

    transposed = False

    @functools.cached_property
    def settings(self) -> core.Settings:
        """What the functions of `core` are told."""
        names = [field.name for field in dataclasses.fields(core.Settings) if field.name != 'transposed']
        return core.Settings(**{name: getattr(self, name) for name in names}, transposed=self.transposed)

    @nn.compact
    def __call__(self, x, use_running_average=None):
        """Applies the layer.

        Args:
          x: [B, H, W, C], float; [B, W, C] or [B, D, H, W, C] where `kernel_size` has 1 or 3 ints.
          use_running_average: True at inference, False in training.

        Returns:
          [B, H', W', features], with H' and W' those of a (transposed) convolution with
          the same padding and strides.

        Raises:
          ValueError: x of another rank; padding outside 0 ... k-1; at inference in
            'running' mode, images of another size than those trained on.
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
        if folding.is_asked_for() and self.is_mutable_collection(folding.COLLECTION):
            self._fold(kernel, v, geometry, self.method or folding.method(geometry, x, kernel))
        return materialized_output(y, kernel[(0,) * kernel.ndim])

    def _spectrum(self, kernel, geometry, batch, use_running_average):
        """V of this pass, [Hf, Wf, features]; updates the running average in training."""
        settings = self.settings
        # At initialization the state is made in every mode, so that it never changes its shape.
        if self.spectrum == 'exact' and use_running_average and not self.is_initializing():
            return preconditioner(kernel, geometry, self.method, batch)
        initial = lambda: preconditioner(kernel, geometry, self.method, batch).astype(settings.state_dtype)
        running = self.variable('batch_stats', 'preconditioner', initial)
        # float32: loops that average batch_stats over devices leave its dtype alone.
        count = self.variable('batch_stats', 'count', lambda: jnp.zeros((), jnp.float32))
        state = {'preconditioner': running.value, 'count': count.value}
        where = '/'.join(self.path) or type(self).__name__
        v, changed = core.spectrum(settings, kernel, geometry, batch, state, use_running_average, where)
        if changed and not self.is_initializing():
            running.value, count.value = changed['preconditioner'], changed['count']
        return v

    def _affine(self, named, dtype):
        """The channel-wise convolution as (kernel, bias)."""
        kernel, bias = (self.param(name, *named[name], self.param_dtype) for name in ('affine_kernel', 'affine_bias'))
        return kernel[..., 0, :].astype(dtype), bias.astype(dtype)

    def _fold(self, kernel, v, geometry, method):
        """Writes what `fold_for_inference` wants."""
        params, statistics = (self.variables.get(name, {}) for name in ('params', 'batch_stats'))
        values = folding.folded_values(kernel, v, params, statistics, self.batch_norm_epsilon, geometry, method)
        for name, value in values.items():
            self.put_variable(folding.COLLECTION, name, value)

    def _folded(self, x, geometry):
        """The layer at inference by its folded values."""
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
    """Convolution whose output channels are normalized by their power spectrum.

    Stands in for "convolution, then normalization": full convolution, division by the
    square root of each output channel's power spectrum, crop and stride, a learned
    channel-wise convolution with bias and, by default, batch normalization.

    Training uses the spectrum of the current kernel, inference its running average, kept
    in `batch_stats` (`preconditioner`, float32 [Hf, Wf, features], and `count`, the number
    of updates, float32) beside BatchNorm's statistics.

    Attributes:
      features: output channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw), for 1, 2 or 3 spatial axes; an int is a square of 2.
      strides: int, or an int for each axis.
      padding: 'SAME', 'VALID', 'CIRCULAR', int, or pairs, between 0 and k-1 on each side (of a dilated kernel's k).
        'SAME' is XLA's: with strides it can be one less on the top and left than PyTorch's. With 'CIRCULAR' the image
        is periodic, for the channel-wise convolution too; at stride 1 each output channel then has a flat spectrum.
      kernel_dilation: from one tap to the next, int or an int for each axis.
      feature_group_count: groups of channels with kernels of their own; as many as channels is a depthwise convolution.
      use_affine: the channel-wise convolution (and BatchNorm's scale and bias).
      use_batch_norm: BatchNorm at the end.
      use_running_average: inference (here or in the call).
      momentum: share of the old running spectrum that an update keeps; None is the
        published schedule, see `update_weight`.
      spectrum: at inference, 'running' takes the running average, 'exact' recomputes the
        spectrum from the kernel: for pictures of another size than those trained on.
      method: 'spatial', a direct convolution and then the filter; 'frequency', wholly in the frequency domain;
        'reference', by FFT as the paper writes it: the same up to rounding. None takes the fastest one for the
        platform that the program is compiled for, see `layers.operation`.
      batch_norm_momentum, batch_norm_epsilon: BatchNorm's.
      dtype: of the computation and the output, as in `flax.linen.Conv`; statistics are
        float32 always.
      param_dtype: of the parameters.
      precision: of the convolution's products (`jax.lax.Precision`).
    """
