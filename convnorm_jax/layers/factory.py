"""A layer's name -> the convolution with its normalization that a model builds with.

A model is given one constructor and never learns which layer it is:

    layer(features, kernel_size, strides=, padding=, use_bias=, train=, name=)(x)
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.layers.batch_norm import BatchNorm
from convnorm_jax.layers.convnorm import ConvNorm, pair_of_ints
from convnorm_jax.layers.initializers import torch_bias_init, torch_kernel_init
from convnorm_jax.layers.reparam import ONIConv, OWNConv, SpectralNormConv, WeightNormConv
from convnorm_jax.layers.switch_norm import SwitchNorm

# Options each layer understands, beside dtype.
LAYER_OPTIONS = {
    'convnorm': ('use_affine', 'use_batch_norm', 'momentum', 'spectrum'),
    'batchnorm': (),
    'groupnorm': ('groups',),
    'switchnorm': (),
    'spectralnorm': ('mode', 'iterations'),
    'oni': ('iterations', 'groups', 'init_scale', 'learn_scale', 'bounded_columns'),
    'own': ('groups', 'init_scale', 'learn_scale'),
    'weightnorm': (),
    'none': (),
}
LAYERS = tuple(LAYER_OPTIONS)


class ConvThenNorm(nn.Module):
    """A convolution, with PyTorch's initial values, and the normalization that follows it.

    Attributes:
      features, kernel_size, strides, padding, use_bias, dtype: as in `flax.linen.Conv`.
      conv: constructor of the convolution, one of `layers.reparam`'s; None is the plain one.
      norm: constructor of the normalization, or None.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = (1, 1)
    padding: str | int | Sequence = 'SAME'
    use_bias: bool = False
    conv: Callable[..., nn.Module] | None = None
    norm: Callable[..., nn.Module] | None = None
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        kernel_size = pair_of_ints(self.kernel_size, 'kernel_size')
        conv = self.conv or _plain_conv(kernel_size[0] * kernel_size[1] * x.shape[-1])
        x = conv(
            self.features,
            kernel_size,
            self.strides,
            self.padding,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name='conv',
        )(x)
        return x if self.norm is None else self.norm(name='norm')(x)


def _plain_conv(fan_in):
    return functools.partial(nn.Conv, kernel_init=torch_kernel_init, bias_init=torch_bias_init(fan_in))


def _group_count(channels, wanted):
    """The largest number of groups up to `wanted` that divides the channels."""
    if wanted < 1:
        raise ValueError(f'groups={wanted}: expected 1 or more')
    return next(g for g in range(min(wanted, channels), 0, -1) if channels % g == 0)


def make_layer(name, *, dtype=None, **options):
    """The constructor that a model builds its convolutions with.

    Args:
      name: one of `LAYERS`. With 'convnorm' the normalization is inside the layer.
      dtype: of the computation; None is the input's. Parameters and statistics stay float32.
      **options: see `LAYER_OPTIONS`.

    Returns:
      A function (features, kernel_size, *, strides, padding, use_bias, train, name) ->
      Linen module, called with the images only. ConvNorm's layers take no bias of the
      convolution, whatever `use_bias` says: the channel-wise convolution has one.

    Raises:
      ValueError: an unknown name or option.
    """
    if name not in LAYERS:
        raise ValueError(f'layer={name!r}: expected one of {LAYERS}')
    unknown = sorted(set(options) - set(LAYER_OPTIONS[name]))
    if unknown:
        raise ValueError(f'layer={name!r} has no option {unknown[0]!r}: expected among {LAYER_OPTIONS[name]}')
    return functools.partial(_BUILDERS[name], options, dtype)


def _convnorm(
    options, dtype, features, kernel_size, *, strides=(1, 1), padding='SAME', use_bias=False, train=False, name=None
):
    del use_bias
    return ConvNorm(
        features, kernel_size, strides, padding, use_running_average=not train, dtype=dtype, name=name, **options
    )


def _batchnorm(options, dtype, features, kernel_size, *, train=False, conv=None, **settings):
    norm = functools.partial(BatchNorm, use_running_average=not train, dtype=dtype, **options)
    return ConvThenNorm(features, kernel_size, conv=conv, norm=norm, dtype=dtype, **settings)


def _reparametrized(conv, options, dtype, features, kernel_size, *, train=False, **settings):
    """A reparametrized convolution and BatchNorm, as the published nets have them."""
    state = {'use_running_average': not train} if conv is SpectralNormConv else {}
    return _batchnorm(
        {}, dtype, features, kernel_size, train=train, conv=functools.partial(conv, **options, **state), **settings
    )


def _groupnorm(options, dtype, features, kernel_size, *, train=False, **conv):
    del train
    groups = _group_count(features, options.get('groups', 32))
    norm = functools.partial(nn.GroupNorm, num_groups=groups, epsilon=1e-5, dtype=dtype)
    return ConvThenNorm(features, kernel_size, norm=norm, dtype=dtype, **conv)


def _switchnorm(options, dtype, features, kernel_size, *, train=False, **conv):
    norm = functools.partial(SwitchNorm, use_running_average=not train, dtype=dtype, **options)
    return ConvThenNorm(features, kernel_size, norm=norm, dtype=dtype, **conv)


def _plain(options, dtype, features, kernel_size, *, train=False, **conv):
    del options, train
    return ConvThenNorm(features, kernel_size, dtype=dtype, **conv)


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
