"""Sign-gradient attacks in the l-infinity ball: FGSM and PGD.

FGSM: Goodfellow, Shlens, Szegedy 2015 (arXiv 1412.6572), equation in section 4.
PGD:  Madry et al. 2018 (arXiv 1706.06083), section 2.1.
Margin loss: Carlini and Wagner 2017 (arXiv 1608.04644), f_6 with the sign turned and no cut-off.

An attack sees a model only as `logits_fn`: images [B, H, W, C] with pixels in [0, 1] -> logits
[B, K]. Normalisation, `train=False`, the parameters: all inside it. `epsilon` and `step_size` are
in the same units as the pixels: 8/255, not 8.

An attack is start x step x projection x loss, and each of the four is a function below, so that
a further attack replaces only what differs.
"""

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp

LogitsFn = Callable[[jax.Array], jax.Array]

LOSSES = ('cross_entropy', 'margin')

# A program holds at most this many copies of the network (the paper runs PGD-20).
_UNROLLED_COPIES = 50


def fgsm(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array,
    loss: str = 'cross_entropy',
) -> jax.Array:
    """One step of `epsilon` along the sign of the gradient, from the clean image.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K].
      images: float [B, H, W, C] in [0, 1].
      labels: int [B], the true classes.
      epsilon: radius of the ball, in pixel units of [0, 1]; a number or a traced scalar.
      loss: what goes up, one of `LOSSES` (static).

    Returns:
      Adversarial images, shape and dtype of `images`, in [0, 1]; a constant to differentiation.

    Raises:
      ValueError: an argument of the wrong shape, dtype, range or name.
    """
    images, labels = _checked_batch(images, labels)
    _check_loss(loss)
    _check_epsilon(epsilon)
    epsilon = jnp.asarray(epsilon, images.dtype)
    return _step(logits_fn, images, images, labels, epsilon, epsilon, loss)


def pgd(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float | jax.Array,
    step_size: float | jax.Array,
    steps: int,
    rng: jax.Array | None = None,
    init: jax.Array | None = None,
    restarts: int = 1,
    loss: str = 'cross_entropy',
) -> jax.Array:
    """`steps` steps along the sign of the gradient, each projected on the ball and on [0, 1].

    The start is the clean image plus `init` if given, else plus noise drawn uniformly from
    +-`epsilon` with `rng` if given, else the clean image itself; clipped to [0, 1].

    With several restarts, each from its own noise, an example keeps the first perturbation that
    makes the prediction wrong, or else the one of highest loss. Restart number i draws the same
    noise whatever `restarts` is, so that more restarts never find less.

    No example touches another: padding a batch, or its size, changes no example's gradient.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K].
      images: float [B, H, W, C] in [0, 1].
      labels: int [B], the true classes.
      epsilon: radius of the ball, in pixel units of [0, 1]; a number or a traced scalar.
      step_size: length of a step, same units; a number or a traced scalar.
      steps: number of steps, at least 1 (static).
      rng: a PRNG key for the start noise.
      init: float [B, H, W, C], the start noise to use instead of drawing it.
      restarts: number of starts (static); more than one needs `rng` and no `init`.
      loss: what goes up, one of `LOSSES` (static). Unlike the cross-entropy, the margin has a
        gradient that does not vanish where the model is very sure of itself.

    Returns:
      Adversarial images, shape and dtype of `images`, in [0, 1]; a constant to differentiation.

    Raises:
      ValueError: an argument of the wrong shape, dtype, range or name.
    """
    images, labels = _checked_batch(images, labels)
    _check_loss(loss)
    _check_epsilon(epsilon)
    _check_schedule(step_size, steps)
    _check_start(images, rng, init, restarts)
    epsilon = jnp.asarray(epsilon, images.dtype)
    step_size = jnp.asarray(step_size, images.dtype)
    unroll = _unroll(steps * restarts)

    def attack_from(start):
        def body(_, perturbed):
            return _step(logits_fn, perturbed, images, labels, step_size, epsilon, loss)

        return jax.lax.fori_loop(0, steps, body, start, unroll=unroll)

    def attempt(index):
        noise = uniform_start(jax.random.fold_in(rng, index), images, epsilon)
        return attack_from(_clip_pixels(images + noise))

    if init is not None:
        return attack_from(_clip_pixels(images + jnp.asarray(init, images.dtype)))
    if rng is None:
        return attack_from(_clip_pixels(images))
    if restarts == 1:
        return attempt(0)

    def judged(perturbed):
        return (perturbed, *_judge(logits_fn, perturbed, labels, loss))

    def body(index, best):
        return _stronger(best, judged(attempt(index)))

    return jax.lax.fori_loop(1, restarts, body, judged(attempt(0)), unroll=unroll)[0]


