"""Reparametrized kernels: spectral norm, ONI, OWN and weight norm, pure functions of arrays.

Kernels are [kh, kw, cin, cout], or have 1 or 3 spatial axes; of a grouped convolution cin counts
one group's inputs. What counts as a filter's vector is PyTorch's: the matrix of a kernel has one
row for each output channel, flattened as (cin, kh, kw), so that published singular vectors carry
over. Statistics are float32 whatever the kernel's dtype, and every product is a true float32 one
on accelerators too.
"""

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.layers.channelwise import over_channels
from convnorm_jax.layers.reference import layouts

_EXACT = jax.lax.Precision.HIGHEST

# More power iterations than this go through a loop, fewer are unrolled.
_MOST_UNROLLED = 2

# Eigenvalues below this share of the largest one are rounding errors in float32.
_RELATIVE_FLOOR = 1e-7


def as_matrix(kernel):
    """float32 [cout, cin * kh * kw] of a kernel, a row for each output channel."""
    spatial = range(kernel.ndim - 2)
    return kernel.astype(jnp.float32).transpose(-1, -2, *spatial).reshape(kernel.shape[-1], -1)


def as_kernel(matrix, shape):
    """The kernel of `shape` whose `as_matrix` is `matrix`."""
    *kernel_size, cin, cout = shape
    return matrix.reshape(cout, cin, *kernel_size).transpose(*range(2, len(shape)), 1, 0)


def normalized(x, eps=1e-12):
    """x / max(||x||, eps), x an array of any shape."""
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum()), eps)


def safe_divisor(x, eps=1e-12):
    """x, and 1 where |x| < eps: what a kernel of zeros is divided by."""
    return jnp.where(jnp.abs(x) < eps, 1.0, x)


# --- spectral norm ---------------------------------------------------------------------------


def reshaped_operator(kernel):
    """The linear map v -> `as_matrix(kernel)` v: PyTorch's notion of a convolution's matrix."""
    matrix = as_matrix(kernel)
    return lambda v: jnp.dot(matrix, v, precision=_EXACT)


def convolution_operator(kernel, strides=(1, 1), padding='SAME', groups=1):
    """The linear map of the convolution itself, [H, W, cin] -> [H', W', cout], float32.

    Args:
      kernel: [kh, kw, cin, cout].
      strides, padding, groups: see `convolve`.
    """
    kernel = kernel.astype(jnp.float32)
    return lambda v: convolve(v[None], kernel, strides, padding, _EXACT, groups)[0]


def convolve(x, kernel, strides=(1, 1), padding='SAME', precision=None, groups=1):
    """Cross-correlation of x, [B, H, W, cin], or with 1 or 3 spatial axes.

    Args:
      padding: as in `jax.lax.conv_general_dilated`, or 'CIRCULAR' as in `flax.linen.Conv`:
        the picture is periodic, (k-1)//2 before and k//2 after.
      groups: of channels, flax's `feature_group_count`.
    """
    if padding == 'CIRCULAR':
        pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:-2]]
        x = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode='wrap')
        padding = 'VALID'
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=layouts(kernel.ndim - 2),
        feature_group_count=groups,
        precision=precision,
    )


def power_iteration(operator, u, v, iterations=1, eps=1e-12):
    """(u, v) nearer to the operator's leading left and right singular vectors.

    One iteration is v = normalized(A^T u), then u = normalized(A v): that of
    `torch.nn.utils.spectral_norm`. A zero, of a kernel of zeros, is not taken: nothing would
    lead away from it. Not meant to be differentiated.

    Args:
      operator: linear map from arrays of v's shape to arrays of u's shape.
      u, v: float32.
      iterations: how many; 0 returns u and v. eps: see `normalized`.
    """

    def step(_, pair):
        u, v = pair
        # Of the vjp only the transpose is used: a linear map has the same one everywhere.
        v = _moved(v, jax.vjp(operator, v)[1](u)[0], eps)
        return _moved(u, operator(v), eps), v

    if iterations > _MOST_UNROLLED:
        return jax.lax.fori_loop(0, iterations, step, (u, v))
    for i in range(iterations):
        u, v = step(i, (u, v))
    return u, v


