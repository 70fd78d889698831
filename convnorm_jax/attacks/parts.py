"""What attacks are made of: losses, balls, random numbers, loops, checks of what is given.

An attack sees a model only as `logits_fn`: images [B, H, W, C] with pixels in [0, 1] -> logits
[B, K]. Normalisation, `train=False`, the parameters: all inside it. `epsilon` and step sizes are
in the same units as the pixels: 8/255, not 8.

Every example has its own random numbers (`example_keys`) and its own loss (sums, not means), so
that what becomes of it depends neither on the batch it is packed in nor on the batch's size.
"""

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from convnorm_jax.errors import UserError

LogitsFn = Callable[[jax.Array], jax.Array]

LOSSES = ('cross_entropy', 'margin', 'dlr')
NORMS = ('linf', 'l2')

# A program holds at most this many copies of the network (the paper runs PGD-20).
UNROLLED_COPIES = 50

_SMALLEST_NORM = 1e-12


def attack_loss(logits: jax.Array, labels: jax.Array, loss: str) -> jax.Array:
    """What an untargeted attack drives up, one value an example.

    Args:
      logits: float [B, K], K at least 2; computed in float32 or wider.
      labels: int [B].
      loss: 'cross_entropy', -log softmax(logits)[label], or
        'margin', max over j != label of logits[j], minus logits[label]: above 0 exactly where
        the prediction is wrong (but for ties), or
        'dlr', the margin over the distance from the largest to the third largest logit: the same
        sign, but unchanged if all logits are scaled (Croce and Hein 2020, arXiv 2003.01690,
        equation 6). Needs three classes.

    Returns:
      float [B].

    Raises:
      ValueError: an unknown loss, or logits that are not [B, K] with K large enough.
    """
    check_loss(loss)
    logits = _checked_logits(logits, labels, 3 if loss == 'dlr' else 2)
    if loss == 'cross_entropy':
        return -at_label(jax.nn.log_softmax(logits), labels)
    margin = _best_other(logits, labels) - at_label(logits, labels)
    if loss == 'margin':
        return margin
    ordered = jnp.sort(logits, axis=-1)
    return margin / (ordered[:, -1] - ordered[:, -3] + _SMALLEST_NORM)


def targeted_loss(logits: jax.Array, labels: jax.Array, targets: jax.Array, loss: str) -> jax.Array:
    """What an attack towards the classes `targets` drives up, one value an example.

    Args:
      logits: float [B, K]. labels, targets: int [B], the true and the wanted classes.
      loss: 'cross_entropy', log softmax(logits)[target];
        'margin', logits[target] minus the largest other logit; or
        'dlr', logits[target] - logits[label] over the largest logit minus the mean of the third
        and the fourth (arXiv 2003.01690, equation 7). Needs four classes.

    Returns:
      float [B].

    Raises:
      ValueError: as `attack_loss`.
    """
    check_loss(loss)
    logits = _checked_logits(logits, labels, 4 if loss == 'dlr' else 2)
    if loss == 'cross_entropy':
        return at_label(jax.nn.log_softmax(logits), targets)
    if loss == 'margin':
        return at_label(logits, targets) - _best_other(logits, targets)
    ordered = jnp.sort(logits, axis=-1)
    scale = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + _SMALLEST_NORM
    return (at_label(logits, targets) - at_label(logits, labels)) / scale


def nth_wrong_class(logits: jax.Array, labels: jax.Array, n: int | jax.Array) -> jax.Array:
    """The wrong class with the n-th largest logit (n = 0: the largest), int32 [B]; n below K - 1."""
    order = jnp.argsort(-jnp.where(_is_label(logits, labels), -jnp.inf, logits), axis=-1)
    return order[:, n].astype(jnp.int32)


def value_and_gradient(logits_fn: LogitsFn, images: jax.Array, loss_fn: Callable[[jax.Array], jax.Array]):
    """(loss [B], logits [B, K], gradient of the summed loss by the images).

    A sum, not a mean: an example's gradient then does not depend on who else is in the batch, and a
    large batch does not push small gradients towards the underflow of float32.

    Args:
      loss_fn: logits -> loss [B].
    """

    def total(pixels):
        logits = logits_fn(pixels)
        loss = loss_fn(logits)
        return loss.sum(), (loss, logits)

    gradient, (loss, logits) = jax.grad(total, has_aux=True)(images)
    return loss, logits, gradient


def clip_pixels(images: jax.Array) -> jax.Array:
    """Clipped to [0, 1]."""
    return jnp.clip(images, 0, 1)


