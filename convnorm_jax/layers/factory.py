"""A layer's name -> the convolution with its normalization that a model builds with.

A model is given one constructor and never learns which layer it is:

    layer(features, kernel_size, strides=, padding=, use_bias=, feature_group_count=, train=, name=)(x)

Transposed convolutions and dense layers have constructors of the same kind.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.errors import UserError
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.geometry import channels_in_a_group, check_shape, ints_for_axes, spatial_axes
from convnorm_jax.layers.initializers import torch_bias_init, torch_kernel_init
from convnorm_jax.layers.reparam import ONIConv, OWNConv, SpectralNormConv, SpectralNormDense, WeightNormConv
from convnorm_jax.layers.switch_norm import SwitchNorm
from convnorm_jax.layers.transposed import ConvNormTranspose, ConvTranspose

# Options each layer understands, beside dtype. What `use_batch_norm=False` leaves out is
# the BatchNorm that follows a reparametrized convolution, or that ends a ConvNorm.
LAYER_OPTIONS = {
    'convnorm': ('use_affine', 'use_batch_norm', 'momentum', 'spectrum', 'method'),
    'batchnorm': (),
    'groupnorm': ('groups',),
    'switchnorm': (),
    'spectralnorm': ('mode', 'iterations', 'use_batch_norm'),
    'oni': ('iterations', 'groups', 'init_scale', 'learn_scale', 'bounded_columns', 'use_batch_norm'),
    'own': ('groups', 'init_scale', 'learn_scale', 'use_batch_norm'),
    'weightnorm': ('use_batch_norm',),
    'none': (),
}
LAYERS = tuple(LAYER_OPTIONS)

DENSE_LAYERS = ('none', 'spectralnorm')

# Layers that act on the activations only: a net's first and last convolution, where that does
# harm, is a plain one with them.
_ACTIVATION_NORMS = ('batchnorm', 'groupnorm', 'switchnorm')


class ConvThenNorm(nn.Module):
    """A convolution, with PyTorch's initial values, and the normalization that follows it.

    Attributes:
      features, kernel_size, strides, padding, use_bias, feature_group_count, dtype: as in `flax.linen.Conv`; an int is
        a square of 2 spatial axes.
      conv: constructor of the convolution, one of `layers.reparam`'s or `layers.transposed`'s;
        None is the plain one.
      norm: constructor of the normalization, or None.
      kernel_init: of the plain convolution's kernel; None is PyTorch's.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence = 'SAME'
    use_bias: bool = False
    conv: Callable[..., nn.Module] | None = None
    norm: Callable[..., nn.Module] | None = None
    dtype: jnp.dtype | None = None
    kernel_init: Callable | None = None
    feature_group_count: int = 1

    @nn.compact
    def __call__(self, x):
        rank = spatial_axes(self.kernel_size)
        kernel_size = ints_for_axes(self.kernel_size, 'kernel_size', rank)
        check_shape(x.shape, kernel_size)
        channels = channels_in_a_group(self.feature_group_count, x.shape[-1], self.features)
        conv = self.conv or _plain_conv(self.kernel_init, math.prod(kernel_size) * channels)
        if self.feature_group_count > 1:  # transposed convolutions take none
            conv = functools.partial(conv, feature_group_count=self.feature_group_count)
        x = conv(
            self.features,
            kernel_size,
            ints_for_axes(self.strides, 'strides', rank),
            self.padding,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name='conv',
        )(x)
        return x if self.norm is None else self.norm(name='norm')(x)


def _plain_conv(kernel_init, fan_in):
    return functools.partial(nn.Conv, kernel_init=kernel_init or torch_kernel_init, bias_init=torch_bias_init(fan_in))


def _group_count(channels, wanted):
    """The largest number of groups up to `wanted` that divides the channels."""
    if wanted < 1:
        raise UserError(f'groups={wanted}: expected 1 or more')
    return next(g for g in range(min(wanted, channels), 0, -1) if channels % g == 0)


def make_layer(name, *, dtype=None, **options):
    """The constructor that a model builds its convolutions with.

    Args:
      name: one of `LAYERS`. With 'convnorm' the normalization is inside the layer.
      dtype: of the computation; None is the input's. Parameters and statistics stay float32.
      **options: see `LAYER_OPTIONS`.

    Returns:
      A function (features, kernel_size, *, strides, padding, use_bias, feature_group_count, train,
      kernel_init, name) -> Linen module, called with the images only. `kernel_size` has one int
      for each spatial axis, (3,) for a sequence; `feature_group_count` is flax's, as many as
      channels for a depthwise convolution. ConvNorm's layers take no bias of the
      convolution, whatever `use_bias` says: the channel-wise convolution has one. Nor do
      they take a `kernel_init`: they do not depend on the kernel's scale.

    Raises:
      ValueError: an unknown name or option.
    """
    _check(name, options)
    return functools.partial(_BUILDERS[name], options, dtype)


def make_transposed_layer(name, *, dtype=None, **options):
    """The constructor that a generator builds its transposed convolutions with.

    Args:
      name, dtype: see `make_layer`. The geometry is that of PyTorch's ConvTranspose2d;
        'spectralnorm' is that of the kernel with a row for each output channel, as
        `torch.nn.utils.spectral_norm` takes it of a ConvTranspose2d: mode='reshaped' only.
      **options: see `LAYER_OPTIONS`.

    Returns:
      A function like `make_layer`'s, with strides=(2, 2) and padding=1 unless told otherwise.

    Raises:
      ValueError: an unknown name or option.
    """
    _check(name, options)
    if options.get('mode', 'reshaped') != 'reshaped':
        raise UserError(f"mode={options['mode']!r}: a transposed convolution takes 'reshaped' only")
    return functools.partial(_BUILDERS[name], options, dtype, strides=(2, 2), padding=1, transposed=True)