def _moved(old, new, eps):
    return jnp.where(jnp.any(new != 0), normalized(new, eps), old)


def norm_estimate(operator, u, v):
    """<u, A v> with u and v constant to differentiation: the norm of A once they have converged.

    For unit u and v never above the norm. Its gradient with respect to A is u v^T.
    """
    u, v = jax.lax.stop_gradient((u, v))
    return (u * operator(v)).sum()


def convolution_norm(kernel, image_size, strides=(1, 1), padding='SAME', iterations=100, key=None):
    """Operator norm of a convolution on pictures of a given size, by power iteration.

    An estimate from below, to be reported as measured: it is exact in the limit only.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      image_size: (H, W).
      strides, padding: see `convolve`.
      iterations: power iterations.
      key: of the random start; None is a fixed one.

    Returns:
      float32 scalar, differentiable with respect to the kernel.
    """
    operator = convolution_operator(kernel, strides, padding)
    constant = convolution_operator(jax.lax.stop_gradient(kernel), strides, padding)
    key = jax.random.key(0) if key is None else key
    v = normalized(jax.random.normal(key, (*image_size, kernel.shape[2]), jnp.float32))
    u, v = power_iteration(constant, normalized(constant(v)), v, iterations)
    return norm_estimate(operator, u, v)


# --- ONI: orthogonalization by Newton's iteration --------------------------------------------


def oni(kernel, iterations=3, groups=1, eps=1e-5, rows=None, bounded_columns=False):
    """Kernel with nearly orthonormal filters by Newton's iteration (Huang et al., arXiv 2004.00887).

    With Z the centred filters, each row minus its mean, B = (Z Z^T)^(-1/2) by
    B <- 1.5 B - 0.5 B^3 S from the identity, and the result is B Z. With more filters than
    weights in each, the columns are treated instead: Z (Z^T Z)^(-1/2).

    As published, S is divided by its Frobenius norm before the iteration in the case of
    rows only. In that of columns it is not, but the result still is divided by the norm's
    square root: the columns are orthogonal but not orthonormal, and the iteration diverges
    (to values of 1e4 and more after three steps) where Z^T Z has an eigenvalue well above 3.
    `bounded_columns` divides in both cases.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      iterations: of Newton, the paper's T. Few: 6 bring well-conditioned filters to within
        1e-6, and from about 10 on rounding errors grow in float32, the more so for columns.
      groups: of consecutive filters, each treated by itself; a divisor of cout.
      eps: added to the diagonal of S.
      rows: True treats rows, False columns; None takes rows if cout <= cin * kh * kw.
      bounded_columns: see above.

    Returns:
      float32 [kh, kw, cin, cout].

    Raises:
      ValueError: groups that do not divide cout, negative iterations.
    """
    if iterations < 0:
        raise UserError(f'iterations={iterations}: expected 0 or more')
    matrix = as_matrix(kernel)
    rows = matrix.shape[0] <= matrix.shape[1] if rows is None else rows
    z = _centred_groups(matrix, groups)
    s = _product('gik,gjk->gij' if rows else 'gki,gkj->gij', z, z)
    eye = jnp.eye(s.shape[-1])[None]
    s = s + eps * eye
    norm = jnp.sqrt(jnp.square(s).sum((1, 2), keepdims=True))
    if rows or bounded_columns:
        s = s / norm
    b = jnp.broadcast_to(eye, s.shape)
    for _ in range(iterations):
        cube = _product('gij,gjk->gik', _product('gij,gjk->gik', b, b), b)
        b = 1.5 * b - 0.5 * _product('gij,gjk->gik', cube, s)
    w = _product('gij,gjk->gik', b, z) if rows else _product('gij,gjk->gik', z, b)
    return as_kernel(w / jnp.sqrt(norm), kernel.shape)


