r"""ConvNorm in the frequency domain: the fast form for XLA:CPU.

A full convolution followed by the filter is a product of numbers at every frequency of the grid:

.. math::
    Y_o(\omega) = V_o(\omega) \sum_i X_i(\omega) K_{io}(\omega)

Images are real, so half of the frequencies determine the others. A product of two complex numbers takes three real
products (Gauss):

.. math::
    m_1 = (X_r + X_i) K_r, \quad m_2 = X_r (K_i - K_r), \quad m_3 = X_i (K_r + K_i), \quad
    Y_r = m_1 - m_3, \quad Y_i = m_1 + m_2

So the layer is a bilinear algorithm, as Winograd's convolutions are: y = C ((A k) * (B x)), with constant real matrices
A, B and C (see `bilinear`) and about 1.5 products at each point of the grid. It transforms the image, multiplies
matrices over the channels (one for each row of A), scales by V and transforms back. Gauss's sums and differences are
rows of the matrices. Cropping and striding drop rows of C. For a 3x3 kernel this takes 0.19 (34x34) to 0.36 (6x6) of
the direct convolution's multiplications.

The only transposes are between two products: rows are transformed image by image, columns with the batch inside.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from convnorm_jax.layers import bilinear, spectral
from convnorm_jax.layers.dtypes import at_least_float32
from convnorm_jax.layers.geometry import Geometry
from convnorm_jax.layers.materialize import materialize

_EXACT = jax.lax.Precision.HIGHEST


def kernel_filters(kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns the transform of the kernel, A k.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      geometry: of the layer, in 2 dimensions.

    Returns:
      [R, cin, cout], float32 at least.
    """
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    matrix = jnp.asarray(bilinear.plan(geometry).kernel, kernel.dtype)
    flat = jnp.dot(matrix, kernel.reshape(matrix.shape[1], -1), precision=_EXACT)
    return flat.reshape(-1, *kernel.shape[2:])


# Under `jit` JAX traces and lowers it once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=1)
def power_spectrum(kernel: jax.Array, geometry: Geometry) -> jax.Array:
    r"""Returns the power spectrum, from `kernel_filters`, so that XLA computes the transform once for both.

    It is a sum of squares: :math:`(K_i - K_r)^2 + (K_r + K_i)^2 = 2 |K|^2`.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      geometry: of the layer, in 2 dimensions.

    Returns:
      [Hf, Wf, cout], float32 at least.
    """
    # The barrier keeps the reshape out of the sum: fused, XLA:CPU takes three times as long.
    filters = jax.lax.optimization_barrier(kernel_filters(kernel, geometry))
    energy = jnp.square(filters).sum(axis=1)
    first, second = bilinear.plan(geometry).power.T
    return (0.5 * (energy[first] + energy[second])).reshape(*geometry.grid, -1)


