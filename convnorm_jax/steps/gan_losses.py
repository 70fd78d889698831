"""Losses of the two nets of a GAN, as functions of the discriminator's logits, and the gradient penalty.

All are minimized. A logit is large where the discriminator takes a picture for a real one.
"""

import jax
import jax.numpy as jnp

from convnorm_jax.errors import UserError

LOSSES = ('non_saturating', 'hinge', 'wasserstein', 'least_squares')


def discriminator_loss(name, real_logits, fake_logits):
    """What the discriminator minimizes, r and f being the logits of real and generated pictures.

    - non_saturating: mean softplus(-r) + mean softplus(f), the cross-entropy of both kinds
      (arXiv 1406.2661).
    - hinge: mean max(0, 1 - r) + mean max(0, 1 + f) (arXiv 1705.02894, 1802.05957).
    - wasserstein: mean f - mean r (arXiv 1701.07875).
    - least_squares: mean (r - 1)^2 / 2 + mean f^2 / 2 (arXiv 1611.04076, targets 1 and 0).

    The first three are sums of both kinds without a factor 1/2, as torch_mimicry has them and
    as published results are trained; the halves of the last are its paper's.

    Args:
      name: one of `LOSSES`.
      real_logits, fake_logits: floating, any shape and number each, such as [B].

    Returns:
      float32 scalar (float64 of float64 logits).

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


def generator_loss(name, fake_logits):
    """What the generator minimizes, f being the logits of its pictures.

    - non_saturating: mean softplus(-f), not -mean softplus(f), whose gradient vanishes where
      the discriminator is sure (arXiv 1406.2661).
    - hinge, wasserstein: -mean f (arXiv 1705.02894, 1802.05957; 1701.07875).
    - least_squares: mean (f - 1)^2 / 2 (arXiv 1611.04076).

    Args:
      name: one of `LOSSES`.
      fake_logits: floating, any shape, such as [B].

    Returns:
      float32 scalar (float64 of float64 logits).

    Raises:
      ValueError: another name.
    """
    fake = _wide(name, fake_logits)
    if name == 'non_saturating':
        return jax.nn.softplus(-fake).mean()
    if name == 'least_squares':
        return jnp.square(fake - 1).mean() / 2
    return -fake.mean()


def gradient_penalty(discriminator_fn, real, fake, key, target=1.0):
    """Mean squared distance of the discriminator's slopes from `target`, between real and generated pictures.

    mean_i (|| d D(x_i) / d x_i || - target)^2, x_i a point drawn uniformly on the line from fake_i
    to real_i, one for each pair (WGAN-GP, arXiv 1704.00028). It is differentiable by whatever
    `discriminator_fn` closes over; where a slope is 0 its norm counts with gradient 0, not NaN.

    Args:
      discriminator_fn: images -> logits [B]. With batch statistics, each picture's slope has what
        it does to the logits of the others, too.
      real, fake: float [B, H, W, C], paired by their order.
      key: PRNG key.
      target: the slope asked for.

    Returns:
      Scalar, float32 (float64 of float64 pictures), not yet multiplied with its weight.

    Raises:
      ValueError: pictures of unequal shapes or not floating, or logits not [B].
    """
    norms = gradient_norms(discriminator_fn, interpolate(key, real, fake))
    return jnp.square(norms - target).mean()


def interpolate(key, real, fake):
    """t * real + (1 - t) * fake, t uniform in [0, 1) for each example (arXiv 1704.00028).

    Args:
      key: PRNG key.
      real, fake: floating, of one shape [B, ...].

    Returns:
      The shape and dtype of real.

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


def gradient_norms(discriminator_fn, images):
    """Euclidean norm of the gradient of the sum of all logits by each picture.

    Args:
      discriminator_fn: images -> logits [B].
      images: float [B, ...].

    Returns:
      [B], float32 (float64 of float64 pictures). The gradient of a norm of 0 is 0.

    Raises:
      ValueError: logits not [B].
    """

    def total(x):
        logits = discriminator_fn(x)
        if logits.shape != images.shape[:1]:
            raise UserError(f'logits.shape={logits.shape}: expected {images.shape[:1]}, one for each picture')
        return logits.sum()

    slopes = jax.grad(total)(images)
    slopes = slopes.astype(jnp.promote_types(slopes.dtype, jnp.float32)).reshape(len(images), -1)
    squares = jnp.square(slopes).sum(1)
    # Twice where: a root's own gradient at 0 is infinite, and infinity times 0 would be NaN.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _wide(name, logits):
    if name not in LOSSES:
        raise UserError(f'name={name!r}: expected one of {", ".join(LOSSES)}')
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
