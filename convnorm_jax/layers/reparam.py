"""Convolutions with a reparametrized kernel: spectral norm, ONI, OWN and weight norm.

Each replaces a `flax.linen.Conv` or, transposed, a `transposed.ConvTranspose`, with PyTorch's initial values. The
normalization of activations, if any, is a separate layer after it. The mathematics is in `spectral_norm` and
`orthogonal`.
"""

import math
import numbers
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.module import merge_param
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers import orthogonal, spectral_norm
from convnorm_jax.layers.channelwise import add_bias
from convnorm_jax.layers.geometry import (
    Ints,
    Padding,
    canonical_padding,
    canonical_transposed_padding,
    channels_in_a_group,
    check_shape,
    ints_for_axes,
    spatial_axes,
)
from convnorm_jax.layers.initializers import (
    Initializer,
    torch_bias_init,
    torch_kernel_init,
    torch_transposed_kernel_init,
)
from convnorm_jax.layers.power_iterated import check_iterations, power_iterated_norm
from convnorm_jax.layers.transposed import transposed_convolution

SPECTRAL_NORM_MODES = ('reshaped', 'conv')

# OWN's default for the filters in a group: the paper's figure, which bounds the cost of the eigenvectors.
MOST_FILTERS = 64


class _ReparametrizedConv(nn.Module):
    """The base class of the convolutions of this module.

    Attributes:
      features: output channels.
      kernel_size: (kw,), (kh, kw) or (kd, kh, kw), for 1, 2 or 3 spatial axes; one int k is (k, k).
      strides: an int, or an int for each axis.
      padding: 'SAME', 'VALID', 'CIRCULAR' (periodic images, as in `flax.linen.Conv`), an int, or an int or a pair for
        each axis, between 0 and k-1 on each side.
      use_bias: whether to add a learned bias.
      dtype: of the convolution and the output, as in `flax.linen.Conv`. The kernel is always reparametrized in float32.
      param_dtype: of the parameters.
      precision: of the convolution's products (`jax.lax.Precision`).
      kernel_init: initializer of the kernel; None takes PyTorch's.
      transposed: whether it is a transposed convolution, with the geometry of `transposed.ConvTranspose`: the padding
        is then an int or pairs, and there are 2 spatial axes and one group. A filter is what one output channel has, as
        in an ordinary convolution.
      feature_group_count: groups of channels with kernels of their own. With as many groups as input channels it is a
        depthwise convolution.
    """

    features: int
    kernel_size: Ints = (3, 3)
    strides: Ints = 1
    padding: Padding = 'SAME'
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer | None = None
    transposed: bool = False
    feature_group_count: int = 1

    def _parameters(self, x):
        """Returns the kernel and the bias or None, for images x, which are checked."""
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
        """Returns strides and padding as `spectral_norm.convolve`, or `transposed_convolution`, takes them."""
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
            y = spectral_norm.convolve(x, kernel, strides, padding, self.precision, self.feature_group_count)
        return y if bias is None else add_bias(y, bias)

    def _scale(self, init_scale, learn_scale):
        """Returns the factor of every output channel, learned or constant, broadcastable with a kernel."""
        if not learn_scale:
            return init_scale
        scale = self.param('scale', nn.initializers.constant(init_scale), (self.features,), self.param_dtype)
        return scale.astype(jnp.float32).reshape((1,) * (spatial_axes(self.kernel_size) + 1) + (-1,))


