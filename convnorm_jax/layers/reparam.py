"""Convolutions with a reparametrized kernel: spectral norm, ONI, OWN, weight norm.

Each stands where `flax.linen.Conv` stands, or, transposed, where `transposed.ConvTranspose`
does, with PyTorch's initial values, and leaves the normalization of its output to whatever
follows. Spectral norm has a dense layer too. The mathematics is in `orthogonal`.
"""

import math
import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.module import merge_param

from convnorm_jax.errors import UserError
from convnorm_jax.layers import orthogonal
from convnorm_jax.layers.channelwise import add_bias
from convnorm_jax.layers.geometry import (
    canonical_padding,
    canonical_transposed_padding,
    channels_in_a_group,
    check_shape,
    ints_for_axes,
    spatial_axes,
)
from convnorm_jax.layers.initializers import torch_bias_init, torch_kernel_init, torch_transposed_kernel_init
from convnorm_jax.layers.power_iterated import check_iterations, power_iterated_norm
from convnorm_jax.layers.transposed import transposed_convolution

SPECTRAL_NORM_MODES = ('reshaped', 'conv')

# OWN's filters in a group, unless told: the paper's figure, for the cost of the eigenvectors.
MOST_FILTERS = 64


class _ReparametrizedConv(nn.Module):
    """What the convolutions of this file share.

    Attributes:
      features: output channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw), for 1, 2 or 3 spatial axes; an int is a square of 2.
      strides: int, or an int for each axis.
      padding: 'SAME', 'VALID', 'CIRCULAR' (periodic pictures, as in `flax.linen.Conv`), int,
        or pairs, between 0 and k-1 on each side.
      use_bias: add a learned bias.
      dtype: of the convolution and the output, as in `flax.linen.Conv`; the kernel is
        reparametrized in float32 always.
      param_dtype: of the parameters.
      precision: of the convolution's products (`jax.lax.Precision`).
      kernel_init: of the kernel; None is PyTorch's.
      transposed: a transposed convolution, with the geometry of `transposed.ConvTranspose`:
        padding is an int or pairs then, and there are 2 spatial axes and one group. The kernel is
        reparametrized just so, a filter being what an output channel has.
      feature_group_count: groups of channels with kernels of their own; as many as channels is a depthwise convolution.
    """

    features: int
    kernel_size: int | Sequence[int] = (3, 3)
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[int | tuple[int, int]] = 'SAME'
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Callable | None = None
    transposed: bool = False
    feature_group_count: int = 1

    def _parameters(self, x):
        """(kernel, bias or None) for images x, checked."""
        kernel_size = self._ints('kernel_size')
        check_shape(x.shape, kernel_size)
        if not isinstance(self.features, numbers.Integral) or self.features < 1:
            raise UserError(f'features={self.features!r}: expected a positive int')
        channels = channels_in_a_group(self.feature_group_count, x.shape[-1], self.features)
        if self.transposed and (self.feature_group_count > 1 or len(kernel_size) != 2):
            raise UserError(
                f'kernel_size={kernel_size} with feature_group_count={self.feature_group_count}: a transposed '
                f'{type(self).__name__} has 2 spatial axes and one group; take convnorm'
            )
        init = self.kernel_init or (torch_transposed_kernel_init if self.transposed else torch_kernel_init)
        kernel = self.param('kernel', init, (*kernel_size, channels, self.features), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        fan_in = math.prod(kernel_size) * (self.features if self.transposed else channels)
        return kernel, self.param('bias', torch_bias_init(fan_in), (self.features,), self.param_dtype)

    def _ints(self, name):
        return ints_for_axes(getattr(self, name), name, spatial_axes(self.kernel_size))

    def _geometry(self, image_size):
        """(strides, padding) as `orthogonal.convolve`, or `transposed_convolution`, takes them."""
        strides, kernel_size = self._ints('strides'), self._ints('kernel_size')
        if self.transposed:
            return strides, canonical_transposed_padding(self.padding, image_size, kernel_size, strides)
        return strides, canonical_padding(self.padding, image_size, kernel_size, strides)

    def _convolution(self, x, kernel, bias):
        strides, padding = self._geometry(x.shape[1:-1])
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if self.transposed:
            y = transposed_convolution(x, kernel, strides, padding, self.precision)
        else:
            y = orthogonal.convolve(x, kernel, strides, padding, self.precision, self.feature_group_count)
        return y if bias is None else add_bias(y, bias)

    def _scale(self, init_scale, learn_scale):
        """Factor of every output channel, learned or constant, for a kernel."""
        if not learn_scale:
            return init_scale
        scale = self.param('scale', nn.initializers.constant(init_scale), (self.features,), self.param_dtype)
        return scale.astype(jnp.float32).reshape((1,) * (spatial_axes(self.kernel_size) + 1) + (-1,))


class SpectralNormConv(_ReparametrizedConv):
    """Convolution whose kernel is divided by its largest singular value (arXiv 1802.05957).

    Power iteration: each training pass moves the singular vectors u and v, kept in
    `batch_stats` (float32), by one step; evaluation takes them as they are. The norm is
    u^T W v with u and v constant to differentiation, as `torch.nn.utils.spectral_norm` has it.

    Other attributes: those of `flax.linen.Conv`, see `_ReparametrizedConv`.

    Attributes:
      mode: 'reshaped' is the published way, the norm of the kernel as a matrix, a row for each output
        channel: u [features], v [cin*kh*kw], cin that of a group. It is not the norm of the layer, which can
        be up to sqrt(kh*kw) times as large. 'conv' takes that of the convolution itself with its padding and
        strides, on pictures of the size it was initialized with: u [H', W', features], v [H, W, cin].
      iterations: steps of each training pass.
      init_iterations: steps at initialization, from random u and v. With 0, as in
        `torch.nn.utils.spectral_norm`, evaluation before any training divides by a random
        number; its successor in `torch.nn.utils.parametrizations` makes 15.
      eps: u and v are divided by their norm or this, whichever is larger.
      use_running_average: evaluation (here or in the call).
    """

    mode: str = 'reshaped'
    iterations: int = 1
    init_iterations: int = 15
    eps: float = 1e-12
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x, use_running_average=None):
        """[B, H, W, cin] -> [B, H', W', features]; use_running_average: True in evaluation."""
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        self._check_options()
        kernel, bias = self._parameters(x)
        v_shape = (kernel.size // self.features,) if self.mode == 'reshaped' else x.shape[1:]
        norm = power_iterated_norm(self, self._operator, kernel, v_shape, use_running_average)
        return self._convolution(x, kernel.astype(jnp.float32) / orthogonal.safe_divisor(norm), bias)

    def _check_options(self):
        if self.mode not in SPECTRAL_NORM_MODES:
            raise UserError(f'mode={self.mode!r}: expected one of {SPECTRAL_NORM_MODES}')
        if self.mode == 'conv' and self.transposed:
            raise UserError(f"mode={self.mode!r}: a transposed convolution takes 'reshaped' only")
        check_iterations(self)

    def _operator(self, kernel, v):
        if self.mode == 'reshaped':
            return orthogonal.reshaped_operator(kernel)
        return orthogonal.convolution_operator(kernel, *self._geometry(v.shape[:-1]), self.feature_group_count)


class SpectralNormDense(nn.Module):
    """Linear layer whose matrix is divided by its largest singular value (arXiv 1802.05957).

    By power iteration with the state u [features] and v [cin] in `batch_stats`, as
    `SpectralNormConv` has it.

    Attributes:
      features: outputs.
      use_bias: add a learned bias, from 0.
      kernel_init: of the kernel [cin, features].
      iterations, init_iterations, eps, use_running_average: see `SpectralNormConv`.
      dtype: of the product and the output, as in `flax.linen.Dense`; the kernel is divided in float32.
      param_dtype: of the parameters.
    """

    features: int
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.xavier_uniform()
    iterations: int = 1
    init_iterations: int = 15
    eps: float = 1e-12
    use_running_average: bool | None = None
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, use_running_average=None):
        """[..., cin] -> [..., features]; use_running_average: True in evaluation."""
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        check_iterations(self)
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, (self.features,), self.param_dtype) if self.use_bias else None
        norm = power_iterated_norm(
            self,
            lambda w, _: orthogonal.reshaped_operator(w[None, None]),
            kernel,
            kernel.shape[:1],
            use_running_average,
        )
        kernel = kernel.astype(jnp.float32) / orthogonal.safe_divisor(norm)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.dot(x, kernel)
        return y if bias is None else add_bias(y, bias)


