"""The one operation of ConvNorm and ConvNormTranspose, and which implementation of it runs.

| method | what it is | where |
|---|---|---|
| 'reference' | the paper's lines, by FFT | `reference` |
| 'spatial' | a convolution, then the filter as products with small matrices | here and `filters` |
| 'frequency' | all in the frequency domain, with XLA:CPU in mind | `frequency` |

None, the default, is 'spatial' in a program for a GPU or a TPU; in one for the CPU `method.choose_method` decides by
size. All are the same up to rounding, and all can be differentiated in every mode.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.layers import convolution, derivatives, filters, frequency, reference, spectral
from convnorm_jax.layers.dtypes import at_least_float32, widened
from convnorm_jax.layers.geometry import Geometry
from convnorm_jax.layers.method import choose_method
from convnorm_jax.layers.platforms import by_platform


def normalized_convolution(
    x: jax.Array,
    kernel: jax.Array,
    v: jax.Array,
    geometry: Geometry,
    method: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Full convolution, irfft2(V * rfft2(.)), crop and stride: steps 1 to 4 of the layer.

    Args:
      x: [B, H, W, cin], float; B may be a symbolic dimension.
      kernel: [kh, kw, cin, cout], float.
      v: the preconditioner, float32 or float64 [Hf, Wf, cout], even. A constant to differentiation.
      geometry: see `geometry.Geometry`.
      method: one of `method.METHODS`, or None to choose by platform and size.
      precision: of the convolution or of the products over the channels. Transforms are exact: float32 is not rounded
        to TF32 or bfloat16.

    Returns:
      [B, len(kept rows), len(kept columns), cout], the dtype of x.
    """
    kernel = widened(kernel, x.dtype)
    v = jax.lax.stop_gradient(v).astype(at_least_float32(x.dtype))
    x, kernel, v = derivatives.varying_alike(x, kernel, v)
    _check_method(method, geometry)
    if method == 'reference' or geometry.rank == 3:
        return reference.normalized_convolution(x, kernel, v, geometry, precision)
    if geometry.rank == 1:
        x, kernel, v, geometry = x[:, None], kernel[None], v[None], geometry.flattened()
        return normalized_convolution(x, kernel, v, geometry, method, precision)[:, 0]
    on_cpu = method or choose_method(geometry, x.shape[0], *kernel.shape[2:])
    on_accelerator = method or 'spatial'
    return derivatives.call(_rule(geometry, precision, on_cpu, on_accelerator), x, kernel, v)[0]


def preconditioner(kernel: jax.Array, geometry: Geometry, method: str | None = None, batch: int = 1) -> jax.Array:
    """V = (power spectrum)^(-1/2) of every output channel's filter, see `spectral.preconditioner`.

    A filter of a grouped convolution sees its own group's input channels, and its power is summed over these.

    Args:
      kernel: [kh, kw, cin, cout], float.
      geometry, method: see `normalized_convolution`.
      batch: of the images that it is for. Where they are convolved in the frequency domain, V shares the filters'
        transforms.

    Returns:
      float32 or float64 [Hf, Wf, cout], or [1, 1, cout] of a 1x1 kernel. A constant to differentiation.
    """
    _check_method(method, geometry)
    if geometry.rank == 1:
        return preconditioner(kernel[None], geometry.flattened(), method, batch)[0]
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
    """A convolution in the dtype of x, then the filter."""

    @staticmethod
    def forward(x, kernel, v, geometry, precision):
        return _spatial(x, kernel, v, geometry, precision)

    @staticmethod
    def gradients(x, kernel, v, cotangent, wanted, geometry, precision):
        full = functools.partial(reference.full_convolution, geometry=geometry, precision=precision)
        rounded, found = kernel.astype(x.dtype), {}
        filtered = functools.partial(filters.filter_and_crop, v=v, kept=geometry.kept)
        # `eval_shape`: the mesh axes that it varies over are part of an array's type, too.
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
    """`reference.full_convolution`, whose gradient with respect to the kernel cuDNN has a kernel for.

    With a padding of k-1 the cotangent is larger than x; XLA then exchanges the two, and what is left is a convolution
    with a window of the size of the image, with both transposed before it. So half of the padding is an array.
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
    """The same with the convolutions of `convolution`, which XLA:CPU differentiates well."""

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