class SpectralNormConv(_ReparametrizedConv):
    r"""A convolution whose kernel is divided by its largest singular value.

    .. math::
        W / \sigma, \qquad \sigma = u^T W v

    The singular vectors u and v are float32 state in `batch_stats`. Each training pass updates them by power iteration;
    inference takes them as they are. They are constants to differentiation, as in `torch.nn.utils.spectral_norm`.

    The other attributes are those of `flax.linen.Conv`.

    Source: Miyato et al., `arXiv 1802.05957 <https://arxiv.org/abs/1802.05957>`__.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> layer = SpectralNormConv(features=8)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), use_running_average=False)
      >>> variables['batch_stats']['u'].shape, variables['batch_stats']['v'].shape
      ((8,), (27,))

    Attributes:
      mode: 'reshaped', the published way, takes the norm of the kernel as a matrix with a row for each output channel:
        u is [features], v is [cin*kh*kw], where cin is that of one group. This is not the norm of the layer, which can
        be up to sqrt(kh*kw) times as large. 'conv' takes the norm of the convolution itself, with its padding and
        strides, on images of the size it was initialized with: u is [H', W', features], v is [H, W, cin].
      iterations: power iterations in each training pass.
      init_iterations: power iterations at initialization, from random u and v. With 0, as in
        `torch.nn.utils.spectral_norm`, inference before any training divides by a random number;
        `torch.nn.utils.parametrizations.spectral_norm` takes 15.
      eps: u and v are divided by their norm or by this, whichever is larger.
      use_running_average: True at inference, False in training. Give it here or in the call.
    """

    mode: Literal['reshaped', 'conv'] = 'reshaped'
    iterations: int = 1
    init_iterations: int = 15
    eps: float = 1e-12
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Applies the layer, [B, H, W, cin] -> [B, H', W', features].

        Args:
          x: float.
          use_running_average: True at inference, False in training; None takes the attribute.

        Raises:
          ValueError: x of another rank; an attribute that the layer cannot have.
        """
        use_running_average = merge_param('use_running_average', self.use_running_average, use_running_average)
        self._check_options()
        kernel, bias = self._parameters(x)
        v_shape = (kernel.size // self.features,) if self.mode == 'reshaped' else x.shape[1:]
        norm = power_iterated_norm(self, self._operator, kernel, v_shape, use_running_average)
        return self._convolution(x, kernel.astype(jnp.float32) / spectral_norm.safe_divisor(norm), bias)

    def _check_options(self):
        if self.mode not in SPECTRAL_NORM_MODES:
            raise UserError(f'mode={self.mode!r}: expected one of {SPECTRAL_NORM_MODES}')
        if self.mode == 'conv' and self.transposed:
            raise UserError(f"mode={self.mode!r}: a transposed convolution takes 'reshaped' only")
        check_iterations(self)

    def _operator(self, kernel, v):
        if self.mode == 'reshaped':
            return spectral_norm.reshaped_operator(kernel)
        return spectral_norm.convolution_operator(kernel, *self._geometry(v.shape[:-1]), self.feature_group_count)


class ONIConv(_ReparametrizedConv):
    r"""A convolution whose filters are made nearly orthogonal by Newton's iteration (ONI).

    .. math::
        W = g\, B Z, \qquad B \approx (Z Z^T)^{-1/2}

    where Z holds the centred filters, B is the result of a few Newton iterations (see `orthogonal.oni`) and g is a
    factor of each output channel. The other attributes are those of `flax.linen.Conv`.

    Source: Huang et al., `arXiv 2004.00887 <https://arxiv.org/abs/2004.00887>`__.

    Attributes:
      iterations: number of Newton iterations, the paper's T.
      groups: number of groups of consecutive filters, each orthogonalized on its own; a divisor of features. In a
        grouped convolution filters of different groups of channels are orthogonal anyway, and `groups` counts the
        groups of filters within each.
      init_scale: initial value of the factor `scale` of every output channel.
      learn_scale: whether to learn the factor.
      eps: see `orthogonal.oni`.
      rows_only: whether to orthogonalize rows even with more filters than weights in each.
      bounded_columns: False, as published, can diverge with more filters than weights in each; see `orthogonal.oni`.
    """

    iterations: int = 3
    groups: int = 1
    init_scale: float = 1.414
    learn_scale: bool = True
    eps: float = 1e-5
    rows_only: bool = False
    bounded_columns: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer, [B, H, W, cin] -> [B, H', W', features]; raises ValueError as `SpectralNormConv`."""
        kernel, bias = self._parameters(x)
        _check_weights_per_filter(kernel)
        filters, weights = self.features // self.feature_group_count, kernel.size // self.features
        groups = _filter_groups(self) * self.feature_group_count
        rows = self.rows_only or filters <= weights
        orthogonalized = orthogonal.oni(kernel, self.iterations, groups, self.eps, rows, self.bounded_columns)
        return self._convolution(x, orthogonalized * self._scale(self.init_scale, self.learn_scale), bias)


class OWNConv(_ReparametrizedConv):
    r"""A convolution with orthonormal filters, by an eigendecomposition (OWN).

    .. math::
        W = g\, (Z Z^T)^{-1/2} Z

    where Z holds the centred filters and g is a factor of each output channel. The other attributes are those of
    `flax.linen.Conv`.

    Source: Huang et al., `arXiv 1709.06079 <https://arxiv.org/abs/1709.06079>`__.

    Attributes:
      groups: number of groups of consecutive filters, each orthogonalized on its own, within each group of a grouped
        convolution (see `ONIConv`). It is a divisor of features, and each group must have fewer filters than a filter
        has weights. None takes the fewest such groups of at most 64 filters. The published class has 64 groups by
        default, which with 64 channels only normalizes each filter.
      init_scale: initial value of the factor `scale` of every output channel.
      learn_scale: whether to learn the factor; False, as published, keeps it constant.
    """

    groups: int | None = None
    init_scale: float = 1.414
    learn_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer, [B, H, W, cin] -> [B, H', W', features]; raises ValueError as `SpectralNormConv`."""
        kernel, bias = self._parameters(x)
        _check_weights_per_filter(kernel)
        groups = self._group_count(kernel.size // self.features) * self.feature_group_count
        orthogonalized = orthogonal.own(kernel, groups)
        return self._convolution(x, orthogonalized * self._scale(self.init_scale, self.learn_scale), bias)

    def _group_count(self, weights):
        """Returns the number of groups of filters with that many weights, within each group of channels."""
        # Centring leaves one dimension less.
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
    r"""A convolution whose filters have learned norms.

    .. math::
        w_o = g_o\, k_o / \|k_o\|

    The norms g, `scale` [features], are initially those of the kernel, so that the first output is that of the plain
    convolution. This is PyTorch's initialization, not the paper's data-dependent one. The attributes are those of
    `flax.linen.Conv`.

    Source: Salimans and Kingma, `arXiv 1602.07868 <https://arxiv.org/abs/1602.07868>`__.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer, [B, H, W, cin] -> [B, H', W', features]; raises ValueError as `SpectralNormConv`."""
        kernel, bias = self._parameters(x)
        scale = self.param('scale', lambda key: orthogonal.filter_norms(kernel).astype(self.param_dtype))
        return self._convolution(x, orthogonal.weight_norm(kernel, scale), bias)


def _filter_groups(layer, otherwise=''):
    """Returns the attribute `groups` of ONI and OWN, checked against the filters of a group of channels."""
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
