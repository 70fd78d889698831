"""ConvNorm, convolutional normalization, as a Linen module (arXiv 2103.00673)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.module import merge_param

from convnorm_jax.errors import UserError
from convnorm_jax.layers import bilinear, convolution, folding, frequency, spectral
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.channelwise import channelwise_convolution, over_channels
from convnorm_jax.layers.dtypes import at_least_float32, widened
from convnorm_jax.layers.initializers import torch_bias_init, torch_kernel_init
from convnorm_jax.layers.materialize import materialized_output
from convnorm_jax.layers.method import METHODS
from convnorm_jax.layers.operation import normalized_convolution, preconditioner

SPECTRUM_MODES = ('running', 'exact')

# The published schedule of the running spectrum: half a cosine over this many updates,
# down to this weight for the new value.
RAMP_UPDATES = 40000
FINAL_WEIGHT = 0.01


def update_weight(count):
    """Weight of the new spectrum in update number `count` (from 1), float32 scalar."""
    phase = jnp.minimum(jnp.asarray(count, jnp.float32), RAMP_UPDATES) / RAMP_UPDATES
    return jnp.maximum(0.5 * (1 + jnp.cos(jnp.pi * phase)), FINAL_WEIGHT)


def canonical_padding(padding, image_size, kernel_size, strides):
    """Padding as pairs ((top, bottom), (left, right)).

    Args:
      padding: 'SAME' or 'VALID' (as in `jax.lax`), one int for all sides, or a pair of
        ints or of pairs, one for each axis.
      image_size: (H, W); kernel_size: (kh, kw); strides: (sh, sw).

    Raises:
      ValueError: another form, or a padding outside 0 ... k-1, which ConvNorm's crop of
        the full convolution can not give.
    """
    if isinstance(padding, str) and padding in ('SAME', 'VALID'):
        pairs = jax.lax.padtype_to_pads(image_size, kernel_size, strides, padding)
    else:
        pairs = padding_pairs(padding)
    for pair, n, k in zip(pairs, image_size, kernel_size):
        if not all(0 <= p <= k - 1 for p in pair):
            raise UserError(
                f'padding={padding!r} with kernel_size={tuple(kernel_size)}: '
                'expected between 0 and kernel_size - 1 on each side'
            )
        if n + sum(pair) < k:
            raise UserError(
                f'pictures of {image_size[0]}x{image_size[1]} with padding={padding!r}: '
                f'smaller than kernel_size={tuple(kernel_size)}, nothing would be left'
            )
    return tuple((int(a), int(b)) for a, b in pairs)


def _is_int(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def padding_pairs(padding):
    """Padding as ((top, bottom), (left, right)), from an int, or an int or a pair for each axis.

    Raises:
      ValueError: anything else, and names too.
    """
    sides = [padding] * 2 if _is_int(padding) else padding
    if isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == 2:
        pairs = [(p, p) if _is_int(p) else p for p in sides]
        if all(isinstance(p, Sequence) and len(p) == 2 and all(map(_is_int, p)) for p in pairs):
            return pairs
    raise UserError(f"padding={padding!r}: expected 'SAME', 'VALID', an int or a pair for each of the two axes")


def pair_of_ints(value, name):
    """A kernel size or strides as two positive ints, from one or two; None is (1, 1).

    Raises:
      ValueError: anything else.
    """
    pair = (1, 1) if value is None else (value, value) if _is_int(value) else value
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(_is_int(v) and v >= 1 for v in pair):
        raise UserError(f'{name}={value!r}: expected a positive int or two of them')
    return tuple(int(v) for v in pair)


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

    A subclass says how large the picture is that its full convolution sees, and which rows
    and columns of that convolution are kept.

    Attributes: see `ConvNorm`.
    """

    features: int
    kernel_size: int | Sequence[int] = (3, 3)
    strides: int | Sequence[int] = (1, 1)
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

    kernel_init = staticmethod(torch_kernel_init)

    @nn.compact
    def __call__(self, x, use_running_average=None):
        """Applies the layer.

        Args:
          x: [B, H, W, C], float.
          use_running_average: True at inference, False in training.

        Returns:
          [B, H', W', features], with H' and W' those of a (transposed) convolution with
          the same padding and strides.

        Raises:
          ValueError: x of another rank; padding outside 0 ... k-1; at inference in
            'running' mode, pictures of another size than those trained on.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        if x.ndim != 4:
            raise UserError(f'x.shape={x.shape}: expected [batch, height, width, channels]')
        _refuse_explicit_axes()
        if self.spectrum not in SPECTRUM_MODES:
            raise UserError(f'spectrum={self.spectrum!r}: expected one of {SPECTRUM_MODES}')
        if self.method is not None and self.method not in METHODS:
            raise UserError(f'method={self.method!r}: expected one of {METHODS}, or None to choose by size')
        if not _is_int(self.features) or self.features < 1:
            raise UserError(f'features={self.features!r}: expected a positive int')
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise UserError(
                f'momentum={self.momentum}: expected at least 0 and below 1, or None for the published schedule'
            )
        kernel_size = pair_of_ints(self.kernel_size, 'kernel_size')
        strides = pair_of_ints(self.strides, 'strides')
        padding = self._canonical_padding(x.shape[1:3], kernel_size, strides)
        geometry = self._geometry(x.shape[1:3], kernel_size, strides, padding)
        if use_running_average and self.has_variable(folding.COLLECTION, 'bias'):
            return self._folded(x, geometry)
        kernel = self.param('kernel', self.kernel_init, (*kernel_size, x.shape[-1], self.features), self.param_dtype)
        kernel = widened(kernel, self.dtype or x.dtype)
        v = self._preconditioner(kernel, geometry, x.shape[0], use_running_average)
        y = self._normalized_convolution(x, kernel, v, geometry)
        affine = self._affine(kernel_size, y.dtype) if self.use_affine else None
        if self.use_batch_norm:
            y = BatchNorm(
                use_running_average=use_running_average,
                momentum=self.batch_norm_momentum,
                epsilon=self.batch_norm_epsilon,
                use_affine=self.use_affine,
                param_dtype=self.param_dtype,
                name='batch_norm',
            )(y, channelwise=affine)
        elif affine is not None:
            kernel_of_channels, bias = affine
            y = channelwise_convolution(y, kernel_of_channels) + over_channels(bias, y)
        if folding.is_asked_for() and self.is_mutable_collection(folding.COLLECTION):
            self._fold(kernel, v, geometry, self.method or folding.method(geometry, x, kernel))
        return materialized_output(y, kernel[0, 0, 0, 0])

    def _fold(self, kernel, v, geometry, method):
        """Writes what `fold_for_inference` wants."""
        params, statistics = (self.variables.get(name, {}) for name in ('params', 'batch_stats'))
        values = folding.folded_values(kernel, v, params, statistics, self.batch_norm_epsilon, geometry, method)
        for name, value in values.items():
            self.put_variable(folding.COLLECTION, name, value)

    def _folded(self, x, geometry):
        """The layer at inference by its folded values."""
        values = {name: jnp.asarray(value) for name, value in self.variables[folding.COLLECTION].items()}
        (x,) = promote_dtype(x, dtype=self.dtype)
        if values['grid'].shape != geometry.grid:
            kernel_size = tuple(map(len, geometry.taps))
            sizes = [self._image_size(grid, kernel_size) for grid in (values['grid'].shape, geometry.grid)]
            raise UserError(
                f'{"/".join(self.path) or type(self).__name__}: folded for images of {sizes[0][0]}x{sizes[0][1]}, got '
                f'{sizes[1][0]}x{sizes[1][1]}; call fold_for_inference with images of this size'
            )
        if 'filters' in values:
            y = frequency.filtered(x, values['filters'], 1, geometry, self.precision)
        elif 'v' in values:
            method = 'reference' if self.method == 'reference' else 'spatial'
            y = normalized_convolution(x, values['kernel'], values['v'], geometry, method, self.precision)
        else:
            y = self._pointwise(x, values['kernel'].astype(x.dtype))
        if 'affine_kernel' in values:
            y = channelwise_convolution(y, values['affine_kernel'].astype(x.dtype))
        return y + over_channels(values['bias'].astype(x.dtype), y)

    def _normalized_convolution(self, x, kernel, v, geometry):
        """Steps 1 to 4: convolution, division by the root of the power spectrum, crop and stride."""
        x, rounded = promote_dtype(x, kernel, dtype=self.dtype)
        if kernel.shape[:2] == (1, 1):
            # A flat spectrum scales the kernel itself, and nothing is computed that a stride drops.
            return self._pointwise(x, (rounded.astype(v.dtype) * v[None]).astype(x.dtype))
        # By the method 'frequency' the kernel is rounded only after its transform.
        return normalized_convolution(x, kernel, v, geometry, self.method, self.precision)

    def _preconditioner(self, kernel, geometry, batch, use_running_average):
        """V of this pass, [Hf, Wf, features]; updates the running average in training."""
        grid = geometry.grid
        current = functools.partial(preconditioner, kernel, geometry, self.method, batch)
        # At initialization the state is made in every mode, so that it never changes its shape.
        if self.spectrum == 'exact' and use_running_average and not self.is_initializing():
            return current()
        kept_as = at_least_float32(self.param_dtype)
        running = self.variable('batch_stats', 'preconditioner', lambda: current().astype(kept_as))
        # float32: loops that average batch_stats over devices leave its dtype alone.
        count = self.variable('batch_stats', 'count', lambda: jnp.zeros((), jnp.float32))
        self._check_size(running.value.shape[:2], grid, kernel.shape[:2], use_running_average)
        if use_running_average:
            return running.value
        v = current()
        if not self.is_initializing():
            count.value = count.value + 1
            weight = update_weight(count.value) if self.momentum is None else 1 - self.momentum
            weight, new = jnp.asarray(weight, kept_as), v.astype(kept_as)
            running.value = weight * new + (1 - weight) * running.value
        return v

    def _check_size(self, stored, grid, kernel_size, use_running_average):
        if kernel_size == (1, 1) or tuple(stored) == grid:
            return
        trained, given = (self._image_size(g, kernel_size) for g in (stored, grid))
        remedy = (
            "or set spectrum='exact', which recomputes it from the kernel"
            if use_running_average
            else 'or initialize with the picture size you train on'
        )
        where = '/'.join(self.path) or type(self).__name__
        raise UserError(
            f'{where}: the running spectrum is of {trained[0]}x{trained[1]} pictures, '
            f'got {given[0]}x{given[1]}; give {trained[0]}x{trained[1]}, {remedy}'
        )

    def _affine(self, kernel_size, dtype):
        """The channel-wise convolution as (kernel, bias)."""
        fan_in = kernel_size[0] * kernel_size[1]
        kernel = self.param('affine_kernel', torch_kernel_init, (*kernel_size, 1, self.features), self.param_dtype)
        bias = self.param('affine_bias', torch_bias_init(fan_in), (self.features,), self.param_dtype)
        return promote_dtype(kernel[:, :, 0], bias, dtype=self.dtype or dtype)


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
      kernel_size: int or (kh, kw).
      strides: int or (sh, sw).
      padding: 'SAME', 'VALID', int, or pairs, between 0 and k-1 on each side. 'SAME' is
        XLA's: with strides it can be one less on the top and left than PyTorch's.
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

    def _canonical_padding(self, image_size, kernel_size, strides):
        return canonical_padding(self.padding, image_size, kernel_size, strides)

    def _geometry(self, image_size, kernel_size, strides, padding):
        grid = spectral.grid_size(image_size, kernel_size)
        return bilinear.Geometry(
            grid,
            inputs=tuple(tuple(range(n)) for n in image_size),
            taps=tuple(tuple(range(k - 1, -1, -1)) for k in kernel_size),  # a cross-correlation's: mirrored
            kept=spectral.crop_indices(grid, kernel_size, padding, strides),
        )

    def _image_size(self, grid, kernel_size):
        return tuple(n - k + 1 for n, k in zip(grid, kernel_size))

    def _pointwise(self, x, kernel):
        return convolution.pointwise(x, kernel, pair_of_ints(self.strides, 'strides'), self.precision)
