"""ConvNorm wholly in the frequency domain: the fast form for XLA:CPU.

A full convolution followed by the filter is, at every frequency w of the grid, a product of numbers:

    Y[o](w) = V[o](w) sum_i X[i](w) K[i, o](w).

The pictures are real, so half of the frequencies tell all, and a product of two complex numbers is
three real ones (Gauss):

    m1 = (Xr + Xi) Kr,   m2 = Xr (Ki - Kr),   m3 = Xi (Kr + Ki),   Yr = m1 - m3,   Yi = m1 + m2.

So the layer is what Winograd's convolutions are, a bilinear algorithm: y = C ((A k) * (B x)) with constant real
matrices A, B, C (`bilinear` makes them) and about 1.5 products a grid point: a transform of the picture, a batch of
matrix products over the channels (one for each row of A), the scale V, a transform back. Gauss's sums and differences
are rows of the matrices, crop and stride are rows of C that are not there. For a 3x3 kernel that is 0.19 (34x34) to
0.36 (6x6) of the direct convolution's multiplications, and the transforms do not depend on the number of channels on
the other side.

The only transposes are between two products: rows are transformed picture by picture, columns with the batch inside.
"""

import functools

import jax
import jax.numpy as jnp

from convnorm_jax.layers import bilinear, spectral
from convnorm_jax.layers.dtypes import at_least_float32
from convnorm_jax.layers.materialize import materialize

_EXACT = jax.lax.Precision.HIGHEST


def kernel_filters(kernel, geometry):
    """The kernel's side of the products, A k.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.

    Returns:
      [R, cin, cout], float32 at least.
    """
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    matrix = jnp.asarray(bilinear.plan(geometry).kernel, kernel.dtype)
    flat = jnp.dot(matrix, kernel.reshape(matrix.shape[1], -1), precision=_EXACT)
    return flat.reshape(-1, *kernel.shape[2:])


# `jit`, here and below: JAX traces and lowers it once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=1)
def power_spectrum(kernel, geometry):
    """`spectral.power_spectrum` from `kernel_filters`, which XLA then computes but once for both.

    A sum of squares, too: (Ki - Kr)^2 + (Kr + Ki)^2 = 2 |K|^2.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.

    Returns:
      [Hf, Wf, cout], float32 at least.
    """
    # The barrier keeps the filters' reshape out of the sum, which XLA:CPU then takes three times as long for.
    filters = jax.lax.optimization_barrier(kernel_filters(kernel, geometry))
    energy = jnp.square(filters).sum(axis=1)
    first, second = bilinear.plan(geometry).power.T
    return (0.5 * (energy[first] + energy[second])).reshape(*geometry.grid, -1)


def on_rows(v, geometry):
    """V of the grid, [Hf, Wf, cout], as a factor of each row's products, [R, 1, cout]."""
    return v.reshape(-1, 1, v.shape[-1])[bilinear.plan(geometry).frequency]


def normalized_convolution(x, kernel, v, geometry, precision=None):
    """Full convolution, irfft2(V * rfft2(.)) and crop: steps 1 to 4 of the layer.

    Args:
      x: [B, H, W, cin], float.
      kernel: [kh, kw, cin, cout], float; not rounded to the dtype of x before its transform.
      v: float32 or float64 [Hf, Wf, cout], even: v(w) = v(-w).
      geometry: see `geometry.Geometry`.
      precision: of the products over the channels; the transforms are exact, float32 inputs in true float32.

    Returns:
      [B, len(kept rows), len(kept columns), cout], the dtype of x. Products accumulate in float32 at least.
    """
    kernel, v, _ = _sized(kernel, v)
    x = materialize(x, kernel[0, 0, 0, 0])
    return filtered(x, kernel_filters(kernel, geometry), on_rows(v, geometry), geometry, precision)


def gradients(x, kernel, v, cotangent, wanted, geometry, precision=None):
    """Gradients of `normalized_convolution` with respect to x (0) and the kernel (1), those whose index is in `wanted`.

    The transform of the image is computed again instead of kept (it is 1.5 to 3 times the image), and the kernel's
    side is made in the layout that the product wants.
    """
    dtype, plan = kernel.dtype, bilinear.plan(geometry)
    kernel, v, size = _sized(kernel, v)
    # Only once the cotangent is there: XLA would take the transform of the forward pass, and keep it until now.
    x, cotangent = jax.lax.optimization_barrier((x, cotangent))
    spectrum = _analyze(materialize(x, cotangent[:, :1, :1, :1]), plan.analysis)
    response = (_analyze(cotangent, _transposed(plan.synthesis)).astype(v.dtype) * on_rows(v, geometry)).astype(x.dtype)
    found = {}
    if 1 in wanted:
        by_kernel = _kernel_gradient(spectrum, response, plan, precision).reshape(kernel.shape)
        # Only after it: XLA:CPU may put off the gradients of all kernels, and keep all responses until then.
        kernel = materialize(kernel, by_kernel[0, 0, 0, 0])
        found[1] = (by_kernel / size.astype(by_kernel.dtype)).astype(dtype)
    if 0 in wanted:
        filters = kernel_filters(kernel.swapaxes(2, 3), geometry).astype(x.dtype)
        by_spectrum = _channels('rbo,roi->rbi', response, filters, precision).astype(x.dtype)
        found[0] = _synthesize(by_spectrum, _transposed(plan.analysis), _size(geometry.inputs))
    return tuple(found[i] for i in wanted)


