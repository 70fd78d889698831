"""Losses of the two nets of a GAN, as functions of the discriminator's logits, and the gradient penalty.

All are minimized. The discriminator's logit of an image is large if it takes the image for a real one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from convnorm_jax.errors import UserError

LOSSES = ('non_saturating', 'hinge', 'wasserstein', 'least_squares')


def discriminator_loss(name: str, real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    r"""What the discriminator minimizes, with r and f the logits of real and generated images.

    .. math::
        \text{non\_saturating:} &\quad \mathbb{E} \log(1 + e^{-r}) + \mathbb{E} \log(1 + e^{f}) \\
        \text{hinge:} &\quad \mathbb{E} \max(0, 1 - r) + \mathbb{E} \max(0, 1 + f) \\
        \text{wasserstein:} &\quad \mathbb{E} f - \mathbb{E} r \\
        \text{least\_squares:} &\quad \tfrac12 \mathbb{E} (r - 1)^2 + \tfrac12 \mathbb{E} f^2

    From arXiv 1406.2661 (the cross-entropy of real and generated images), 1705.02894 and 1802.05957 (hinge),
    1701.07875 (Wasserstein), and 1611.04076 with targets 1 and 0 (least squares). The first three are sums
    without a factor 1/2, as in torch_mimicry and in published training runs; the halves of the last are
    its paper's.

    >>> discriminator_loss('hinge', real_logits=jnp.array([2.0, 0.5]), fake_logits=jnp.array([-2.0, -2.0]))
    Array(0.25, dtype=float32)

    Args:
      name: one of `LOSSES`.
      real_logits: floating, any shape, such as [B].
      fake_logits: floating, any shape, such as [B].

    Returns:
      float32 scalar (float64 for float64 logits).

    Raises:
      ValueError: another name.
    """
    real, fake = _wide(name, real_logits), _wide(name, fake_logits)
    if name == 'non_saturating':
        return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()
    if name == 'hinge':
        return jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()
    if name == 'wasserstein':
        return fake.mean() - real.mean()
    return jnp.square(real - 1).mean() / 2 + jnp.square(fake).mean() / 2


def generator_loss(name: str, fake_logits: jax.Array) -> jax.Array:
    r"""What the generator minimizes, with f the logits of its images.

    .. math::
        \text{non\_saturating:} &\quad \mathbb{E} \log(1 + e^{-f}) \\
        \text{hinge, wasserstein:} &\quad -\mathbb{E} f \\
        \text{least\_squares:} &\quad \tfrac12 \mathbb{E} (f - 1)^2

    The first is not :math:`-\mathbb{E} \log(1 + e^{f})`, whose gradient vanishes where the discriminator is
    certain (arXiv 1406.2661). Sources: see `discriminator_loss`.

    Args:
      name: one of `LOSSES`.
      fake_logits: floating, any shape, such as [B].

    Returns:
      float32 scalar (float64 for float64 logits).

    Raises:
      ValueError: another name.
    """
    fake = _wide(name, fake_logits)
    if name == 'non_saturating':
        return jax.nn.softplus(-fake).mean()
    if name == 'least_squares':
        return jnp.square(fake - 1).mean() / 2
    return -fake.mean()


def gradient_penalty(
    discriminator_fn: Callable[[jax.Array], jax.Array],
    real: jax.Array,
    fake: jax.Array,
    key: jax.Array,
    target: float = 1.0,
) -> jax.Array:
    r"""Mean squared distance of the discriminator's gradient norms from `target` (WGAN-GP, arXiv 1704.00028).

    .. math::
        \mathbb{E}_i \left( \|\nabla_{x_i} D(x_i)\|_2 - \text{target} \right)^2, \qquad
        x_i = t_i\, \text{real}_i + (1 - t_i)\, \text{fake}_i, \quad t_i \sim U[0, 1)

    It is differentiable with respect to everything that `discriminator_fn` closes over. Where a gradient is 0,
    its norm has gradient 0, not NaN.

    Args:
      discriminator_fn: images -> logits [B]. With batch statistics, the gradient of an image includes its
        effect on the logits of the other images.
      real: float [B, H, W, C].
      fake: float [B, H, W, C]; image i is paired with image i of `real`.
      key: PRNG key.
      target: the desired norm.

    Returns:
      Scalar, float32 (float64 for float64 images), without its weight.

    Raises:
      ValueError: images of unequal shapes or not floating, or logits not [B].
    """
    norms = gradient_norms(discriminator_fn, interpolate(key, real, fake))
    return jnp.square(norms - target).mean()


def interpolate(key: jax.Array, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Computes t * real + (1 - t) * fake, with t uniform in [0, 1) for each example (arXiv 1704.00028).

    Args:
      key: PRNG key.
      real: floating [B, ...].
      fake: floating, of the shape of `real`.

    Returns:
      An array of the shape and dtype of `real`.

    Raises:
      ValueError: unequal shapes, or not floating.
    """
    if real.shape != fake.shape:
        raise UserError(f'fake.shape={fake.shape}: expected that of real, {real.shape}')
    for name, images in (('real', real), ('fake', fake)):
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f'{name}.dtype={images.dtype}: expected floats, as the discriminator takes them')
    share = jax.random.uniform(key, (real.shape[0],) + (1,) * (real.ndim - 1), real.dtype)
    return share * real + (1 - share) * fake


def gradient_norms(discriminator_fn: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """Euclidean norm of the gradient of the sum of all logits with respect to each image.

    >>> gradient_norms(lambda x: 3 * x[:, 0] + 4 * x[:, 1], jnp.ones((2, 2)))
    Array([5., 5.], dtype=float32)

    Args:
      discriminator_fn: images -> logits [B].
      images: float [B, ...].

    Returns:
      [B], float32 (float64 for float64 images). The gradient of a norm of 0 is 0.

    Raises:
      ValueError: logits not [B].
    """

    def total(x: jax.Array) -> jax.Array:
        logits = discriminator_fn(x)
        if logits.shape != images.shape[:1]:
            raise UserError(f'logits.shape={logits.shape}: expected {images.shape[:1]}, one for each image')
        return logits.sum()

    slopes = jax.grad(total)(images)
    slopes = slopes.astype(jnp.promote_types(slopes.dtype, jnp.float32)).reshape(len(images), -1)
    squares = jnp.square(slopes).sum(1)
    # jnp.where twice: the gradient of the root at 0 is infinite, and infinity times 0 would be NaN.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _wide(name: str, logits: jax.Array) -> jax.Array:
    if name not in LOSSES:
        raise UserError(f'name={name!r}: expected one of {", ".join(LOSSES)}')
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