def make_edge_layer(name, *, dtype=None, **options):
    """`make_layer` for a net's first convolution, where a normalization of the activations does harm.

    The plain convolution for 'batchnorm', 'groupnorm' and 'switchnorm'; the layer itself
    where it acts on the kernel. Args, Returns and Raises as `make_layer`.
    """
    layer = make_layer(name, dtype=dtype, **options)
    return make_layer('none', dtype=dtype) if name in _ACTIVATION_NORMS else layer


def make_dense(name, *, dtype=None):
    """The constructor that a model builds its linear layers with.

    Args:
      name: one of `DENSE_LAYERS`: 'none' is `flax.linen.Dense`, 'spectralnorm' divides its
        matrix by the largest singular value.
      dtype: see `make_layer`.

    Returns:
      A function (features, *, use_bias=True, train=False, kernel_init, name) -> Linen
      module, [..., cin] -> [..., features]. Kernels start as Xavier's uniform unless told
      otherwise, biases as 0.

    Raises:
      ValueError: an unknown name.
    """
    if name not in DENSE_LAYERS:
        raise UserError(f'dense={name!r}: expected one of {DENSE_LAYERS}')
    return functools.partial(_DENSE_BUILDERS[name], dtype)


def _check(name, options):
    if name not in LAYERS:
        raise UserError(f'layer={name!r}: expected one of {LAYERS}')
    unknown = sorted(set(options) - set(LAYER_OPTIONS[name]))
    if unknown:
        raise UserError(f'layer={name!r} has no option {unknown[0]!r}: expected among {LAYER_OPTIONS[name]}')


def _convnorm(
    options,
    dtype,
    features,
    kernel_size,
    *,
    strides=1,
    padding='SAME',
    use_bias=False,
    feature_group_count=1,
    train=False,
    kernel_init=None,
    transposed=False,
    name=None,
):
    del use_bias, kernel_init
    layer = ConvNormTranspose if transposed else ConvNorm
    return layer(
        features,
        kernel_size,
        strides,
        padding,
        feature_group_count=feature_group_count,
        use_running_average=not train,
        dtype=dtype,
        name=name,
        **options,
    )


def _plain(options, dtype, features, kernel_size, *, train=False, transposed=False, kernel_init=None, **settings):
    """The plain convolution; `settings` may hold the normalization behind it."""
    del options, train
    if transposed:
        if settings.pop('feature_group_count', 1) != 1:
            raise UserError('feature_group_count above 1: a transposed convolution has one group; take convnorm')
        settings = dict(settings, conv=functools.partial(ConvTranspose, kernel_init=kernel_init))
    else:
        settings = dict(settings, kernel_init=kernel_init)
    return ConvThenNorm(features, kernel_size, dtype=dtype, **settings)


def _batch_norm(dtype, train):
    return functools.partial(BatchNorm, use_running_average=not train, dtype=dtype)


def _batchnorm(options, dtype, features, kernel_size, *, train=False, **settings):
    return _plain(options, dtype, features, kernel_size, norm=_batch_norm(dtype, train), **settings)


def _groupnorm(options, dtype, features, kernel_size, **settings):
    groups = _group_count(features, options.get('groups', 32))
    norm = functools.partial(nn.GroupNorm, num_groups=groups, epsilon=1e-5, dtype=dtype)
    return _plain(options, dtype, features, kernel_size, norm=norm, **settings)


def _switchnorm(options, dtype, features, kernel_size, *, train=False, **settings):
    norm = functools.partial(SwitchNorm, use_running_average=not train, dtype=dtype)
    return _plain(options, dtype, features, kernel_size, norm=norm, **settings)


def _reparametrized(
    conv, options, dtype, features, kernel_size, *, train=False, transposed=False, kernel_init=None, **settings
):
    """A reparametrized convolution and, unless left out, BatchNorm, as the published nets have them."""
    options = dict(options)
    norm = _batch_norm(dtype, train) if options.pop('use_batch_norm', True) else None
    if conv is SpectralNormConv:
        options['use_running_average'] = not train
    conv = functools.partial(conv, transposed=transposed, kernel_init=kernel_init, **options)
    return ConvThenNorm(features, kernel_size, conv=conv, norm=norm, dtype=dtype, **settings)


_BUILDERS = {
    'convnorm': _convnorm,
    'batchnorm': _batchnorm,
    'groupnorm': _groupnorm,
    'switchnorm': _switchnorm,
    'spectralnorm': functools.partial(_reparametrized, SpectralNormConv),
    'oni': functools.partial(_reparametrized, ONIConv),
    'own': functools.partial(_reparametrized, OWNConv),
    'weightnorm': functools.partial(_reparametrized, WeightNormConv),
    'none': _plain,
}


def _plain_dense(dtype, features, *, train=False, kernel_init=None, **settings):
    del train
    kernel_init = kernel_init or nn.initializers.xavier_uniform()
    return nn.Dense(features, kernel_init=kernel_init, dtype=dtype, **settings)


def _spectral_norm_dense(dtype, features, *, train=False, kernel_init=None, **settings):
    kernel_init = kernel_init or nn.initializers.xavier_uniform()
    return SpectralNormDense(features, kernel_init=kernel_init, use_running_average=not train, dtype=dtype, **settings)


_DENSE_BUILDERS = {'none': _plain_dense, 'spectralnorm': _spectral_norm_dense}