class ONIConv(_ReparametrizedConv):
    """Convolution with filters made nearly orthogonal by Newton's iteration (arXiv 2004.00887).

    Other attributes: those of `flax.linen.Conv`, see `_ReparametrizedConv`.

    Attributes:
      iterations: of Newton, the paper's T.
      groups: of consecutive filters, each orthogonalized by itself; a divisor of features. Filters of
        different groups of a grouped convolution see different channels and are orthogonal anyway: `groups`
        are those within each of them.
      init_scale: first value of the factor `scale` of every output channel.
      learn_scale: learn it; otherwise it stays.
      eps: see `orthogonal.oni`.
      rows_only: orthogonalize rows even with more filters than weights in each.
      bounded_columns: False, as published, can diverge with more filters than weights in
        each; see `orthogonal.oni`.
    """

    iterations: int = 3
    groups: int = 1
    init_scale: float = 1.414
    learn_scale: bool = True
    eps: float = 1e-5
    rows_only: bool = False
    bounded_columns: bool = False

    @nn.compact
    def __call__(self, x):
        """[B, H, W, cin] -> [B, H', W', features]."""
        kernel, bias = self._parameters(x)
        _check_weights_per_filter(kernel)
        filters, weights = self.features // self.feature_group_count, kernel.size // self.features
        groups = _filter_groups(self) * self.feature_group_count
        rows = self.rows_only or filters <= weights
        orthogonalized = orthogonal.oni(kernel, self.iterations, groups, self.eps, rows, self.bounded_columns)
        return self._convolution(x, orthogonalized * self._scale(self.init_scale, self.learn_scale), bias)


