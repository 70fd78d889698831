"""ConvNorm and ConvNormTranspose as pure functions of arrays. The layers of every library call these.

::

    settings = Settings(features=64, kernel_size=(3, 3))
    y, state = apply(settings, params, state, x, use_running_average=False)

`params` holds 'kernel' `[*kernel, cin / groups, features]`. With `use_affine` it also holds 'affine_kernel'
`[*kernel, 1, features]` and 'affine_bias' [features], and with both `use_affine` and `use_batch_norm` 'scale' and
'bias' [features]. `state` holds the running spectrum, 'preconditioner' `[*grid, features]` and 'count' [], and with
`use_batch_norm` 'mean' and 'var' [features].
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers import convolution
from convnorm_jax.layers.batch_norm import batch_norm
from convnorm_jax.layers.channelwise import add_bias, channelwise_convolution
from convnorm_jax.layers.dtypes import widened, wider
from convnorm_jax.layers.geometry import Geometry, Ints, by_x, ints_for_axes
from convnorm_jax.layers.materialize import materialized_output
from convnorm_jax.layers.operation import normalized_convolution, preconditioner
from convnorm_jax.layers.reference import layouts
from convnorm_jax.layers.settings import SPECTRUM_MODES as SPECTRUM_MODES
from convnorm_jax.layers.settings import Settings, ints
from convnorm_jax.layers.spectral import is_pointwise

# The published schedule of the running spectrum: the weight of the new value falls as half a cosine over this many
# updates, down to the final weight.
RAMP_UPDATES = 40000
FINAL_WEIGHT = 0.01


def update_weight(count: ArrayLike) -> jax.Array:
    r"""Returns the weight of the new spectrum in update number `count`, float32 scalar.

    .. math::
        w_n = \max\Bigl(\tfrac12\bigl(1 + \cos(\pi \min(n, 40000) / 40000)\bigr),\ 0.01\Bigr)

    Args:
      count: n, from 1.

    Example:
      >>> round(float(update_weight(20000)), 3)
      0.5
    """
    phase = jnp.minimum(jnp.asarray(count, jnp.float32), RAMP_UPDATES) / RAMP_UPDATES
    return jnp.maximum(0.5 * (1 + jnp.cos(jnp.pi * phase)), FINAL_WEIGHT)


def initial_params(settings: Settings, key: jax.Array, features_in: int) -> dict[str, jax.Array]:
    """Returns parameters with PyTorch's initial values, uniform in +-1/sqrt(fan_in).

    Args:
      settings: of the layer.
      key: of the random numbers.
      features_in: channels of the images.

    Returns:
      The parameters by name, see the module's docstring.

    Example:
      >>> params = initial_params(Settings(features=64), jax.random.key(0), features_in=3)
      >>> params['kernel'].shape
      (3, 3, 3, 64)
    """
    keys = jax.random.split(key, len(settings.initializers(features_in)))
    return draw_params(settings, features_in, iter(keys).__next__)


def draw_params(
    settings: Settings,
    features_in: int,
    next_key: Callable[[], jax.Array],
    known: Mapping[str, jax.Array | None] | None = None,
) -> dict[str, jax.Array]:
    """Returns the parameters: those in `known` that have the right shape, and initial values for the others.

    Each initial value takes one key. Only what is needed is drawn, because JAX compiles the generator for every shape.
    """
    found = {}
    for name, (init, shape) in settings.initializers(features_in).items():
        value = (known or {}).get(name)
        found[name] = (
            value if value is not None and value.shape == shape else init(next_key(), shape, settings.param_dtype)
        )
    return found


def initial_state(
    settings: Settings, kernel: jax.Array, image_size: Ints | None, batch: int = 1
) -> dict[str, jax.Array]:
    """Returns the state before the first update.

    Args:
      settings: of the layer.
      kernel: `[*kernel, cin / groups, features]`.
      image_size: of the images, an int or an int for each axis. None leaves the running spectrum out, for
        spectrum='exact'.
      batch: number of images, by which the method is chosen.

    Returns:
      The state by name, see the module's docstring.

    Raises:
      ValueError: a kernel of other settings, or images that are too small for it.

    Example:
      >>> settings = Settings(features=64)
      >>> params = initial_params(settings, jax.random.key(0), features_in=3)
      >>> state = initial_state(settings, params['kernel'], (32, 32))
      >>> state['preconditioner'].shape
      (34, 34, 64)
    """
    dtype, found = settings.state_dtype, {}
    if image_size is not None:
        settings.check_kernel(kernel.shape)
        size = ints_for_axes(image_size, 'image_size', settings.rank)
        v = preconditioner(kernel, settings.geometry(size), settings.method, batch)
        found = {'preconditioner': v.astype(dtype), 'count': jnp.zeros((), jnp.float32)}
    if settings.use_batch_norm:
        found['mean'] = jnp.zeros((settings.features,), dtype)
        found['var'] = jnp.ones((settings.features,), dtype)
    return found


def apply(
    settings: Settings,
    params: Mapping[str, jax.Array],
    state: Mapping[str, jax.Array] | None,
    x: jax.Array,
    *,
    use_running_average: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Applies the layer to a batch of images.

    Args:
      settings: of the layer.
      params: see the module's docstring.
      state: see the module's docstring. Inference without BatchNorm and with spectrum='exact' needs none.
      x: `[B, *spatial, cin]`, float.
      use_running_average: True at inference, False in training.

    Returns:
      y, `[B, *spatial', features]`, and the state, which is a new one in training.

    Raises:
      ValueError: x of another rank, or of another size than the state; a kernel or a state of other settings.

    Example:
      >>> settings = Settings(features=64, strides=2)
      >>> params = initial_params(settings, jax.random.key(0), features_in=3)
      >>> state = initial_state(settings, params['kernel'], (32, 32))
      >>> y, state = apply(settings, params, state, jnp.ones((8, 32, 32, 3)), use_running_average=False)
      >>> y.shape, int(state['count'])
      ((8, 16, 16, 64), 1)
    """
    settings.check_shape(x.shape)
    settings.check_kernel(params['kernel'].shape, x.shape[-1])
    geometry, state = settings.geometry(x.shape[1:-1]), dict(state or {})
    needed = [] if settings.spectrum == 'exact' else ['preconditioner']
    needed += ['mean', 'var'] if settings.use_batch_norm else []
    if missing := [name for name in needed if name not in state]:
        raise UserError(f'the state has no {missing[0]!r}: make it by initial_state(settings, kernel, image_size)')
    kernel = widened(params['kernel'], settings.dtype or x.dtype)
    v, changed = spectrum(settings, kernel, geometry, x.shape[0], state, use_running_average)
    state.update(changed)
    y = convolve(settings, x, kernel, v, geometry)
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
            circular=geometry.circular,
        )
        state.update(changed)
    elif affine is not None:
        y = add_bias(channelwise_convolution(y, affine[0], geometry.circular), affine[1])
    return materialized_output(y, kernel[(0,) * kernel.ndim]), state