def _centred_groups(matrix, groups):
    """[groups, cout / groups, fan_in], every row minus its mean."""
    cout = matrix.shape[0]
    if groups < 1 or cout % groups:
        raise UserError(f'groups={groups}: expected a divisor of features={cout}')
    z = matrix.reshape(groups, cout // groups, -1)
    return z - z.mean(-1, keepdims=True)


def _product(equation, a, b):
    return jnp.einsum(equation, a, b, precision=_EXACT)


# --- OWN: orthogonalization by an eigendecomposition -----------------------------------------


def own(kernel, groups=1):
    """Kernel with orthonormal filters, (Z Z^T)^(-1/2) Z (Huang et al., arXiv 1709.06079).

    Z are the centred filters, each row minus its mean. They can be orthonormal only if a
    group has fewer filters than a filter has weights; in a larger group some are not, and
    stay finite, where the published code divides by zero.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      groups: of consecutive filters, each treated by itself; a divisor of cout.

    Returns:
      float32 [kh, kw, cin, cout]. Its gradient is exact and finite for repeated
      eigenvalues too; its second derivatives are not.

    Raises:
      ValueError: groups that do not divide cout.
    """
    z = _centred_groups(as_matrix(kernel), groups)
    root = inverse_sqrt(_product('gik,gjk->gij', z, z))
    return as_kernel(_product('gij,gjk->gik', root, z), kernel.shape)


@jax.custom_jvp
def inverse_sqrt(s):
    """s^(-1/2) of symmetric positive matrices, float32 [..., n, n].

    Eigenvalues below 1e-7 of the largest one count as that; a matrix of zeros gives the
    identity. The derivative is that of the matrix function (Daleckii and Krein), which,
    unlike that of the eigenvectors, needs no gap between eigenvalues.
    """
    roots, vectors = _eigen_roots(s)
    return _product('...ij,...kj->...ik', vectors / roots[..., None, :], vectors)


@inverse_sqrt.defjvp
def _inverse_sqrt_jvp(primals, tangents):
    (s,), (ds,) = primals, tangents
    roots, vectors = _eigen_roots(s)
    value = _product('...ij,...kj->...ik', vectors / roots[..., None, :], vectors)
    a, b = roots[..., :, None], roots[..., None, :]
    ds = 0.5 * (ds + ds.swapaxes(-1, -2))
    inner = _product('...ji,...jk->...ik', vectors, _product('...ij,...jk->...ik', ds, vectors))
    # (a^-1 - b^-1) / (a^2 - b^2), without the difference.
    inner = -inner / (a * b * (a + b))
    return value, _product('...ij,...kj->...ik', _product('...ij,...jk->...ik', vectors, inner), vectors)


def _eigen_roots(s):
    """(square roots of the eigenvalues [..., n], eigenvectors in columns [..., n, n])."""
    values, vectors = jnp.linalg.eigh(s)
    largest = values[..., -1:]
    dead = largest < np.finfo(np.float32).tiny
    values = jnp.where(dead, 1.0, jnp.maximum(values, _RELATIVE_FLOOR * largest))
    return jnp.sqrt(values), vectors


# --- weight norm -----------------------------------------------------------------------------


def filter_norms(kernel):
    """Norm of every output channel's filter, float32 [cout]; its gradient at a zero filter is 0."""
    energy = jnp.square(kernel.astype(jnp.float32)).sum(tuple(range(kernel.ndim - 1)))
    dead = energy < np.finfo(np.float32).tiny
    return jnp.where(dead, 0.0, jnp.sqrt(jnp.where(dead, 1.0, energy)))


def weight_norm(kernel, scale):
    """scale * kernel / ||kernel|| for each output channel (Salimans and Kingma, arXiv 1602.07868).

    That of `torch.nn.utils.weight_norm` with dim=0. A filter of zeros stays zero.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype. scale: [cout].

    Returns:
      float32 [kh, kw, cin, cout].
    """
    norms = filter_norms(kernel)
    factor = scale.astype(jnp.float32) / jnp.where(norms == 0, 1.0, norms)
    return kernel.astype(jnp.float32) * over_channels(factor, kernel)