class OWNConv(_ReparametrizedConv):
    """Convolution with orthonormal filters, by an eigendecomposition (arXiv 1709.06079).

    Other attributes: those of `flax.linen.Conv`, see `_ReparametrizedConv`.

    Attributes:
      groups: of consecutive filters, each orthogonalized by itself, within each group of a grouped
        convolution (see `ONIConv`); a divisor of features that leaves fewer filters in a group
        than a filter has weights. None takes the fewest such groups of at most 64 filters. (The
        published class defaults to 64 groups: with 64 channels it only normalizes each filter.)
      init_scale: first value of the factor `scale` of every output channel.
      learn_scale: learn it; otherwise it stays, as published.
    """

    groups: int | None = None
    init_scale: float = 1.414
    learn_scale: bool = False

    @nn.compact
    def __call__(self, x):
        """[B, H, W, cin] -> [B, H', W', features]."""
        kernel, bias = self._parameters(x)
        _check_weights_per_filter(kernel)
        groups = self._group_count(kernel.size // self.features) * self.feature_group_count
        orthogonalized = orthogonal.own(kernel, groups)
        return self._convolution(x, orthogonalized * self._scale(self.init_scale, self.learn_scale), bias)

    def _group_count(self, weights):
        """Number of groups for filters of that many weights, within each group of channels."""
        # Centring takes one dimension.
        most, filters = weights - 1, self.features // self.feature_group_count
        if self.groups is None:
            most = min(most, MOST_FILTERS)
            return next(g for g in range(1, filters + 1) if filters % g == 0 and filters // g <= most)
        groups = _filter_groups(self, ', or None')
        if filters // groups > most:
            raise UserError(
                f'groups={groups} with features={filters}: at most {most} centred filters of {weights} '
                'weights can be orthogonal; give more groups, or None'
            )
        return groups


class WeightNormConv(_ReparametrizedConv):
    """Convolution whose filters have a learned norm, scale * kernel / ||kernel|| (arXiv 1602.07868).

    `scale`, [features], starts as the norms of the kernel, so that the first output is that of
    the plain convolution: PyTorch's start, not the paper's data-dependent one.

    Attributes: those of `flax.linen.Conv`, see `_ReparametrizedConv`.
    """

    @nn.compact
    def __call__(self, x):
        """[B, H, W, cin] -> [B, H', W', features]."""
        kernel, bias = self._parameters(x)
        scale = self.param('scale', lambda key: orthogonal.filter_norms(kernel).astype(self.param_dtype))
        return self._convolution(x, orthogonal.weight_norm(kernel, scale), bias)


def _filter_groups(layer, otherwise=''):
    """ONI's and OWN's option `groups`, checked against the filters of a group of channels."""
    filters, groups = layer.features // layer.feature_group_count, layer.groups
    if not isinstance(groups, numbers.Integral) or groups < 1 or filters % groups:
        where = f'features={filters}'
        if layer.feature_group_count > 1:
            where = f'the {filters} filters of each of the {layer.feature_group_count} groups of channels'
        raise UserError(f'groups={groups!r}: expected a divisor of {where}{otherwise}')
    return groups


def _check_weights_per_filter(kernel):
    if math.prod(kernel.shape[:-1]) == 1:
        raise UserError(
            f'kernel_size={kernel.shape[:-2]} with one input channel: a filter of one weight, less its mean, is zero'
        )