def spectrum(
    settings: Settings,
    kernel: jax.Array,
    geometry: Geometry,
    batch: int,
    state: Mapping[str, jax.Array],
    use_running_average: bool,
    layer: str = 'ConvNorm',
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the preconditioner V of this pass and the changed entries of the state.

    Training uses the V of the kernel as it is and changes the running average.

    Args:
      settings, state: of the layer.
      kernel: `[*kernel, cin / groups, features]`, float32 at least.
      geometry: of the layer on these images.
      batch: number of images.
      use_running_average: True at inference.
      layer: what an error message calls the layer.

    Raises:
      ValueError: images of another size than that of the running spectrum.
    """
    current = functools.partial(preconditioner, kernel, geometry, settings.method, batch)
    if settings.spectrum == 'exact' and (use_running_average or 'preconditioner' not in state):
        return current(), {}
    running = state['preconditioner']
    if not is_pointwise(kernel) and tuple(running.shape[:-1]) != geometry.grid:
        _refuse_size(settings, running.shape[:-1], geometry, use_running_average, layer)
    if use_running_average:
        return running, {}
    v, count = current(), state['count'] + 1
    return v, {'preconditioner': running_average(running, v, count, settings.momentum), 'count': count}


def running_average(running: jax.Array, new: jax.Array, count: jax.Array, momentum: float | None = None) -> jax.Array:
    r"""Returns the running preconditioner after update number `count`.

    .. math::
        \bar V_n = (1 - w_n)\,\bar V_{n-1} + w_n\,V_n

    Args:
      running: the average before the update, `[*grid, features]`.
      new: V of the current kernel, of the same shape.
      count: n, from 1.
      momentum: the constant 1 - w. None takes the published schedule, `update_weight(n)` as w.

    Returns:
      An array of the shape and dtype of `running`.

    Example:
      >>> float(running_average(jnp.zeros(()), jnp.ones(()), jnp.ones(()), momentum=0.75))
      0.25
    """
    weight = update_weight(count) if momentum is None else 1 - momentum
    weight = jnp.asarray(weight, running.dtype)
    return weight * new.astype(running.dtype) + (1 - weight) * running


def _refuse_size(settings, stored, geometry, use_running_average, layer):
    trained, given = (by_x(settings.image_size(grid)) for grid in (stored, geometry.grid))
    remedy = (
        "or set spectrum='exact', which recomputes it from the kernel"
        if use_running_average
        else 'or initialize with the image size you train on'
    )
    raise UserError(f'{layer}: the running spectrum is of {trained} images, got {given}; give {trained}, {remedy}')


def convolve(settings: Settings, x: jax.Array, kernel: jax.Array, v: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns the normalized convolution: full convolution, product with V at every frequency, crop and stride.

    Args:
      settings: of the layer.
      x: `[B, *spatial, cin]`, float.
      kernel: `[*kernel, cin / groups, features]`, float32 at least.
      v: the preconditioner, `[*grid, features]`.
      geometry: of the layer on these images.

    Returns:
      `[B, *spatial', features]`, in `settings.dtype` or the wider dtype of x and the kernel.
    """
    x = x.astype(settings.dtype or wider(x.dtype, kernel.dtype))
    if is_pointwise(kernel):
        # A flat spectrum only scales the kernel, and a strided convolution computes nothing that the stride drops.
        scaled = (kernel.astype(x.dtype).astype(v.dtype) * v[..., None, :]).astype(x.dtype)
        return pointwise(settings, x, scaled, geometry)
    # The kernel stays wide: the method 'frequency' rounds it to the dtype of x only after its transform.
    return normalized_convolution(x, kernel, v, geometry, settings.method, settings.precision)


def pointwise(settings: Settings, x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns the convolution with a kernel of one tap, into which V is multiplied already; nothing is cropped."""
    strides = ints(settings.strides)
    if settings.transposed:
        return convolution.of_geometry(x, kernel, geometry, settings.precision)
    if settings.rank == 2 and settings.feature_group_count == 1:
        return convolution.pointwise(x, kernel, strides, settings.precision)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        'VALID',
        dimension_numbers=layouts(settings.rank),
        feature_group_count=settings.feature_group_count,
        precision=settings.precision,
    )
