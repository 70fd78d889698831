"""The Inception-v3 of 2015 that defines FID, KID and IS (Szegedy et al. 2015, arXiv 1512.00567).

It is the TensorFlow graph `inception-2015-12-05`, not the Inception-v3 of later model zoos: it has 1008
classes, its average pools do not count the padding, and the pool of its last block is a max pool. Modules
have the names of the usual PyTorch port of the weights (pytorch-fid), so that weights can be imported by renaming.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from convnorm_jax.errors import UserError

FEATURES, CLASSES, SIZE = 2048, 1008, 299
PREPROCESSING = ('tensorflow1', 'pytorch_fid')

# Full float32, whatever the default (TF32 on GPUs, bfloat16 on TPUs): scores must not depend on the device.
_PRECISION = jax.lax.Precision.HIGHEST


def preprocess(pixels: jax.Array, convention: str = 'tensorflow1') -> jax.Array:
    """Resizes and scales pixels for the net.

    'tensorflow1' does what the reference graph does: pixels of 0 to 255, a bilinear resize without
    half-pixel centres (output i lies at i * size / 299, align_corners=False), then (x - 128) / 128.
    'pytorch_fid' does what pytorch-fid does, to compare with its scores: half-pixel centres, and
    2 x - 1 for pixels in [0, 1].

    Args:
      pixels: [B, H, W, 3] or [B, H, W, 1] (grey, repeated), uint8 or float in [0, 1].
      convention: one of `PREPROCESSING`.

    Returns:
      float32 [B, 299, 299, 3].

    Raises:
      ValueError: an unknown convention, or another shape.
    """
    check_convention(convention)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise UserError(f'pixels of shape {pixels.shape}: expected [B, H, W, 3], or [B, H, W, 1] for grey images')
    pixels = pixels.astype(jnp.float32) if pixels.dtype == jnp.uint8 else pixels.astype(jnp.float32) * 255
    half_pixel = convention == 'pytorch_fid'
    rows, columns = (resize_matrix(n, SIZE, half_pixel) for n in pixels.shape[1:3])
    x = jnp.einsum('yh,bhwc->bywc', rows, pixels, precision=_PRECISION)
    x = jnp.einsum('xw,bywc->byxc', columns, x, precision=_PRECISION)
    x = x / 127.5 - 1 if half_pixel else (x - 128) / 128
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def check_convention(convention: str) -> None:
    """Raises ValueError unless `convention` is one of `PREPROCESSING`."""
    if convention not in PREPROCESSING:
        raise UserError(f'preprocessing={convention!r}: expected one of {", ".join(PREPROCESSING)}')


def resize_matrix(size: int, new_size: int, half_pixel_centres: bool) -> np.ndarray:
    """The matrix of a bilinear resize of one axis, without antialiasing, as in both libraries.

    Args:
      size: of the axis.
      new_size: of the resized axis.
      half_pixel_centres: whether output i lies at (i + 1/2) size / new_size - 1/2, not below 0, or at
        i size / new_size.

    Returns:
      float32 [new_size, size]; each row sums to one.
    """
    shift = 0.5 if half_pixel_centres else 0.0
    position = np.maximum((np.arange(new_size) + shift) * size / new_size - shift, 0)
    lower = np.minimum(position.astype(int), size - 1)
    upper, share = np.minimum(lower + 1, size - 1), position - lower
    eye = np.eye(size)
    return (eye[lower] * (1 - share)[:, None] + eye[upper] * share[:, None]).astype(np.float32)


class ConvBlock(nn.Module):
    """Convolution without a bias, BatchNorm with its running statistics (epsilon 1e-3), ReLU: NHWC to NHWC.

    Attributes:
      features: output channels.
      kernel_size: (kh, kw).
      strides: of both axes.
      padding: 'SAME' or 'VALID'.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: str = 'SAME'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.strides, self.strides)
        x = nn.Conv(
            self.features, self.kernel_size, strides, self.padding, use_bias=False, precision=_PRECISION, name='conv'
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name='bn')(x))


def _average_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _halve(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), padding='VALID')


class MixedA(nn.Module):
    """5x5 and double 3x3 branches: [B, H, W, C] -> [B, H, W, 224 + pool_features].

    Attributes:
      pool_features: output channels of the pooling branch.
    """

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = ConvBlock(64, (1, 1), name='branch1x1')(x)
        five = ConvBlock(48, (1, 1), name='branch5x5_1')(x)
        five = ConvBlock(64, (5, 5), name='branch5x5_2')(five)
        double = ConvBlock(64, (1, 1), name='branch3x3dbl_1')(x)
        double = ConvBlock(96, (3, 3), name='branch3x3dbl_2')(double)
        double = ConvBlock(96, (3, 3), name='branch3x3dbl_3')(double)
        pool = ConvBlock(self.pool_features, (1, 1), name='branch_pool')(_average_pool(x))
        return jnp.concatenate([single, five, double, pool], -1)