def project_linf(perturbed: jax.Array, images: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """The nearest point to `perturbed` within +-`epsilon` of `images` and within [0, 1].

    All of shape [B, H, W, C]. Clipping to the ball and then to [0, 1] is exact, because both are
    boxes and `images` lies in both.
    """
    return clip_pixels(images + jnp.clip(perturbed - images, -epsilon, epsilon))


def project_l2(perturbed: jax.Array, images: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """A point within the Euclidean distance `epsilon` of `images` and within [0, 1].

    The difference is shortened to `epsilon`, then pixels are clipped to [0, 1], which brings them
    closer still: in both sets, though not always the nearest such point (as in AutoAttack's code).
    """
    delta = perturbed - images
    length = expand(l2_norm(delta))
    return clip_pixels(images + delta * jnp.minimum(1, epsilon / jnp.maximum(length, _SMALLEST_NORM)))


def project(perturbed: jax.Array, images: jax.Array, epsilon: float | jax.Array, norm: str) -> jax.Array:
    """`project_linf` or `project_l2`."""
    return {'linf': project_linf, 'l2': project_l2}[norm](perturbed, images, epsilon)


def l2_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm of every example, [B]; its gradient is not used."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def norm_of(x: jax.Array, norm: str) -> jax.Array:
    """Norm of every example, [B]: 'linf' or 'l2'."""
    return l2_norm(x) if norm == 'l2' else jnp.abs(x).max(axis=tuple(range(1, x.ndim)))


def steepest(gradient: jax.Array, norm: str) -> jax.Array:
    """The direction of steepest ascent of length 1: the sign, or the gradient over its norm."""
    if norm == 'linf':
        return jnp.sign(gradient)
    return gradient / jnp.maximum(expand(l2_norm(gradient)), _SMALLEST_NORM)


def expand(per_example: jax.Array, ndim: int = 4) -> jax.Array:
    """[B] -> [B, 1, 1, 1], to be combined with images."""
    return per_example.reshape(per_example.shape + (1,) * (ndim - 1))


def choose(condition: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """Per example (condition bool [B]) `yes` or `no`, arrays [B, ...]."""
    return jnp.where(expand(condition, yes.ndim), yes, no)


def at_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[i, labels[i]], [B]."""
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def example_keys(rng: jax.Array, batch: int) -> jax.Array:
    """One PRNG key an example, [batch].

    Args:
      rng: a key, split by the example's place in the batch, or already one key an example.

    Raises:
      ValueError: another number of keys.
    """
    rng = typed_key(rng)
    if rng.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(batch))
    if rng.shape != (batch,):
        raise UserError(f'rng.shape={rng.shape}: expected one key, or {batch}, one an image')
    return rng


def typed_key(rng: jax.Array) -> jax.Array:
    """A key of `jax.random.key`, from one of `jax.random.PRNGKey` too."""
    return rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(rng)


def fold_in(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """`jax.random.fold_in` of every key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def uniform_start(rng: jax.Array, images: jax.Array, epsilon: float | jax.Array, norm: str = 'linf') -> jax.Array:
    """Start noise, uniform in the ball of radius `epsilon`: shape and dtype of `images`.

    Args:
      rng: see `example_keys`.
    """
    keys = example_keys(rng, images.shape[0])
    shape, dtype = images.shape[1:], images.dtype
    if norm == 'linf':
        return jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, -1, 1))(keys) * epsilon
    return jax.vmap(lambda key: jax.random.ball(key, images[0].size, dtype=dtype).reshape(shape))(keys) * epsilon


def unrolls(copies: int) -> bool:
    """Whether a loop over `copies` passes of the network is written out in full.

    XLA:CPU runs a convolution inside a while loop 2 to 15 times slower than outside it: 2 times on
    five steps of a ResNet-18, 15 times on twenty of 17 convolutions of 32 channels (2 cores, jax
    0.10.2). Written out they cost compile time (that net: 0.2 s a copy): hence the limit. Other
    backends get the loop, which compiles in a moment.
    """
    return jax.default_backend() == 'cpu' and copies <= UNROLLED_COPIES


def repeat(count: int, body: Callable, start, copies: int | None = None):
    """`fori_loop(0, count, body, start)`, written out where that is faster.

    Args:
      copies: passes of the network in all `count` turns (default `count`).
    """
    if count == 1:  # a loop of one turn stays a loop, whatever `unroll` says
        return body(0, start)
    return jax.lax.fori_loop(0, count, body, start, unroll=unrolls(count if copies is None else copies))


def checked_batch(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as JAX arrays of a good shape and dtype; images as constants to differentiation.

    Raises:
      ValueError: images that are not float [B, H, W, C], labels that are not int [B].
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if images.ndim != 4:
        raise UserError(f'images.shape={images.shape}: expected [B, H, W, C]')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f'images.dtype={images.dtype}: expected floating pixels in [0, 1]')
    check_classes(labels, images.shape[0], 'labels')
    # Adversarial training must not differentiate through the attack.
    return jax.lax.stop_gradient(images), labels


def to_host(array: jax.Array) -> np.ndarray:
    """A NumPy copy, whole in every process where the array lies on the devices of many."""
    if getattr(array, 'is_fully_addressable', True):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def check_classes(classes: jax.Array, batch: int, name: str) -> None:
    """Raises ValueError unless `classes` (labels, targets) is int [batch]."""
    if classes.shape != (batch,):
        raise UserError(f'{name}.shape={classes.shape}: expected {(batch,)}, one an image')
    if not jnp.issubdtype(classes.dtype, jnp.integer):
        raise UserError(f'{name}.dtype={classes.dtype}: expected integers')


def check_loss(loss: str) -> None:
    """Raises ValueError for a loss that is not among `LOSSES`."""
    if loss not in LOSSES:
        raise UserError(f'loss={loss!r}: expected one of {", ".join(LOSSES)}')


def check_ball(epsilon: float | jax.Array, norm: str) -> None:
    """Raises ValueError for an unknown norm or an impossible radius (a traced one is not looked at)."""
    if norm not in NORMS:
        raise UserError(f'norm={norm!r}: expected one of {", ".join(NORMS)}')
    largest = 1 if norm == 'linf' else float('inf')
    if isinstance(epsilon, numbers.Real) and not 0 <= epsilon <= largest:
        words = '0 to 1, in units of [0, 1] (8/255, not 8)' if norm == 'linf' else '0 or more'
        raise UserError(f'epsilon={epsilon}: expected {words}')


def check_count(value: int, name: str) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, numbers.Integral) or value < 1:
        raise UserError(f'{name}={value}: expected an integer of at least 1')


def _is_label(logits, labels):
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)


def _best_other(logits, labels):
    return jnp.max(jnp.where(_is_label(logits, labels), -jnp.inf, logits), axis=-1)


def _checked_logits(logits, labels, classes):
    if logits.ndim != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < classes:
        raise UserError(f'logits.shape={logits.shape}: expected [{labels.shape[0]}, K] with K at least {classes}')
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
