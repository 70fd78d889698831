"""The normalized convolution of ConvNorm and ConvNormTranspose, and the choice between its implementations.

- Method 'reference' is the paper's equations by FFT, see `reference`.
- Method 'spatial' is a convolution, then the filter as products with small matrices, see `filters`.
- Method 'frequency' computes all in the frequency domain, in a form for XLA:CPU, see `frequency`.

None, the default, takes 'spatial' in a program for a GPU or a TPU, and what `method.choose_method` chooses by size in
one for a CPU. All give the same up to rounding, and all can be differentiated in every mode.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.layers import convolution, derivatives, filters, frequency, reference, spectral
from convnorm_jax.layers.dtypes import at_least_float32, widened
from convnorm_jax.layers.geometry import Geometry
from convnorm_jax.layers.method import Method, choose_method
from convnorm_jax.layers.platforms import by_platform


def normalized_convolution(
    x: jax.Array,
    kernel: jax.Array,
    v: jax.Array,
    geometry: Geometry,
    method: Method | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""Returns the full convolution, filtered by V, cropped and strided.

    .. math::
        z_o = S\,F^{-1}\bigl(V_o\, F \textstyle\sum_i x_i * k_{io}\bigr)

    Args:
      x: [B, H, W, cin], float; B may be a symbolic dimension.
      kernel: [kh, kw, cin, cout], float.
      v: the preconditioner, float32 or float64 [Hf, Wf, cout], even: V(w) = V(-w). A constant to differentiation.
      geometry: of the layer, which holds the crop and the stride S.
      method: 'spatial', 'frequency' or 'reference'; None chooses by platform and size.
      precision: of the convolution or of the products over the channels. The transforms never round float32 to TF32 or
        bfloat16.

    Returns:
      [B, len(kept rows), len(kept columns), cout], the dtype of x.

    Raises:
      ValueError: a method that this geometry does not have.
    """
    kernel = widened(kernel, x.dtype)
    v = jax.lax.stop_gradient(v).astype(at_least_float32(x.dtype))
    x, kernel, v = derivatives.varying_alike(x, kernel, v)
    _check_method(method, geometry)
    if method == 'reference' or geometry.rank == 3:
        return reference.normalized_convolution(x, kernel, v, geometry, precision)
    if geometry.rank == 1:
        x, kernel, v, geometry = x[:, None], kernel[None], v[None], geometry.with_one_row()
        return normalized_convolution(x, kernel, v, geometry, method, precision)[:, 0]
    on_cpu = method or choose_method(geometry, x.shape[0], *kernel.shape[2:])
    on_accelerator = method or 'spatial'
    return derivatives.call(_rule(geometry, precision, on_cpu, on_accelerator), x, kernel, v)[0]


def preconditioner(
    kernel: jax.Array, geometry: Geometry, method: Method | None = None, batch: int | Any = 1
) -> jax.Array:
    """Returns V, the inverse square root of each output channel's power spectrum, see `spectral.preconditioner`.

    In a grouped convolution the power is summed over the input channels of the filter's own group.

    Args:
      kernel: [kh, kw, cin, cout], float.
      geometry: of the layer.
      method: see `normalized_convolution`.
      batch: number of images. Where they are convolved in the frequency domain, V shares the transforms of the kernel.

    Returns:
      float32 or float64 [Hf, Wf, cout], or [1, 1, cout] for a 1x1 kernel. A constant to differentiation.

    Raises:
      ValueError: a method that this geometry does not have.
    """
    _check_method(method, geometry)
    if geometry.rank == 1:
        return preconditioner(kernel[None], geometry.with_one_row(), method, batch)[0]
    on_cpu = method or ('spatial' if geometry.rank == 3 else choose_method(geometry, batch, *kernel.shape[2:]))
    return _preconditioner(jax.lax.stop_gradient(kernel), geometry, on_cpu)


def _check_method(method, geometry):
    if geometry.rank == 3 and method not in (None, 'reference'):
        raise UserError(f"method={method!r}: expected 'reference' or None for 3 spatial dimensions")
    if geometry.groups > 1 and method == 'frequency':
        raise UserError(f"method='frequency' with {geometry.groups} groups: expected 'spatial', 'reference' or None")


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for all layers of a shape
def _preconditioner(kernel, geometry, on_cpu):
    of_geometry = lambda form: lambda kernel, _: form(kernel, geometry)
    of_grid = lambda form: lambda kernel, grid: form(kernel, grid, geometry.dilation)
    by = lambda power: lambda kernel: spectral.preconditioner(kernel, geometry.grid, power)
    if on_cpu == 'reference':
        return by(of_geometry(reference.power_spectrum))(kernel)
    power = of_geometry(frequency.power_spectrum) if on_cpu == 'frequency' else of_grid(spectral.power_spectrum)
    return by_platform(kernel, cpu=by(power), accelerator=by(of_grid(filters.power_spectrum)))