class MixedB(nn.Module):
    """Halves the image: [B, H, W, C] -> [B, (H-1)//2, (W-1)//2, 480 + C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvBlock(384, (3, 3), 2, 'VALID', name='branch3x3')(x)
        double = ConvBlock(64, (1, 1), name='branch3x3dbl_1')(x)
        double = ConvBlock(96, (3, 3), name='branch3x3dbl_2')(double)
        double = ConvBlock(96, (3, 3), 2, 'VALID', name='branch3x3dbl_3')(double)
        return jnp.concatenate([three, double, _halve(x)], -1)


class MixedC(nn.Module):
    """7x7 kernels as 1x7 and 7x1: [B, H, W, C] -> [B, H, W, 768].

    Attributes:
      width: channels inside the branches.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = ConvBlock(192, (1, 1), name='branch1x1')(x)
        seven = ConvBlock(self.width, (1, 1), name='branch7x7_1')(x)
        seven = ConvBlock(self.width, (1, 7), name='branch7x7_2')(seven)
        seven = ConvBlock(192, (7, 1), name='branch7x7_3')(seven)
        double = ConvBlock(self.width, (1, 1), name='branch7x7dbl_1')(x)
        double = ConvBlock(self.width, (7, 1), name='branch7x7dbl_2')(double)
        double = ConvBlock(self.width, (1, 7), name='branch7x7dbl_3')(double)
        double = ConvBlock(self.width, (7, 1), name='branch7x7dbl_4')(double)
        double = ConvBlock(192, (1, 7), name='branch7x7dbl_5')(double)
        pool = ConvBlock(192, (1, 1), name='branch_pool')(_average_pool(x))
        return jnp.concatenate([single, seven, double, pool], -1)


class MixedD(nn.Module):
    """Halves the image: [B, H, W, C] -> [B, (H-1)//2, (W-1)//2, 512 + C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvBlock(192, (1, 1), name='branch3x3_1')(x)
        three = ConvBlock(320, (3, 3), 2, 'VALID', name='branch3x3_2')(three)
        seven = ConvBlock(192, (1, 1), name='branch7x7x3_1')(x)
        seven = ConvBlock(192, (1, 7), name='branch7x7x3_2')(seven)
        seven = ConvBlock(192, (7, 1), name='branch7x7x3_3')(seven)
        seven = ConvBlock(192, (3, 3), 2, 'VALID', name='branch7x7x3_4')(seven)
        return jnp.concatenate([three, seven, _halve(x)], -1)


class MixedE(nn.Module):
    """3x3 kernels as 1x3 next to 3x1: [B, H, W, C] -> [B, H, W, 2048].

    Attributes:
      max_pool: whether its pool is a max pool, as in the last block of this graph.
    """

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = ConvBlock(320, (1, 1), name='branch1x1')(x)
        three = ConvBlock(384, (1, 1), name='branch3x3_1')(x)
        three_a = ConvBlock(384, (1, 3), name='branch3x3_2a')(three)
        three_b = ConvBlock(384, (3, 1), name='branch3x3_2b')(three)
        double = ConvBlock(448, (1, 1), name='branch3x3dbl_1')(x)
        double = ConvBlock(384, (3, 3), name='branch3x3dbl_2')(double)
        double_a = ConvBlock(384, (1, 3), name='branch3x3dbl_3a')(double)
        double_b = ConvBlock(384, (3, 1), name='branch3x3dbl_3b')(double)
        pool = nn.max_pool(x, (3, 3), padding='SAME') if self.max_pool else _average_pool(x)
        pool = ConvBlock(192, (1, 1), name='branch_pool')(pool)
        return jnp.concatenate([single, three_a, three_b, double_a, double_b, pool], -1)


class InceptionV3(nn.Module):
    """The whole net, in evaluation mode only.

    It is called with images from `preprocess`, float [B, H, W, 3], H and W at least 75. It returns
    (features, logits): float32 [B, 2048] (the last average pool, `pool_3`) and [B, 1008].

    Attributes:
      logits_bias: whether the logits have their bias. The reference code of the Inception score
        (arXiv 1606.03498) has none: it multiplies the features by the weights alone.
    """

    logits_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = ConvBlock(32, (3, 3), 2, 'VALID', name='Conv2d_1a_3x3')(x)
        x = ConvBlock(32, (3, 3), 1, 'VALID', name='Conv2d_2a_3x3')(x)
        x = _halve(ConvBlock(64, (3, 3), name='Conv2d_2b_3x3')(x))
        x = ConvBlock(80, (1, 1), name='Conv2d_3b_1x1')(x)
        x = _halve(ConvBlock(192, (3, 3), 1, 'VALID', name='Conv2d_4a_3x3')(x))
        x = MixedA(32, name='Mixed_5b')(x)
        x = MixedA(64, name='Mixed_5c')(x)
        x = MixedA(64, name='Mixed_5d')(x)
        x = MixedB(name='Mixed_6a')(x)
        x = MixedC(128, name='Mixed_6b')(x)
        x = MixedC(160, name='Mixed_6c')(x)
        x = MixedC(160, name='Mixed_6d')(x)
        x = MixedC(192, name='Mixed_6e')(x)
        x = MixedD(name='Mixed_7a')(x)
        x = MixedE(False, name='Mixed_7b')(x)
        x = MixedE(True, name='Mixed_7c')(x)
        features = x.mean((1, 2))
        logits = nn.Dense(CLASSES, use_bias=self.logits_bias, precision=_PRECISION, name='fc')(features)
        return features, logits