def _sized(kernel, v):
    """Kernel and V with filters of size 1, as `spectral.preconditioner` has them, and their sizes."""
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    size = jax.lax.stop_gradient(spectral.filter_sizes(kernel)[0])
    return kernel / _as_last(size, 4), v * _as_last(size, 3).astype(v.dtype), _as_last(size, 4)


def _as_last(a, rank):
    return a.reshape((1,) * (rank - 1) + a.shape)


def filtered(x, filters, scale, geometry, precision=None):
    """Transform of the image, products over the channels, scale, transform back.

    Args:
      x: [B, H, W, cin], float.
      filters: [R, cin, cout], see `kernel_filters`.
      scale: of the products, [R, 1, cout], or 1.
      geometry, precision: see `normalized_convolution`.

    Returns:
      [B, len(kept rows), len(kept columns), cout], the dtype of x.
    """
    plan = bilinear.plan(geometry)
    response = _channels('rbi,rio->rbo', _analyze(x, plan.analysis), filters.astype(x.dtype), precision) * scale
    return _synthesize(response.astype(x.dtype), plan.synthesis, _size(geometry.kept))


def _kernel_gradient(spectrum, response, plan, precision):
    """A^T of the sums over the batch, [kh * kw, cin * cout]."""
    # Where devices share the batch each sums its own part and goes back to the few taps with it: they then tell
    # each other gradients of the kernel, not of its filters, which are R / (kh kw) times as large.
    parts = _batch_shards(spectrum.shape[1])
    spectrum, response = (a.reshape(a.shape[0], parts, -1, a.shape[2]) for a in (spectrum, response))
    if parts == 1:
        by_filters = _channels('rbi,rbo->rio', spectrum[:, 0], response[:, 0], precision)[None]
    else:
        by_filters = _channels('rpbi,rpbo->prio', spectrum, response, precision)
    return _batched(plan.kernel.T, by_filters.reshape(parts, len(plan.kernel), -1)).sum(axis=0)


def _batch_shards(batch):
    """Over how many devices the batch is cut: the mesh in use (`jax.set_mesh`) has an axis 'data' of that size."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types) if kind == jax.sharding.AxisType.Auto]
    shards = mesh.shape['data'] if 'data' in automatic else 1
    return shards if isinstance(batch, int) and batch % shards == 0 else 1


def _channels(equation, a, b, precision):
    """A batch of matrix products over channels or pictures, accumulated in float32 at least."""
    wide = at_least_float32(a.dtype)
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=wide)


def _analyze(x, matrices):
    """[B, H, W, C] -> [R, B, C]: by rows, then by columns, or by one matrix."""
    batch, height, width, channels = x.shape
    if len(matrices) == 1:
        return _batched(matrices[0], x.reshape(batch, height * width, channels)).swapaxes(0, 1)
    by_row, by_column = matrices
    x = _batched(by_row, x.reshape(batch, height, width * channels))
    x = x.reshape(batch, -1, 2 * width, channels).transpose(1, 2, 0, 3)
    return _batched(by_column, x.reshape(*x.shape[:2], -1)).reshape(-1, batch, channels)


def _synthesize(x, matrices, size):
    """[R, B, C] -> [B, H, W, C] of `size` (H, W): by columns, then by rows, or by one matrix."""
    _, batch, channels = x.shape
    height, width = size
    if len(matrices) == 1:
        return _batched(matrices[0], x.swapaxes(0, 1)).reshape(batch, height, width, channels)
    by_column, by_row = matrices
    half = by_row.shape[1] // 2
    x = _batched(by_column, x.reshape(half, by_column.shape[1], -1))
    x = x.reshape(half, 2 * width, batch, channels).transpose(2, 0, 1, 3)
    return _batched(by_row, x.reshape(batch, 2 * half, -1)).reshape(batch, height, width, channels)


def _batched(matrix, x):
    """matrix @ x[i] for every i, accumulated in float32 at least and rounded to the dtype of x."""
    wide = at_least_float32(x.dtype)
    # The matrix is repeated (it is small): for a product of one matrix with many XLA:CPU transposes the many.
    matrix = jnp.broadcast_to(jnp.asarray(matrix, x.dtype), (x.shape[0], *matrix.shape))
    return jnp.matmul(matrix, x, precision=_EXACT, preferred_element_type=wide).astype(x.dtype)


def _transposed(matrices):
    """The matrices of the adjoint, in its order."""
    return [matrix.T for matrix in reversed(matrices)]


def _size(places):
    return tuple(len(p) for p in places)
