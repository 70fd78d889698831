"""Makes the generator and the discriminator of a GAN from the name of a net and of its layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from convnorm_jax.errors import UserError
from convnorm_jax.layers.factory import (
    LAYER_OPTIONS,
    make_dense,
    make_edge_layer,
    make_layer,
    make_transposed_layer,
)
from convnorm_jax.models import dcgan, sngan
from convnorm_jax.models.classifiers import DTYPES
from convnorm_jax.models.sizes import plain_options, whole_number

GANS = ('sngan', 'dcgan')


def create_gan(
    name: str,
    *,
    picture_shape: Sequence[int],
    latent: int = 128,
    num_classes: int = 0,
    generator_layer: str | None = None,
    discriminator_layer: str = 'spectralnorm',
    generator_width: int | None = None,
    discriminator_width: int | None = None,
    generator_options: Mapping[str, Any] | None = None,
    discriminator_options: Mapping[str, Any] | None = None,
    dense: str = 'spectralnorm',
    dtype: str = 'float32',
) -> tuple[nn.Module, nn.Module]:
    """Returns the generator and the discriminator of a GAN, two Linen modules.

    `generator.apply(variables, z, labels, train=False)` returns images in [-1, 1], float32 [B, H, W, C], for latents z,
    [B, latent]. `discriminator.apply(variables, images, labels, train=False)` returns float32 logits, [B]. labels are
    int32 [B] or None, and ignored without classes. With train=True both update 'batch_stats': BatchNorm's statistics,
    spectral norm's singular vectors, ConvNorm's spectra.

    Args:
      name: one of `GANS`: residual nets ('sngan'), or strided convolutions ('dcgan').
      picture_shape: (H, W, C) of the images. H = W is 8, 16, 32 or 64, or with 'sngan' 48.
      latent: length of a latent.
      num_classes: number of classes of a conditional GAN, or 0.
      generator_layer: one of `layers.LAYERS`. None takes the net's own: with 'sngan' 'none', because its blocks have
        their BatchNorm before the convolutions; with 'dcgan' 'batchnorm'.
      discriminator_layer: one of `layers.LAYERS`, for all convolutions of the discriminator. With 'dcgan' the first one
        is plain if the layer only normalizes activations.
      generator_width, discriminator_width: channels of the widest stage with 'sngan', of the narrowest with 'dcgan'.
        None takes the published widths: with 'sngan' 256 and 128 up to 32x32, then 512 and 1024, 1024 and 1024; with
        'dcgan' 128 and 64.
      generator_options, discriminator_options: of the layers, see `layers.factory.LAYER_OPTIONS`. The default of
        `use_batch_norm` is False, except in the generator of 'dcgan', which has no other normalization.
      dense: one of `layers.DENSE_LAYERS`, for the discriminator's linear layer and the label's embedding.
      dtype: of the computation, 'float32' or 'bfloat16'. Parameters and statistics are float32.

    Raises:
      ValueError: an unknown name or option; a size or width that the net cannot have.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from convnorm_jax.models import create_gan
      >>> generator, discriminator = create_gan('dcgan', picture_shape=(8, 8, 1), latent=16, generator_width=8)
      >>> z = jnp.ones((4, 16))
      >>> variables = generator.init(jax.random.key(0), z)
      >>> generator.apply(variables, z).shape
      (4, 8, 8, 1)
    """
    if name not in GANS:
        raise UserError(f'model.name={name!r}: expected one of {GANS}')
    if dtype not in DTYPES:
        raise UserError(f'dtype={dtype!r}: expected one of {DTYPES}')
    sizes = sngan.GENERATORS if name == 'sngan' else dcgan.STAGES
    picture_shape = _square_picture(name, picture_shape, tuple(sizes))
    latent, num_classes = whole_number('latent', latent, 1), whole_number('num_classes', num_classes, 0)
    generator_width = whole_number('generator_width', generator_width, 1, "the net's own")
    discriminator_width = whole_number('discriminator_width', discriminator_width, 1, "the net's own")
    common: dict[str, Any] = dict(picture_shape=picture_shape, num_classes=num_classes, dtype=jnp.dtype(dtype))
    build = _sngan if name == 'sngan' else _dcgan
    return build(
        common,
        latent,
        generator_layer,
        discriminator_layer,
        generator_width,
        discriminator_width,
        plain_options(generator_options or {}),
        plain_options(discriminator_options or {}),
        make_dense(dense, dtype=common['dtype']),
    )


def _sngan(common, latent, g_layer, d_layer, g_width, d_width, g_options, d_options, dense):
    size, dtype = common['picture_shape'][0], common['dtype']
    g_layer = 'none' if g_layer is None else g_layer
    bottom, g_default, ups = sngan.GENERATORS[size]
    d_default, blocks = sngan.DISCRIMINATORS[size]
    g_width = _divisible('generator_width', g_width or g_default, max(ups))
    d_width = _divisible('discriminator_width', d_width or d_default, max(ratio for ratio, _ in blocks))
    generator = sngan.SNGANGenerator(
        latent=latent,
        layer=make_layer(g_layer, dtype=dtype, **_without_batch_norm(g_layer, g_options)),
        plain_layer=make_layer('none', dtype=dtype),
        dense=make_dense('none', dtype=dtype),
        bottom=bottom,
        width=g_width,
        widths=tuple(g_width // ratio for ratio in ups),
        **common,
    )
    discriminator = sngan.SNGANDiscriminator(
        layer=make_layer(d_layer, dtype=dtype, **_without_batch_norm(d_layer, d_options)),
        dense=dense,
        blocks=tuple((d_width // ratio, downsample) for ratio, downsample in blocks),
        **common,
    )
    return generator, discriminator


def _dcgan(common, latent, g_layer, d_layer, g_width, d_width, g_options, d_options, dense):
    stages, dtype = dcgan.STAGES[common['picture_shape'][0]], common['dtype']
    g_layer = 'batchnorm' if g_layer is None else g_layer
    g_width, d_width = g_width or dcgan.GENERATOR_WIDTH, d_width or dcgan.DISCRIMINATOR_WIDTH
    d_options = _without_batch_norm(d_layer, d_options)
    generator = dcgan.DCGANGenerator(
        latent=latent,
        layer=make_transposed_layer(g_layer, dtype=dtype, **g_options),
        plain_layer=make_transposed_layer('none', dtype=dtype),
        dense=make_dense('none', dtype=dtype),
        widths=tuple(g_width * 2**i for i in reversed(range(stages))),
        **common,
    )
    discriminator = dcgan.DCGANDiscriminator(
        layer=make_layer(d_layer, dtype=dtype, **d_options),
        first_layer=make_edge_layer(d_layer, dtype=dtype, **d_options),
        dense=dense,
        widths=tuple(d_width * 2**i for i in range(stages)),
        **common,
    )
    return generator, discriminator


def _without_batch_norm(layer, options):
    """Returns the options with use_batch_norm=False, unless they give it or the layer does not have it."""
    return {'use_batch_norm': False, **options} if 'use_batch_norm' in LAYER_OPTIONS.get(layer, ()) else options


def _divisible(key, width, ratio):
    if width % ratio:
        raise UserError(f'{key}={width}: expected a multiple of {ratio}, the narrowest block being 1/{ratio} as wide')
    return width


def _square_picture(name, shape, sizes):
    shape = tuple(shape)
    if len(shape) != 3 or shape[0] != shape[1] or shape[0] not in sizes or shape[2] < 1:
        raise UserError(f'picture_shape={shape} with model.name={name!r}: expected (n, n, channels), n one of {sizes}')
    return tuple(int(n) for n in shape)
