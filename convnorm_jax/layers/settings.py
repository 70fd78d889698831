"""The settings of a ConvNorm, checked: what the layers of every library are made from."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers import geometry
from convnorm_jax.layers.dtypes import at_least_float32
from convnorm_jax.layers.geometry import Geometry, Ints, Padding, ints_for_axes, is_int
from convnorm_jax.layers.initializers import (
    Initializer,
    torch_bias_init,
    torch_kernel_init,
    torch_transposed_kernel_init,
)
from convnorm_jax.layers.method import METHODS, Method

SpectrumMode = Literal['running', 'exact']
SPECTRUM_MODES = ('running', 'exact')


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a ConvNorm or, with `transposed`, of a ConvNormTranspose.

    The attributes are those of `convnorm_jax.ConvNorm`. Kernel size, strides and dilation are stored as tuples with an
    int for each spatial axis.

    Raises:
      ValueError: a value that no layer can have.
    """

    features: int
    kernel_size: Ints = (3, 3)
    strides: Ints = 1
    padding: Padding = 'SAME'
    kernel_dilation: Ints = 1
    feature_group_count: int = 1
    transposed: bool = False
    use_affine: bool = True
    use_batch_norm: bool = True
    momentum: float | None = None
    spectrum: SpectrumMode = 'running'
    method: Method | None = None
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self) -> None:
        if self.spectrum not in SPECTRUM_MODES:
            raise UserError(f'spectrum={self.spectrum!r}: expected one of {SPECTRUM_MODES}')
        if self.method is not None and self.method not in METHODS:
            raise UserError(f'method={self.method!r}: expected one of {METHODS}, or None to choose by size')
        if not is_int(self.features) or self.features < 1:
            raise UserError(f'features={self.features!r}: expected a positive int')
        if self.momentum is not None and not (_is_number(self.momentum) and 0 <= self.momentum < 1):
            raise UserError(
                f'momentum={self.momentum!r}: expected at least 0 and below 1, or None for the published schedule'
            )
        if not (_is_number(self.batch_norm_momentum) and 0 <= self.batch_norm_momentum <= 1):
            raise UserError(f'batch_norm_momentum={self.batch_norm_momentum!r}: expected between 0 and 1')
        if not (_is_number(self.batch_norm_epsilon) and self.batch_norm_epsilon >= 0):
            raise UserError(f'batch_norm_epsilon={self.batch_norm_epsilon!r}: expected at least 0')
        for name in ('dtype', 'param_dtype'):
            if (dtype := getattr(self, name)) is not None and not _is_float(dtype):
                raise UserError(f"{name}={dtype!r}: expected a dtype of floats, such as 'float32' or 'bfloat16'")
        rank = self.rank
        for name in ('kernel_size', 'strides', 'kernel_dilation'):
            object.__setattr__(self, name, ints_for_axes(getattr(self, name), name, rank))
        object.__setattr__(self, 'padding', _hashable(self.padding))

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return geometry.spatial_axes(self.kernel_size)

    @property
    def spans(self) -> tuple[int, ...]:
        """The size of the dilated kernel, an int for each axis."""
        return geometry.dilated_size(ints(self.kernel_size), ints(self.kernel_dilation))

    @property
    def state_dtype(self) -> jnp.dtype:
        """The dtype of the running statistics: float32, or float64 with parameters in float64."""
        return at_least_float32(self.param_dtype)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises ValueError unless `shape` is the shape of a batch of images."""
        geometry.check_shape(shape, ints(self.kernel_size))

    def check_kernel(self, shape: Sequence[int], features_in: int | None = None) -> None:
        """Raises ValueError unless `shape` is the shape of the kernel, for images with `features_in` channels."""
        channels = shape[-2]
        if features_in is not None:
            channels = geometry.channels_in_a_group(self.feature_group_count, features_in, self.features)
        expected = (*ints(self.kernel_size), channels, self.features)
        if tuple(shape) != expected:
            images = '' if features_in is None else f' and images of {features_in} channels'
            raise UserError(
                f'kernel.shape={tuple(shape)}: expected {expected} with kernel_size={self.kernel_size}, '
                f'features={self.features}, feature_group_count={self.feature_group_count}{images}'
            )

    def geometry(self, image_size: Sequence[int]) -> Geometry:
        """Returns the geometry of the layer on images of one size, an int for each axis."""
        kernel_size, strides, dilation = map(ints, (self.kernel_size, self.strides, self.kernel_dilation))
        groups = self.feature_group_count
        if self.transposed:
            crop = geometry.canonical_transposed_padding(self.padding, image_size, self.spans, strides)
            return geometry.of_transposed_convolution(image_size, kernel_size, strides, crop, dilation, groups)
        padding = geometry.canonical_padding(self.padding, image_size, self.spans, strides)
        return geometry.of_convolution(image_size, kernel_size, strides, padding, dilation, groups)

    def image_size(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Returns the size of the images whose full convolution has the size `grid`."""
        if self.transposed:
            return tuple((n - k) // s + 1 for n, k, s in zip(grid, self.spans, ints(self.strides)))
        if self.padding == geometry.CIRCULAR:
            return tuple(grid)
        return tuple(n - k + 1 for n, k in zip(grid, self.spans))

    def initializers(self, features_in: int) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """Returns the initializer and the shape of each parameter, by its name; see the module's docstring."""
        channels = geometry.channels_in_a_group(self.feature_group_count, features_in, self.features)
        init = torch_transposed_kernel_init if self.transposed else torch_kernel_init
        kernel_size = ints(self.kernel_size)
        found: dict[str, tuple[Initializer, tuple[int, ...]]] = {
            'kernel': (init, (*kernel_size, channels, self.features))
        }
        if self.use_affine:
            bias_init = torch_bias_init(math.prod(kernel_size))
            found['affine_kernel'] = (torch_kernel_init, (*kernel_size, 1, self.features))
            found['affine_bias'] = (bias_init, (self.features,))
            if self.use_batch_norm:
                found['scale'] = (jax.nn.initializers.ones, (self.features,))
                found['bias'] = (jax.nn.initializers.zeros, (self.features,))
        return found


def ints(value: Ints) -> tuple[int, ...]:
    """Returns a field that `Settings` has made a tuple, as a tuple for the type checker."""
    return cast(tuple[int, ...], value)


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_float(dtype):
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _hashable(padding):
    return tuple(map(_hashable, padding)) if isinstance(padding, list | tuple) else padding