def uniform_start(rng: jax.Array, images: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """Start noise, uniform in +-`epsilon` for every pixel: shape and dtype of `images`."""
    return jax.random.uniform(rng, images.shape, images.dtype, -1, 1) * epsilon


def project_linf(perturbed: jax.Array, images: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """The nearest point to `perturbed` within +-`epsilon` of `images` and within [0, 1].

    All of shape [B, H, W, C]. Clipping to the ball and then to [0, 1] is exact, because both are
    boxes and `images` lies in both.
    """
    return _clip_pixels(images + jnp.clip(perturbed - images, -epsilon, epsilon))


def attack_loss(logits: jax.Array, labels: jax.Array, loss: str) -> jax.Array:
    """What an attack drives up, one value an example.

    Args:
      logits: float [B, K], K at least 2; computed in float32 or wider.
      labels: int [B].
      loss: 'cross_entropy', -log softmax(logits)[label], or
        'margin', max over j != label of logits[j], minus logits[label]: above 0 exactly where
        the prediction is wrong (but for ties).

    Returns:
      float [B].

    Raises:
      ValueError: an unknown loss, or logits that are not [B, K] with K at least 2.
    """
    _check_loss(loss)
    _check_logits(logits, labels)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if loss == 'cross_entropy':
        return -_at_label(jax.nn.log_softmax(logits), labels)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    best_other = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return best_other - _at_label(logits, labels)


def _step(logits_fn, perturbed, images, labels, step_size, epsilon, loss):
    """One signed step up the loss, projected."""

    # A sum, not a mean: an example's gradient then does not depend on who else is in the batch,
    # and a large batch does not push small gradients towards the underflow of float32.
    def total(pixels):
        return attack_loss(logits_fn(pixels), labels, loss).sum()

    direction = jnp.sign(jax.grad(total)(perturbed))
    return project_linf(perturbed + step_size * direction, images, epsilon)


def _judge(logits_fn, perturbed, labels, loss):
    """Per example: is the prediction wrong (bool [B]), and the loss (float [B])."""
    logits = logits_fn(perturbed)
    return jnp.argmax(logits, axis=-1) != labels, attack_loss(logits, labels, loss)


def _stronger(best, candidate):
    """Per example the candidate if it is the first to fool, or if none did and it has more loss."""
    best_images, best_wrong, best_loss = best
    images, wrong, loss = candidate
    better = ~best_wrong & (wrong | (loss > best_loss))
    return (
        jnp.where(better[:, None, None, None], images, best_images),
        best_wrong | wrong,
        jnp.where(better, loss, best_loss),
    )


def _unroll(copies: int) -> bool:
    """Whether the loops over `copies` passes of the network are written out in full.

    XLA:CPU runs a convolution inside a while loop 2 to 15 times slower than outside it: 2 times on
    five steps of a ResNet-18, 15 times on twenty of 17 convolutions of 32 channels (2 cores, jax
    0.10.2). Written out they cost compile time (that net: 0.2 s a copy): hence the limit. Other
    backends get the loop, which compiles in a moment.
    """
    return jax.default_backend() == 'cpu' and copies <= _UNROLLED_COPIES


def _clip_pixels(images):
    return jnp.clip(images, 0, 1)


def _at_label(values, labels):
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _checked_batch(images, labels):
    """Both as JAX arrays of a good shape and dtype; images as constants to differentiation."""
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if images.ndim != 4:
        raise ValueError(f'images.shape={images.shape}: expected [B, H, W, C]')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f'images.dtype={images.dtype}: expected floating pixels in [0, 1]')
    if labels.shape != images.shape[:1]:
        raise ValueError(f'labels.shape={labels.shape}: expected {images.shape[:1]}, one an image')
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f'labels.dtype={labels.dtype}: expected integers')
    # Adversarial training must not differentiate through the attack.
    return jax.lax.stop_gradient(images), labels


def _check_loss(loss):
    if loss not in LOSSES:
        raise ValueError(f'loss={loss!r}: expected one of {", ".join(LOSSES)}')


def _check_logits(logits, labels):
    if logits.ndim != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < 2:
        raise ValueError(f'logits.shape={logits.shape}: expected [{labels.shape[0]}, K] with K at least 2')


def _check_epsilon(epsilon):
    # Only what is a plain number: a traced value is not known yet.
    if isinstance(epsilon, numbers.Real) and not 0 <= epsilon <= 1:
        raise ValueError(f'epsilon={epsilon}: expected 0 to 1, in units of [0, 1] (8/255, not 8)')


def _check_schedule(step_size, steps):
    if isinstance(step_size, numbers.Real) and not 0 < step_size <= 1:
        raise ValueError(f'step_size={step_size}: expected above 0, up to 1, in units of [0, 1] (2/255, not 2)')
    if not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f'steps={steps}: expected an integer of at least 1')


def _check_start(images, rng, init, restarts):
    if not isinstance(restarts, numbers.Integral) or restarts < 1:
        raise ValueError(f'restarts={restarts}: expected an integer of at least 1')
    if restarts > 1 and (rng is None or init is not None):
        raise ValueError(f'restarts={restarts}: more than one needs rng, and no init')
    if init is not None and jnp.shape(init) != images.shape:
        raise ValueError(f'init.shape={jnp.shape(init)}: expected {images.shape}, as images')
