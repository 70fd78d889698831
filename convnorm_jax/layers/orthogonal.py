"""Reparametrized kernels (ONI, OWN and weight norm) as pure functions of arrays.

Kernels are [kh, kw, cin, cout], or have 1 or 3 spatial axes. In a grouped convolution cin is the number of one group's
input channels. The matrix of a kernel is PyTorch's: one row for each output channel, flattened as (cin, kh, kw), so
that published singular vectors can be imported. Statistics are float32 whatever the dtype of the kernel, and products
of float32 stay float32 on accelerators too.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.layers.channelwise import over_channels

_EXACT = jax.lax.Precision.HIGHEST

# Eigenvalues below this share of the largest one are rounding errors in float32.
_RELATIVE_FLOOR = 1e-7


def as_matrix(kernel: jax.Array) -> jax.Array:
    """Returns a kernel as a matrix, float32 [cout, cin * kh * kw], with a row for each output channel."""
    spatial = range(kernel.ndim - 2)
    return kernel.astype(jnp.float32).transpose(-1, -2, *spatial).reshape(kernel.shape[-1], -1)


def as_kernel(matrix: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns the kernel of a shape from its matrix, the inverse of `as_matrix`."""
    *kernel_size, cin, cout = shape
    return matrix.reshape(cout, cin, *kernel_size).transpose(*range(2, len(shape)), 1, 0)


# --- ONI: orthogonalization by Newton's iteration --------------------------------------------


def oni(
    kernel: jax.Array,
    iterations: int = 3,
    groups: int = 1,
    eps: float = 1e-5,
    rows: bool | None = None,
    bounded_columns: bool = False,
) -> jax.Array:
    r"""Returns a kernel with nearly orthonormal filters, by Newton's iteration.

    Z holds the centred filters, each row minus its mean. The result is B Z with

    .. math::
        B \approx S^{-1/2}, \quad S = Z Z^T + \epsilon I, \qquad
        B \leftarrow \tfrac32 B - \tfrac12 B^3 S \text{ from } I

    With more filters than weights in each, the columns are orthogonalized instead: Z B with S = Z^T Z + eps I.

    As published, S is divided by its Frobenius norm before the iteration for rows, but not for columns, although the
    result is divided by the square root of the norm in both cases. So the columns are orthogonal but not orthonormal,
    and where Z^T Z has an eigenvalue well above 3 the iteration diverges (to values of 1e4 and more after three
    iterations). `bounded_columns` divides in both cases.

    Source: Huang et al., `arXiv 2004.00887 <https://arxiv.org/abs/2004.00887>`__.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      iterations: number of Newton iterations, the paper's T. Take few: 6 bring well-conditioned filters to within 1e-6,
        and from about 10 on rounding errors grow in float32, more so for columns.
      groups: number of groups of consecutive filters, each orthogonalized on its own; a divisor of cout.
      eps: added to the diagonal of S.
      rows: True orthogonalizes rows, False columns; None takes rows if cout <= cin * kh * kw.
      bounded_columns: see above.

    Returns:
      float32 [kh, kw, cin, cout].

    Raises:
      ValueError: groups that do not divide cout; negative iterations.
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
    """Returns the rows minus their means, [groups, cout / groups, fan_in]."""
    cout = matrix.shape[0]
    if groups < 1 or cout % groups:
        raise UserError(f'groups={groups}: expected a divisor of features={cout}')
    z = matrix.reshape(groups, cout // groups, -1)
    return z - z.mean(-1, keepdims=True)


def _product(equation, a, b):
    return jnp.einsum(equation, a, b, precision=_EXACT)


# --- OWN: orthogonalization by an eigendecomposition -----------------------------------------


def own(kernel: jax.Array, groups: int = 1) -> jax.Array:
    r"""Returns a kernel with orthonormal filters.

    .. math::
        W = (Z Z^T)^{-1/2} Z

    Z holds the centred filters, each row minus its mean. They can be orthonormal only if a group has fewer filters than
    a filter has weights. In a larger group some are not, but all are finite, where the published code divides by zero.

    Source: Huang et al., `arXiv 1709.06079 <https://arxiv.org/abs/1709.06079>`__.

    Args:
      kernel: [kh, kw, cin, cout], any float dtype.
      groups: number of groups of consecutive filters, each orthogonalized on its own; a divisor of cout.

    Returns:
      float32 [kh, kw, cin, cout]. The gradient is exact and finite for repeated eigenvalues too; second derivatives are
      not.

    Raises:
      ValueError: groups that do not divide cout.
    """
    z = _centred_groups(as_matrix(kernel), groups)
    root = inverse_sqrt(_product('gik,gjk->gij', z, z))
    return as_kernel(_product('gij,gjk->gik', root, z), kernel.shape)


@jax.custom_jvp
def inverse_sqrt(s: jax.Array) -> jax.Array:
    r"""Returns the inverse square roots of symmetric positive matrices, float32 [..., n, n].

    Eigenvalues are at least 1e-7 of the largest one, and a matrix of zeros gives the identity. The derivative is that
    of the matrix function (Daleckii and Krein), which needs no gap between eigenvalues, unlike that of the
    eigenvectors. With :math:`S = U \Lambda U^T` it is

    .. math::
        d(S^{-1/2}) = U \Bigl(\frac{\lambda_i^{-1/2} - \lambda_j^{-1/2}}{\lambda_i - \lambda_j}
            (U^T dS\, U)_{ij}\Bigr) U^T
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
    # This is (a^-1 - b^-1) / (a^2 - b^2), without the differences, for the roots a and b of two eigenvalues.
    inner = -inner / (a * b * (a + b))
    return value, _product('...ij,...kj->...ik', _product('...ij,...jk->...ik', vectors, inner), vectors)


def _eigen_roots(s):
    """Returns the square roots of the eigenvalues, [..., n], and the eigenvectors in columns, [..., n, n]."""
    values, vectors = jnp.linalg.eigh(s)
    largest = values[..., -1:]
    dead = largest < np.finfo(np.float32).tiny
    values = jnp.where(dead, 1.0, jnp.maximum(values, _RELATIVE_FLOOR * largest))
    return jnp.sqrt(values), vectors


# --- weight norm -----------------------------------------------------------------------------


def filter_norms(kernel: jax.Array) -> jax.Array:
    """Returns the norm of every output channel's filter, float32 [cout]; the gradient at a filter of zeros is 0."""
    energy = jnp.square(kernel.astype(jnp.float32)).sum(tuple(range(kernel.ndim - 1)))
    dead = energy < np.finfo(np.float32).tiny
    return jnp.where(dead, 0.0, jnp.sqrt(jnp.where(dead, 1.0, energy)))


def weight_norm(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    r"""Returns a kernel whose filters have given norms.

    .. math::
        w_o = g_o\, k_o / \|k_o\|

    It is that of `torch.nn.utils.weight_norm` with dim=0. A filter of zeros stays zero.

    Source: Salimans and Kingma, `arXiv 1602.07868 <https://arxiv.org/abs/1602.07868>`__.

    Args:
      kernel: k, [kh, kw, cin, cout], any float dtype.
      scale: g, [cout].

    Returns:
      float32 [kh, kw, cin, cout].
    """
    norms = filter_norms(kernel)
    factor = scale.astype(jnp.float32) / jnp.where(norms == 0, 1.0, norms)
    return kernel.astype(jnp.float32) * over_channels(factor, kernel)