def on_rows(v: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns V of the grid, [Hf, Wf, cout], as a factor of the products of each row of A, [R, 1, cout]."""
    return v.reshape(-1, 1, v.shape[-1])[bilinear.plan(geometry).frequency]


def normalized_convolution(
    x: jax.Array, kernel: jax.Array, v: jax.Array, geometry: Geometry, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Returns the full convolution, filtered by V, cropped and strided.

    Args:
      x: [B, H, W, cin], float.
      kernel: [kh, kw, cin, cout], float; it is not rounded to the dtype of x before its transform.
      v: float32 or float64 [Hf, Wf, cout], even: V(w) = V(-w).
      geometry: of the layer, in 2 dimensions.
      precision: of the products over the channels. The transforms never round float32 to TF32 or bfloat16.

    Returns:
      [B, len(kept rows), len(kept columns), cout], the dtype of x. Products accumulate in float32 at least.
    """
    kernel, v, _ = _sized(kernel, v)
    x = materialize(x, kernel[0, 0, 0, 0])
    return filtered(x, kernel_filters(kernel, geometry), on_rows(v, geometry), geometry, precision)


def gradients(
    x: jax.Array,
    kernel: jax.Array,
    v: jax.Array,
    cotangent: jax.Array,
    wanted: Sequence[int],
    geometry: Geometry,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `normalized_convolution` with respect to x (0) and the kernel (1).

    The transform of the image is recomputed instead of kept (it is 1.5 to 3 times as large as the image), and the
    transform of the kernel is made in the layout that the product needs.

    Args:
      x, kernel, v, geometry, precision: see `normalized_convolution`.
      cotangent: of the output.
      wanted: the indices, 0 or 1, of the gradients to return.
    """
    dtype, plan = kernel.dtype, bilinear.plan(geometry)
    kernel, v, size = _sized(kernel, v)
    # After the cotangent: otherwise XLA shares the transform with the forward pass, and keeps it until now.
    x, cotangent = jax.lax.optimization_barrier((x, cotangent))
    spectrum = _analyze(materialize(x, cotangent[:, :1, :1, :1]), plan.analysis)
    response = (_analyze(cotangent, _transposed(plan.synthesis)).astype(v.dtype) * on_rows(v, geometry)).astype(x.dtype)
    found = {}
    if 1 in wanted:
        by_kernel = _kernel_gradient(spectrum, response, plan, precision).reshape(kernel.shape)
        # After the kernel's gradient: XLA:CPU could defer the gradients of all kernels, and would keep all responses
        # until then.
        kernel = materialize(kernel, by_kernel[0, 0, 0, 0])
        found[1] = (by_kernel / size.astype(by_kernel.dtype)).astype(dtype)
    if 0 in wanted:
        filters = kernel_filters(kernel.swapaxes(2, 3), geometry).astype(x.dtype)
        by_spectrum = _channels('rbo,roi->rbi', response, filters, precision).astype(x.dtype)
        found[0] = _synthesize(by_spectrum, _transposed(plan.analysis), _size(geometry.inputs))
    return tuple(found[i] for i in wanted)


def _sized(kernel, v):
    """The kernel divided and V multiplied by each filter's size, as in `spectral.preconditioner`, and the sizes."""
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    size = jax.lax.stop_gradient(spectral.filter_sizes(kernel)[0])
    return kernel / _as_last(size, 4), v * _as_last(size, 3).astype(v.dtype), _as_last(size, 4)


def _as_last(a, rank):
    return a.reshape((1,) * (rank - 1) + a.shape)


def filtered(
    x: jax.Array,
    filters: jax.Array,
    scale: jax.Array | float,
    geometry: Geometry,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Transforms the image, multiplies by the filters over the channels, scales, and transforms back.

    Args:
      x: [B, H, W, cin], float.
      filters: [R, cin, cout], see `kernel_filters`.
      scale: factor of the products, [R, 1, cout], or 1.
      geometry, precision: see `normalized_convolution`.

    Returns:
      [B, len(kept rows), len(kept columns), cout], the dtype of x.
    """
    plan = bilinear.plan(geometry)
    response = _channels('rbi,rio->rbo', _analyze(x, plan.analysis), filters.astype(x.dtype), precision) * scale
    return _synthesize(response.astype(x.dtype), plan.synthesis, _size(geometry.kept))


def _kernel_gradient(spectrum, response, plan, precision):
    """The gradient with respect to the taps, A^T applied to sums over the batch, [kh * kw, cin * cout]."""
    # Where the batch is sharded, each device applies A^T to its own sum. The devices then all-reduce gradients of the
    # kernel, not of its transform, which is R / (kh kw) times as large.
    parts = _batch_shards(spectrum.shape[1])
    spectrum, response = (a.reshape(a.shape[0], parts, -1, a.shape[2]) for a in (spectrum, response))
    if parts == 1:
        by_filters = _channels('rbi,rbo->rio', spectrum[:, 0], response[:, 0], precision)[None]
    else:
        by_filters = _channels('rpbi,rpbo->prio', spectrum, response, precision)
    return _batched(plan.kernel.T, by_filters.reshape(parts, len(plan.kernel), -1)).sum(axis=0)


def _batch_shards(batch):
    """The number of shards of the batch: the size of the axis 'data' of the mesh in use (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types) if kind == jax.sharding.AxisType.Auto]
    shards = mesh.shape['data'] if 'data' in automatic else 1
    return shards if isinstance(batch, int) and batch % shards == 0 else 1


def _channels(equation, a, b, precision):
    """A batch of matrix products over channels or images, accumulated in float32 at least."""
    wide = at_least_float32(a.dtype)
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=wide)


def _analyze(x, matrices):
    """Applies B, [B, H, W, C] -> [R, B, C], to rows, then columns, or as one matrix."""
    batch, height, width, channels = x.shape
    if len(matrices) == 1:
        return _batched(matrices[0], x.reshape(batch, height * width, channels)).swapaxes(0, 1)
    by_row, by_column = matrices
    x = _batched(by_row, x.reshape(batch, height, width * channels))
    x = x.reshape(batch, -1, 2 * width, channels).transpose(1, 2, 0, 3)
    return _batched(by_column, x.reshape(*x.shape[:2], -1)).reshape(-1, batch, channels)


def _synthesize(x, matrices, size):
    """Applies C, [R, B, C] -> [B, H, W, C] of `size` (H, W), to columns, then rows, or as one matrix."""
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
    """Returns matrix @ x[i] for every i, accumulated in float32 at least and rounded to the dtype of x."""
    wide = at_least_float32(x.dtype)
    # The small matrix is repeated, because for a product of one matrix with many XLA:CPU transposes the many.
    matrix = jnp.broadcast_to(jnp.asarray(matrix, x.dtype), (x.shape[0], *matrix.shape))
    return jnp.matmul(matrix, x, precision=_EXACT, preferred_element_type=wide).astype(x.dtype)


def _transposed(matrices):
    """The matrices of the adjoint, in the order in which it applies them."""
    return [matrix.T for matrix in reversed(matrices)]


def _size(places):
    return tuple(len(p) for p in places)