@functools.lru_cache(maxsize=1024)
def _rule(geometry, precision, on_cpu, on_accelerator):
    given = (geometry, precision)
    cpu, accelerator = _CPU[on_cpu], _ACCELERATOR[on_accelerator]

    @jax.jit  # traced once for all layers of a shape
    def function(x, kernel, v):
        on_cpu, on_accelerator = (lambda *a: cpu.forward(*a, *given)), (lambda *a: accelerator.forward(*a, *given))
        return (by_platform(x, kernel, v, cpu=on_cpu, accelerator=on_accelerator),)

    @functools.partial(jax.jit, static_argnums=(3,))
    def gradient_of(arrays, _, cotangent, wanted):
        wanted = tuple(i for i in wanted if i < 2)
        found = by_platform(
            *arrays,
            cotangent,
            cpu=lambda *a: cpu.gradients(*a, wanted, *given),
            accelerator=lambda *a: accelerator.gradients(*a, wanted, *given),
        )
        return found

    def gradient(arrays, kept, cotangents, wanted):
        found = dict(zip((i for i in wanted if i < 2), gradient_of(tuple(arrays), kept, cotangents[0], wanted)))
        return [found[i] if i in found else jnp.zeros_like(arrays[i]) for i in wanted]

    return derivatives.Rule(function, gradient, lambda x, k, v: (_spatial(x, k, v, *given),))


class _Spatial:
    """The method 'spatial' for accelerators: a convolution in the dtype of x, then the filter."""

    @staticmethod
    def forward(x, kernel, v, geometry, precision):
        return _spatial(x, kernel, v, geometry, precision)

    @staticmethod
    def gradients(x, kernel, v, cotangent, wanted, geometry, precision):
        full = functools.partial(reference.full_convolution, geometry=geometry, precision=precision)
        rounded, found = kernel.astype(x.dtype), {}
        filtered = functools.partial(filters.filter_and_crop, v=v, kept=geometry.kept)
        # `eval_shape`, because the mesh axes that an array varies over are part of its type too.
        (of_full,) = jax.linear_transpose(filtered, jax.eval_shape(full, x, rounded))(cotangent)
        if 0 in wanted:
            (found[0],) = jax.linear_transpose(lambda x: full(x, rounded), x)(of_full)
        if 1 in wanted:
            by_kernel_of = _padded_first if geometry.plain else reference.full_convolution
            (by_kernel,) = jax.linear_transpose(lambda k: by_kernel_of(x, k, geometry, precision), rounded)(of_full)
            found[1] = by_kernel.astype(kernel.dtype)
        return tuple(found[i] for i in wanted)


def _spatial(x, kernel, v, geometry, precision):
    y = reference.full_convolution(x, kernel.astype(x.dtype), geometry, precision)
    return filters.filter_and_crop(y, v, geometry.kept)


def _padded_first(x, kernel, geometry, precision):
    """`reference.full_convolution` in a form whose gradient with respect to the kernel is fast with cuDNN.

    With a padding of k-1 the cotangent is larger than x. XLA then exchanges the two, transposes both, and convolves
    with a window of the size of the image. So half of the padding is a padded array.
    """
    inside = [(k - 1) // 2 for k in kernel.shape[:2]]
    edges = [(k - 1 - p, k - 1 - p, s - 1) for k, p, s in zip(kernel.shape[:2], inside, geometry.spread)]
    x = jax.lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return jax.lax.conv_general_dilated(
        jax.lax.optimization_barrier(x),
        jnp.flip(kernel, geometry.mirrored) if geometry.mirrored else kernel,
        window_strides=(1, 1),
        padding=[(p, p) for p in inside],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision,
    )


class _SpatialOnCpu:
    """The method 'spatial' for the CPU, with the convolutions that XLA:CPU differentiates well."""

    @staticmethod
    def forward(x, kernel, v, geometry, precision):
        y = convolution.of_geometry(x, kernel.astype(x.dtype), geometry, precision)
        return filters.filter_and_crop(y, v, geometry.kept)

    @classmethod
    def gradients(cls, x, kernel, v, cotangent, wanted, geometry, precision):
        forward = lambda x, kernel: cls.forward(x, kernel, v, geometry, precision)
        return derivatives.wanted_gradients(forward, (x, kernel), cotangent, wanted)


class _Frequency:
    forward = staticmethod(frequency.normalized_convolution)
    gradients = staticmethod(frequency.gradients)


_CPU = {'frequency': _Frequency, 'spatial': _SpatialOnCpu}
_ACCELERATOR = {'frequency': _Frequency, 'spatial': _Spatial}
