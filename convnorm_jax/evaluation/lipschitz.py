"""Lower bounds on a net's Lipschitz constant, found as an attack finds adversarial images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from convnorm_jax.attacks.projections import choose, clip_pixels, l2_norm, norm_of, unit

_TINY = 1e-12


def lipschitz_lower_bound(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    *,
    rng: jax.Array,
    radius: float = 0.5,
    power_steps: int = 10,
    steps: int = 20,
) -> jax.Array:
    r"""The steepest secant that was found from each image.

    .. math::
        \max_t \frac{\|f(x_t) - f(x)\|_2}{\|x_t - x\|_2} \le L

    Every :math:`x_t` is an image in [0, 1], so each quotient is a lower bound on the Lipschitz constant L of the
    logits in l2 (up to rounding). The search begins along the first singular vector of the Jacobian at x, by power
    iteration, and ascends the logarithm of the quotient by normalized gradient steps of radius / 10. Jittable.

    Args:
      logits_fn: pixels in [0, 1] -> logits, each example for itself.
      images: float32 [B, H, W, C] in [0, 1].
      rng: key of the first directions.
      radius: length of the first step, in units of pixels in [0, 1].
      power_steps: of the power iteration.
      steps: of the ascent.

    Returns:
      float32 [B]; 0 where the logits are constant.
    """
    clean, pull_back = jax.vjp(logits_fn, images)

    def power_step(direction: jax.Array, _: None) -> tuple[jax.Array, None]:
        _, pushed = jax.jvp(logits_fn, (images,), (direction,))
        return unit(pull_back(pushed)[0], 'l2'), None

    direction, _ = jax.lax.scan(power_step, unit(jax.random.normal(rng, images.shape), 'l2'), None, length=power_steps)

    def log_quotients(points: jax.Array) -> jax.Array:
        rise = jnp.sum((logits_fn(points) - clean) ** 2, axis=-1)
        run = jnp.sum((points - images).reshape(len(images), -1) ** 2, axis=-1)
        return 0.5 * (jnp.log(rise + _TINY**2) - jnp.log(run + _TINY**2))

    def ascend(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        points, best = carry
        quotients, vjp = jax.vjp(log_quotients, points)
        # Nearer points have a quotient of a few digits only.
        moved = norm_of(points - images, 'linf') > 1e-4 * radius
        best = jnp.maximum(best, jnp.where(moved, quotients, -jnp.inf))
        ascent = 0.1 * radius * unit(vjp(jnp.ones_like(quotients))[0], 'l2')
        return (clip_pixels(points + ascent), best), None

    # Of the two ends of the direction, the one that stays longer in the cube of pixels.
    one, other = (clip_pixels(images + sign * radius * direction) for sign in (1, -1))
    start = choose(l2_norm(one - images) >= l2_norm(other - images), one, other)
    first = start, jnp.full(len(images), -jnp.inf)
    (_, best), _ = jax.lax.scan(ascend, first, None, length=steps + 1)
    return jnp.where(jnp.isfinite(best), jnp.exp(best), 0)
