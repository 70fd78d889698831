"""ConvNorm and ConvNormTranspose as pure functions of arrays: what the layers of every library call.

    settings = Settings(features=64, kernel_size=(3, 3))
    y, state = apply(settings, params, state, x, use_running_average=False)

`params` holds 'kernel' [*kernel, cin / groups, features]; with `use_affine` 'affine_kernel' [*kernel, 1, features] and
'affine_bias' [features]; and with `use_batch_norm`, too, 'scale' and 'bias' [features]. `state` holds the running
spectrum, 'preconditioner' [*grid, features] and 'count' [], and with `use_batch_norm` 'mean' and 'var' [features].
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from convnorm_jax.errors import UserError
from convnorm_jax.layers import convolution, geometry
from convnorm_jax.layers.batch_norm import batch_norm
from convnorm_jax.layers.channelwise import add_bias, channelwise_convolution
from convnorm_jax.layers.dtypes import at_least_float32, widened, wider
from convnorm_jax.layers.geometry import Geometry, by_x, ints_for_axes, is_int
from convnorm_jax.layers.initializers import torch_bias_init, torch_kernel_init, torch_transposed_kernel_init
from convnorm_jax.layers.materialize import materialized_output
from convnorm_jax.layers.method import METHODS
from convnorm_jax.layers.operation import normalized_convolution, preconditioner
from convnorm_jax.layers.reference import layouts
from convnorm_jax.layers.spectral import is_pointwise

SPECTRUM_MODES = ('running', 'exact')

# The published schedule of the running spectrum: half a cosine over this many updates,
# down to this weight for the new value.
RAMP_UPDATES = 40000
FINAL_WEIGHT = 0.01


def update_weight(count):
    """Weight of the new spectrum in update number `count` (from 1), float32 scalar."""
    phase = jnp.minimum(jnp.asarray(count, jnp.float32), RAMP_UPDATES) / RAMP_UPDATES
    return jnp.maximum(0.5 * (1 + jnp.cos(jnp.pi * phase)), FINAL_WEIGHT)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a ConvNorm or, `transposed`, a ConvNormTranspose computes; the attributes are those of `ConvNorm`.

    Raises:
      ValueError: a setting that no layer can have.
    """

    features: int
    kernel_size: int | Sequence[int] = (3, 3)
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence = 'SAME'
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    transposed: bool = False
    use_affine: bool = True
    use_batch_norm: bool = True
    momentum: float | None = None
    spectrum: str = 'running'
    method: str | None = None
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self):
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
        """How many spatial axes there are."""
        return geometry.spatial_axes(self.kernel_size)

    @property
    def spans(self) -> tuple[int, ...]:
        """The kernel's size, dilated."""
        return geometry.dilated_size(self.kernel_size, self.kernel_dilation)

    @property
    def state_dtype(self) -> jnp.dtype:
        """Of the running statistics: float32, or float64 with such parameters."""
        return at_least_float32(self.param_dtype)

    def check_shape(self, shape: Sequence[int]):
        """Raises ValueError unless `shape` is one of a batch of images."""
        geometry.check_shape(shape, self.kernel_size)

    def check_kernel(self, shape: Sequence[int], features_in: int | None = None):
        """Raises ValueError unless `shape` is that of the kernel, for images of `features_in` channels."""
        channels = shape[-2]
        if features_in is not None:
            channels = geometry.channels_in_a_group(self.feature_group_count, features_in, self.features)
        expected = (*self.kernel_size, channels, self.features)
        if tuple(shape) != expected:
            channels = '' if features_in is None else f' and images of {features_in} channels'
            raise UserError(
                f'kernel.shape={tuple(shape)}: expected {expected} with kernel_size={self.kernel_size}, '
                f'features={self.features}, feature_group_count={self.feature_group_count}{channels}'
            )

    def geometry(self, image_size: Sequence[int]) -> Geometry:
        """Of images of this size."""
        if self.transposed:
            padding = geometry.canonical_transposed_padding(self.padding, image_size, self.spans, self.strides)
            build = geometry.of_transposed_convolution
        else:
            padding = geometry.canonical_padding(self.padding, image_size, self.spans, self.strides)
            build = geometry.of_convolution
        return build(
            image_size, self.kernel_size, self.strides, padding, self.kernel_dilation, self.feature_group_count
        )

    def image_size(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Of the images whose full convolution is of size `grid`."""
        if self.transposed:
            return tuple((n - k) // s + 1 for n, k, s in zip(grid, self.spans, self.strides))
        if self.padding == geometry.CIRCULAR:
            return tuple(grid)
        return tuple(n - k + 1 for n, k in zip(grid, self.spans))

    def initializers(self, features_in: int) -> dict[str, tuple[Callable, tuple[int, ...]]]:
        """{parameter: (initializer of (key, shape, dtype), shape)}; see the module's docstring."""
        channels = geometry.channels_in_a_group(self.feature_group_count, features_in, self.features)
        init = torch_transposed_kernel_init if self.transposed else torch_kernel_init
        found = {'kernel': (init, (*self.kernel_size, channels, self.features))}
        if self.use_affine:
            bias_init = torch_bias_init(math.prod(self.kernel_size))
            found['affine_kernel'] = (torch_kernel_init, (*self.kernel_size, 1, self.features))
            found['affine_bias'] = (bias_init, (self.features,))
            if self.use_batch_norm:
                found['scale'] = (jax.nn.initializers.ones, (self.features,))
                found['bias'] = (jax.nn.initializers.zeros, (self.features,))
        return found


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_float(dtype):
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _hashable(padding):
    return tuple(map(_hashable, padding)) if isinstance(padding, list | tuple) else padding


def initial_params(settings: Settings, key: jax.Array, features_in: int) -> dict[str, jax.Array]:
    """Parameters with PyTorch's initial values."""
    keys = jax.random.split(key, len(settings.initializers(features_in)))
    return draw_params(settings, features_in, iter(keys).__next__)


def draw_params(
    settings: Settings,
    features_in: int,
    next_key: Callable[[], jax.Array],
    known: Mapping[str, jax.Array | None] | None = None,
) -> dict[str, jax.Array]:
    """The parameters: those in `known` that have the right shape, and initial values, of a key each, for the others.

    Only what is needed is drawn: JAX compiles the generator for every shape.
    """
    found = {}
    for name, (init, shape) in settings.initializers(features_in).items():
        value = (known or {}).get(name)
        fits = value is not None and value.shape == shape
        found[name] = value if fits else init(next_key(), shape, settings.param_dtype)
    return found


def initial_state(
    settings: Settings, kernel: jax.Array, image_size: int | Sequence[int] | None, batch: int = 1
) -> dict[str, jax.Array]:
    """The state before the first update, for images of `image_size`; None: without running spectrum, for 'exact'."""
    kept_as, found = settings.state_dtype, {}
    if image_size is not None:
        settings.check_kernel(kernel.shape)
        image_size = ints_for_axes(image_size, 'image_size', settings.rank)
        v = preconditioner(kernel, settings.geometry(image_size), settings.method, batch)
        found |= {'preconditioner': v.astype(kept_as), 'count': jnp.zeros((), jnp.float32)}
    if settings.use_batch_norm:
        found['mean'] = jnp.zeros((settings.features,), kept_as)
        found['var'] = jnp.ones((settings.features,), kept_as)
    return found


def apply(
    settings: Settings,
    params: Mapping[str, jax.Array],
    state: Mapping[str, jax.Array] | None,
    x: jax.Array,
    *,
    use_running_average: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The layer on a batch of images.

    Args:
      params, state: see the module's docstring. Without BatchNorm and with spectrum='exact' inference needs no state.
      x: [B, *spatial, cin], float.
      use_running_average: True at inference, False in training.

    Returns:
      y, [B, *spatial', features]; the new state, in training, else the same.

    Raises:
      ValueError: x of another rank, or of another size than the state; a kernel or a state of other settings.
    """
    settings.check_shape(x.shape)
    settings.check_kernel(params['kernel'].shape, x.shape[-1])
    place, state = settings.geometry(x.shape[1:-1]), dict(state or {})
    needed = [] if settings.spectrum == 'exact' else ['preconditioner']
    needed += ['mean', 'var'] if settings.use_batch_norm else []
    if missing := [name for name in needed if name not in state]:
        raise UserError(f'the state has no {missing[0]!r}: make it by initial_state(settings, kernel, image_size)')
    kernel = widened(params['kernel'], settings.dtype or x.dtype)
    v, changed = spectrum(settings, kernel, place, x.shape[0], state, use_running_average)
    state.update(changed)
    y = convolve(settings, x, kernel, v, place)
    affine = None
    if settings.use_affine:
        dtype = settings.dtype or y.dtype
        affine = params['affine_kernel'][..., 0, :].astype(dtype), params['affine_bias'].astype(dtype)
    if settings.use_batch_norm:
        y, changed = batch_norm(
            y,
            {name: state[name] for name in ('mean', 'var')},
            params.get('scale'),
            params.get('bias'),
            use_running_average=use_running_average,
            momentum=settings.batch_norm_momentum,
            epsilon=settings.batch_norm_epsilon,
            channelwise=affine,
            circular=place.circular,
        )
        state.update(changed)
    elif affine is not None:
        y = add_bias(channelwise_convolution(y, affine[0], place.circular), affine[1])
    return materialized_output(y, kernel[(0,) * kernel.ndim]), state


def spectrum(settings, kernel, place, batch, state, use_running_average, where='ConvNorm'):
    """V of this pass, and the changed entries of the state: in training the running average with the new V in it."""
    current = functools.partial(preconditioner, kernel, place, settings.method, batch)
    if settings.spectrum == 'exact' and (use_running_average or 'preconditioner' not in state):
        return current(), {}
    running = state['preconditioner']
    if not is_pointwise(kernel) and tuple(running.shape[:-1]) != place.grid:
        _refuse_size(settings, running.shape[:-1], place, use_running_average, where)
    if use_running_average:
        return running, {}
    v, count = current(), state['count'] + 1
    return v, {'preconditioner': running_average(running, v, count, settings.momentum), 'count': count}


def running_average(running: jax.Array, new: jax.Array, count: jax.Array, momentum: float | None = None) -> jax.Array:
    """The running preconditioner after update number `count` (from 1): `momentum` * running + (1 - momentum) * new.

    A momentum of None is the published schedule, 1 - `update_weight(count)`.
    """
    weight = update_weight(count) if momentum is None else 1 - momentum
    weight = jnp.asarray(weight, running.dtype)
    return weight * new.astype(running.dtype) + (1 - weight) * running


def _refuse_size(settings, stored, place, use_running_average, where):
    trained, given = (by_x(settings.image_size(grid)) for grid in (stored, place.grid))
    remedy = (
        "or set spectrum='exact', which recomputes it from the kernel"
        if use_running_average
        else 'or initialize with the image size you train on'
    )
    raise UserError(f'{where}: the running spectrum is of {trained} images, got {given}; give {trained}, {remedy}')


def convolve(settings, x, kernel, v, place):
    """Steps 1 to 4: convolution, division by the root of the power spectrum, crop and stride."""
    x = x.astype(settings.dtype or wider(x.dtype, kernel.dtype))
    if is_pointwise(kernel):
        # A flat spectrum scales the kernel itself, and nothing is computed that a stride drops.
        scaled = (kernel.astype(x.dtype).astype(v.dtype) * v[..., None, :]).astype(x.dtype)
        return pointwise(settings, x, scaled, place)
    # By the method 'frequency' the kernel is rounded only after its transform.
    return normalized_convolution(x, kernel, v, place, settings.method, settings.precision)


def pointwise(settings, x, kernel, place):
    """The convolution by a kernel of one tap: no V, no crop."""
    if settings.transposed:
        return convolution.of_geometry(x, kernel, place, settings.precision)
    if settings.rank == 2 and settings.feature_group_count == 1:
        return convolution.pointwise(x, kernel, settings.strides, settings.precision)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        settings.strides,
        'VALID',
        dimension_numbers=layouts(settings.rank),
        feature_group_count=settings.feature_group_count,
        precision=settings.precision,
    )
