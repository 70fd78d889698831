"""ConvNorm, convolutional normalization, as a Linen module (arXiv 2103.00673)."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.module import merge_param

from convnorm_jax.errors import UserError
from convnorm_jax.layers import convolution, folding, frequency, geometry
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.channelwise import channelwise_convolution, over_channels
from convnorm_jax.layers.dtypes import at_least_float32, widened
from convnorm_jax.layers.geometry import by_x, canonical_padding, ints_for_axes, is_int, spatial_axes
from convnorm_jax.layers.initializers import torch_bias_init, torch_kernel_init
from convnorm_jax.layers.materialize import materialized_output
from convnorm_jax.layers.method import METHODS
from convnorm_jax.layers.operation import normalized_convolution, preconditioner
from convnorm_jax.layers.reference import layouts
from convnorm_jax.layers.spectral import is_pointwise

SPECTRUM_MODES = ('running', 'exact')
_EXPECTED = {
    1: '[batch, width, channels]',
    2: '[batch, height, width, channels]',
    3: '[batch, depth, height, width, channels]',
}

# The published schedule of the running spectrum: half a cosine over this many updates,
# down to this weight for the new value.
RAMP_UPDATES = 40000
FINAL_WEIGHT = 0.01


def update_weight(count):
    """Weight of the new spectrum in update number `count` (from 1), float32 scalar."""
    phase = jnp.minimum(jnp.asarray(count, jnp.float32), RAMP_UPDATES) / RAMP_UPDATES
    return jnp.maximum(0.5 * (1 + jnp.cos(jnp.pi * phase)), FINAL_WEIGHT)


def _refuse_explicit_axes():
    """A mesh with explicit axes would need a sharding for every intermediate array, which flax has no way to say."""
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        raise UserError(
            f'the mesh in use has explicit axes ({mesh.axis_names}): make it with '
            f'jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})'
        )


class NormalizedConvolution(nn.Module):
    """What `ConvNorm` and `ConvNormTranspose` share: all but the geometry.

    A subclass says where the pixels and the taps lie on the grid of its full convolution, and what of it is kept.

    Attributes: see `ConvNorm`.
    """

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

    kernel_init = staticmethod(torch_kernel_init)

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
            'running' mode, pictures of another size than those trained on.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        rank = spatial_axes(self.kernel_size)
        if x.ndim != rank + 2:
            raise UserError(f'x.shape={x.shape}: expected {_EXPECTED[rank]} with kernel_size={self.kernel_size!r}')
        _refuse_explicit_axes()
        if self.spectrum not in SPECTRUM_MODES:
            raise UserError(f'spectrum={self.spectrum!r}: expected one of {SPECTRUM_MODES}')
        if self.method is not None and self.method not in METHODS:
            raise UserError(f'method={self.method!r}: expected one of {METHODS}, or None to choose by size')
        if not is_int(self.features) or self.features < 1:
            raise UserError(f'features={self.features!r}: expected a positive int')
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise UserError(
                f'momentum={self.momentum}: expected at least 0 and below 1, or None for the published schedule'
            )
        kernel_size = ints_for_axes(self.kernel_size, 'kernel_size', rank)
        strides = ints_for_axes(self.strides, 'strides', rank)
        dilation = ints_for_axes(self.kernel_dilation, 'kernel_dilation', rank)
        cin = self._features_of_group(x.shape[-1])
        geometry = self._geometry(x.shape[1:-1], kernel_size, strides, dilation)
        if use_running_average and self.has_variable(folding.COLLECTION, 'bias'):
            return self._folded(x, geometry, strides)
        kernel = self.param('kernel', self.kernel_init, (*kernel_size, cin, self.features), self.param_dtype)
        kernel = widened(kernel, self.dtype or x.dtype)
        v = self._preconditioner(kernel, geometry, x.shape[0], strides, use_running_average)
        y = self._normalized_convolution(x, kernel, v, geometry, strides)
        affine = self._affine(kernel_size, y.dtype) if self.use_affine else None
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
            y = channelwise_convolution(y, kernel_of_channels, geometry.circular) + over_channels(bias, y)
        if folding.is_asked_for() and self.is_mutable_collection(folding.COLLECTION):
            self._fold(kernel, v, geometry, self.method or folding.method(geometry, x, kernel))
        return materialized_output(y, kernel[(0,) * kernel.ndim])

    def _features_of_group(self, features_in):
        groups = self.feature_group_count
        if not is_int(groups) or groups < 1 or features_in % groups or self.features % groups:
            raise UserError(
                f'feature_group_count={groups!r} with {features_in} channels and features={self.features}: '
                'expected a positive int that divides both'
            )
        return features_in // groups

    def _fold(self, kernel, v, geometry, method):
        """Writes what `fold_for_inference` wants."""
        params, statistics = (self.variables.get(name, {}) for name in ('params', 'batch_stats'))
        values = folding.folded_values(kernel, v, params, statistics, self.batch_norm_epsilon, geometry, method)
        for name, value in values.items():
            self.put_variable(folding.COLLECTION, name, value)

    def _folded(self, x, geometry, strides):
        """The layer at inference by its folded values."""
        values = {name: jnp.asarray(value) for name, value in self.variables[folding.COLLECTION].items()}
        (x,) = promote_dtype(x, dtype=self.dtype)
        if values['grid'].shape != geometry.grid:
            sizes = [self._image_size(grid, geometry.spans, strides) for grid in (values['grid'].shape, geometry.grid)]
            raise UserError(
                f'{"/".join(self.path) or type(self).__name__}: folded for images of {by_x(sizes[0])}, got '
                f'{by_x(sizes[1])}; call fold_for_inference with images of this size'
            )
        if 'filters' in values:
            y = frequency.filtered(x, values['filters'], 1, geometry, self.precision)
        elif 'v' in values:
            method = 'reference' if self.method == 'reference' or geometry.rank == 3 else 'spatial'
            y = normalized_convolution(x, values['kernel'], values['v'], geometry, method, self.precision)
        else:
            y = self._pointwise(x, values['kernel'].astype(x.dtype), strides)
        if 'affine_kernel' in values:
            y = channelwise_convolution(y, values['affine_kernel'].astype(x.dtype), geometry.circular)
        return y + over_channels(values['bias'].astype(x.dtype), y)

    def _normalized_convolution(self, x, kernel, v, geometry, strides):
        """Steps 1 to 4: convolution, division by the root of the power spectrum, crop and stride."""
        x, rounded = promote_dtype(x, kernel, dtype=self.dtype)
        if is_pointwise(kernel):
            # A flat spectrum scales the kernel itself, and nothing is computed that a stride drops.
            return self._pointwise(x, (rounded.astype(v.dtype) * v[..., None, :]).astype(x.dtype), strides)
        # By the method 'frequency' the kernel is rounded only after its transform.
        return normalized_convolution(x, kernel, v, geometry, self.method, self.precision)

    def _preconditioner(self, kernel, geometry, batch, strides, use_running_average):
        """V of this pass, [Hf, Wf, features]; updates the running average in training."""
        current = functools.partial(preconditioner, kernel, geometry, self.method, batch)
        # At initialization the state is made in every mode, so that it never changes its shape.
        if self.spectrum == 'exact' and use_running_average and not self.is_initializing():
            return current()
        kept_as = at_least_float32(self.param_dtype)
        running = self.variable('batch_stats', 'preconditioner', lambda: current().astype(kept_as))
        # float32: loops that average batch_stats over devices leave its dtype alone.
        count = self.variable('batch_stats', 'count', lambda: jnp.zeros((), jnp.float32))
        if not is_pointwise(kernel) and running.value.shape[:-1] != geometry.grid:
            self._refuse_size(running.value.shape[:-1], geometry, strides, use_running_average)
        if use_running_average:
            return running.value
        v = current()
        if not self.is_initializing():
            count.value = count.value + 1
            weight = update_weight(count.value) if self.momentum is None else 1 - self.momentum
            weight, new = jnp.asarray(weight, kept_as), v.astype(kept_as)
            running.value = weight * new + (1 - weight) * running.value
        return v

    def _refuse_size(self, stored, geometry, strides, use_running_average):
        trained, given = (by_x(self._image_size(grid, geometry.spans, strides)) for grid in (stored, geometry.grid))
        remedy = (
            "or set spectrum='exact', which recomputes it from the kernel"
            if use_running_average
            else 'or initialize with the image size you train on'
        )
        where = '/'.join(self.path) or type(self).__name__
        raise UserError(f'{where}: the running spectrum is of {trained} images, got {given}; give {trained}, {remedy}')

    def _affine(self, kernel_size, dtype):
        """The channel-wise convolution as (kernel, bias)."""
        fan_in = math.prod(kernel_size)
        kernel = self.param('affine_kernel', torch_kernel_init, (*kernel_size, 1, self.features), self.param_dtype)
        bias = self.param('affine_bias', torch_bias_init(fan_in), (self.features,), self.param_dtype)
        return promote_dtype(kernel[..., 0, :], bias, dtype=self.dtype or dtype)


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

    def _geometry(self, image_size, kernel_size, strides, dilation):
        spans = geometry.dilated_size(kernel_size, dilation)
        padding = canonical_padding(self.padding, image_size, spans, strides)
        return geometry.of_convolution(image_size, kernel_size, strides, padding, dilation, self.feature_group_count)

    def _image_size(self, grid, spans, strides):
        return grid if self.padding == geometry.CIRCULAR else tuple(n - k + 1 for n, k in zip(grid, spans))

    def _pointwise(self, x, kernel, strides):
        if x.ndim == 4 and self.feature_group_count == 1:
            return convolution.pointwise(x, kernel, strides, self.precision)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            'VALID',
            dimension_numbers=layouts(len(strides)),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
        )
