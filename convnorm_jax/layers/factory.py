"""Makes, from the name of a layer, the constructor of a convolution with its normalization.

A model is given one constructor and never learns which layer it makes::

    layer(features, kernel_size, strides=, padding=, use_bias=, feature_group_count=, train=, name=)(x)

Transposed convolutions and dense layers have constructors of the same kind.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.layers.dense import SpectralNormDense
from convnorm_jax.layers.geometry import (
    Ints,
    Padding,
    channels_in_a_group,
    check_shape,
    ints_for_axes,
    spatial_axes,
)
from convnorm_jax.layers.initializers import Initializer, torch_bias_init, torch_kernel_init
from convnorm_jax.layers.reparam import ONIConv, OWNConv, SpectralNormConv, WeightNormConv
from convnorm_jax.layers.switch_norm import SwitchNorm
from convnorm_jax.layers.transposed import ConvNormTranspose, ConvTranspose

# The options of each layer, next to dtype. `use_batch_norm=False` leaves out the BatchNorm that follows a
# reparametrized convolution, or that ends a ConvNorm.
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

# Layers that normalize activations only. At a net's first and last convolution that does harm, so these are plain.
_ACTIVATION_NORMS = ('batchnorm', 'groupnorm', 'switchnorm')


class ConvThenNorm(nn.Module):
    """A convolution with PyTorch's initial values, followed by a normalization.

    Attributes:
      features, kernel_size, strides, padding, use_bias, feature_group_count, dtype: as in `flax.linen.Conv`; one int k
        as kernel size is (k, k).
      conv: constructor of the convolution, from `layers.reparam` or `layers.transposed`; None takes the plain one.
      norm: constructor of the normalization, or None.
      kernel_init: initializer of the plain convolution's kernel; None takes PyTorch's.
    """

    features: int
    kernel_size: Ints
    strides: Ints = 1
    padding: Padding = 'SAME'
    use_bias: bool = False
    conv: Callable[..., nn.Module] | None = None
    norm: Callable[..., nn.Module] | None = None
    dtype: DTypeLike | None = None
    kernel_init: Initializer | None = None
    feature_group_count: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies both, [B, H, W, cin] -> [B, H', W', features].

        Raises:
          ValueError: x of another rank; groups that do not divide the channels.
        """
        rank = spatial_axes(self.kernel_size)
        kernel_size = ints_for_axes(self.kernel_size, 'kernel_size', rank)
        check_shape(x.shape, kernel_size)
        channels = channels_in_a_group(self.feature_group_count, x.shape[-1], self.features)
        conv = self.conv or _plain_conv(self.kernel_init, math.prod(kernel_size) * channels)
        if self.feature_group_count > 1:  # not for transposed convolutions, which have no such argument
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
    """Returns the largest number of groups up to `wanted` that divides the channels."""
    if wanted < 1:
        raise UserError(f'groups={wanted}: expected 1 or more')
    return next(g for g in range(min(wanted, channels), 0, -1) if channels % g == 0)


def make_layer(name: str, *, dtype: DTypeLike | None = None, **options: Any) -> Callable[..., nn.Module]:
    """Returns the constructor with which a model builds its convolutions.

    Args:
      name: one of `LAYERS`. With 'convnorm' the normalization is inside the layer.
      dtype: of the computation; None takes the dtype of the input. Parameters and statistics are float32.
      **options: of the layer, see `LAYER_OPTIONS`.

    Returns:
      A function `(features, kernel_size, *, strides, padding, use_bias, feature_group_count, train, kernel_init, name)`
      that returns a Linen module, which is called with the images only. `kernel_size` has one int for each spatial
      axis, (3,) for a sequence. `feature_group_count` is flax's: as many groups as channels give a depthwise
      convolution. ConvNorm ignores `use_bias`, because its channel-wise convolution has a bias, and `kernel_init`,
      because it does not depend on the scale of the kernel.

    Raises:
      ValueError: an unknown name or option.

    Example:
      >>> from convnorm_jax.layers import make_layer
      >>> layer = make_layer('oni', iterations=5)
      >>> layer(64, (3, 3), train=True, name='conv1').name
      'conv1'
    """
    _check(name, options)
    return functools.partial(_BUILDERS[name], options, dtype)


def make_transposed_layer(name: str, *, dtype: DTypeLike | None = None, **options: Any) -> Callable[..., nn.Module]:
    """Returns the constructor with which a generator builds its transposed convolutions.

    Args:
      name: one of `LAYERS`. The geometry is that of PyTorch's ConvTranspose2d. 'spectralnorm' takes the norm of the
        kernel as a matrix with a row for each output channel, as `torch.nn.utils.spectral_norm` does for a
        ConvTranspose2d; its mode can only be 'reshaped'.
      dtype: see `make_layer`.
      **options: of the layer, see `LAYER_OPTIONS`.

    Returns:
      A function like that of `make_layer`, with strides=(2, 2) and padding=1 by default.

    Raises:
      ValueError: an unknown name or option.
    """
    _check(name, options)
    if options.get('mode', 'reshaped') != 'reshaped':
        raise UserError(f"mode={options['mode']!r}: a transposed convolution takes 'reshaped' only")
    return functools.partial(_BUILDERS[name], options, dtype, strides=(2, 2), padding=1, transposed=True)


def make_edge_layer(name: str, *, dtype: DTypeLike | None = None, **options: Any) -> Callable[..., nn.Module]:
    """Returns the constructor of a net's first convolution, where a normalization of the activations does harm.

    It is the plain convolution for 'batchnorm', 'groupnorm' and 'switchnorm', and that of `make_layer` for the others.
    Arguments and errors are those of `make_layer`.
    """
    layer = make_layer(name, dtype=dtype, **options)
    return make_layer('none', dtype=dtype) if name in _ACTIVATION_NORMS else layer


def make_dense(name: str, *, dtype: DTypeLike | None = None) -> Callable[..., nn.Module]:
    """Returns the constructor with which a model builds its linear layers.

    Args:
      name: one of `DENSE_LAYERS`: 'none' is `flax.linen.Dense`, 'spectralnorm' divides its matrix by the largest
        singular value.
      dtype: see `make_layer`.

    Returns:
      A function `(features, *, use_bias=True, train=False, kernel_init, name)` that returns a Linen module, called on
      [..., cin] -> [..., features]. Kernels start as Xavier's uniform by default, biases as 0.

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
    """The plain convolution; `settings` may hold the normalization after it."""
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
    """A reparametrized convolution and, by default, BatchNorm, as the published nets have them."""
    options = dict(options)
    norm = _batch_norm(dtype, train) if options.pop('use_batch_norm', True) else None
    if conv is SpectralNormConv:
        options['use_running_average'] = not train
    conv = functools.partial(conv, transposed=transposed, kernel_init=kernel_init, **options)
    return ConvThenNorm(features, kernel_size, conv=conv, norm=norm, dtype=dtype, **settings)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
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
