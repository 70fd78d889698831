"""What attacks are made of: losses, balls, directions, start noise, loops.

An attack sees a model only as `logits_fn`: images [B, H, W, C] with pixels in [0, 1] -> logits
[B, K]. Normalization, `train=False`, the parameters: all inside it. `epsilon` and step sizes are
in the same units as the pixels: 8/255, not 8; each is one number, or one an image, [B].

Every example has its own random numbers (`example_keys`) and its own loss (sums, not means), so
that what becomes of it depends neither on the batch it is packed in nor on the batch's size.

Lengths are computed in float32 or wider, whatever the dtype of the images: squares of small float16
numbers are zero, sums of large ones infinite.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from convnorm_jax.attacks.inputs import (  # noqa: F401 (some are for those who import from here)
    LOSSES,
    NORMS,
    LogitsFn,
    check_loss,
    example_keys,
    fewest_classes,
    fold_in,
    per_image,
)
from convnorm_jax.errors import UserError

# A program holds at most this many copies of the network (the paper runs PGD-20).
UNROLLED_COPIES = 50

_SMALLEST_NORM = 1e-12


def correct(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Whether the largest logit is that of the class, and all are finite, bool [B].

    An output that is not finite is no prediction: argmax would call NaN the class 0. JAX arrays or NumPy's.
    """
    numpy = np if isinstance(logits, np.ndarray) else jnp
    return (logits.argmax(-1) == classes) & numpy.isfinite(logits).all(-1)


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
      UserError: an unknown loss, or logits that are not [B, K] with K large enough.
    """
    check_loss(loss)
    logits = _checked_logits(logits, labels, fewest_classes(loss))
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
      UserError: as `attack_loss`.
    """
    check_loss(loss)
    logits = _checked_logits(logits, labels, fewest_classes(loss, targeted=True))
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

    Both of shape [B, H, W, C], `epsilon` one number or one an image, [B]. Clipping to the ball and
    then to [0, 1] is exact, because both are boxes and `images` lies in both.
    """
    epsilon = per_image(epsilon, images, 'epsilon')
    return clip_pixels(images + jnp.clip(perturbed - images, -epsilon, epsilon))


def project_l2(perturbed: jax.Array, images: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """A point within the Euclidean distance `epsilon` of `images` and within [0, 1].

    Arguments as `project_linf`'s. The difference is shortened to `epsilon`, then pixels are clipped
    to [0, 1], which brings them closer still: in both sets, though not always the nearest such point
    (as in AutoAttack's code).
    """
    delta, dtype = wide(perturbed - images), images.dtype
    length = expand(l2_norm(delta))
    epsilon = per_image(epsilon, images, 'epsilon').astype(delta.dtype)
    shortened = delta * jnp.minimum(1, epsilon / jnp.maximum(length, _SMALLEST_NORM))
    return clip_pixels(images + shortened.astype(dtype))


def project(perturbed: jax.Array, images: jax.Array, epsilon: float | jax.Array, norm: str) -> jax.Array:
    """`project_linf` or `project_l2`."""
    return {'linf': project_linf, 'l2': project_l2}[norm](perturbed, images, epsilon)


def wide_dtype(x: jax.Array):
    """The dtype that lengths of `x` are computed in: float32, or its own where that is wider."""
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32


def wide(x: jax.Array) -> jax.Array:
    """`x` in `wide_dtype`."""
    return jnp.asarray(x).astype(wide_dtype(x))


def l2_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm of every example, [B], in float32 or wider; its gradient is not used."""
    scaled, scale = _scaled(x)
    return scale * _length(scaled)


def norm_of(x: jax.Array, norm: str) -> jax.Array:
    """Norm of every example, [B], in float32 or wider: 'linf' or 'l2'."""
    return l2_norm(x) if norm == 'l2' else jnp.abs(wide(x)).max(axis=tuple(range(1, x.ndim)))


def unit(x: jax.Array, norm: str) -> jax.Array:
    """Every example divided by its norm, however small or large that is; zeros stay zeros."""
    scaled, _ = _scaled(x)  # its largest entry is 1
    if norm == 'l2':
        length = _length(scaled)
        scaled = scaled / expand(jnp.where(length > 0, length, 1), x.ndim)
    return scaled.astype(x.dtype)


def steepest(gradient: jax.Array, norm: str) -> jax.Array:
    """The direction of steepest ascent of length 1: the sign, or the gradient over its norm.

    NaN says nothing about the way and counts as 0.
    """
    if norm == 'linf':
        return jnp.where(jnp.isnan(gradient), 0, jnp.sign(gradient))
    return unit(finite(gradient), norm).astype(gradient.dtype)


def finite(x: jax.Array) -> jax.Array:
    """In float32 or wider: 0 in the place of NaN, very large numbers in that of infinities."""
    x = wide(x)
    largest = float(jnp.finfo(x.dtype).max) / 4  # its reciprocal does not underflow
    return jnp.where(jnp.isnan(x), 0, jnp.clip(x, -largest, largest))


def expand(per_example: jax.Array, ndim: int = 4) -> jax.Array:
    """[B] -> [B, 1, 1, 1], to be combined with images."""
    return per_example.reshape(per_example.shape + (1,) * (ndim - 1))


def choose(condition: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """Per example (condition bool [B]) `yes` or `no`, arrays [B, ...]."""
    return jnp.where(expand(condition, yes.ndim), yes, no)


def at_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[i, labels[i]], [B]."""
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def uniform_start(rng: jax.Array, images: jax.Array, epsilon: float | jax.Array, norm: str = 'linf') -> jax.Array:
    """Start noise, uniform in the ball of radius `epsilon`: shape and dtype of `images`.

    Args:
      rng: see `example_keys`.
      epsilon: one radius, or one an image, [B].
    """
    shape, dtype = images.shape[1:], wide_dtype(images)
    if norm == 'linf':
        draw = lambda key: jax.random.uniform(key, shape, dtype, -1, 1)
    else:
        draw = lambda key: jax.random.ball(key, math.prod(shape), dtype=dtype).reshape(shape)
    noise = jax.vmap(draw)(example_keys(rng, images.shape[0]))
    return noise.astype(images.dtype) * per_image(epsilon, images, 'epsilon')


def unrolls(copies: int) -> bool:
    """Whether a loop over `copies` passes of the network is written out in full where it runs on a CPU.

    XLA:CPU runs a convolution inside a while loop 2 to 15 times slower than outside it: 2 times on
    five steps of a ResNet-18, 15 times on twenty of 17 convolutions of 32 channels (2 cores, jax
    0.10.2). Written out they cost compile time (that net: 0.2 s a copy): hence the limit. Other
    backends get the loop, which compiles in a moment.
    """
    return copies <= UNROLLED_COPIES


def by_platform(copies: int, written_out: Callable, loop: Callable, *args):
    """`written_out(*args)` in a program for a CPU, if it `unrolls` so many copies; else `loop(*args)`.

    Decided when the program is lowered for its platform, not where it is traced: `jax.export` to another one is right.
    """
    if not unrolls(copies):
        return loop(*args)
    return jax.lax.platform_dependent(*args, cpu=written_out, default=loop)


def repeat(count: int, body: Callable, start, copies: int | None = None):
    """`fori_loop(0, count, body, start)`, written out where that is faster.

    Args:
      copies: passes of the network in all `count` turns (default `count`).
    """
    if count == 1:  # a loop of one turn stays a loop, whatever `unroll` says
        return body(0, start)
    body = jax.jit(body)  # traced once for both of the loops
    loops = [
        lambda carry, unroll=unroll: jax.lax.fori_loop(0, count, body, carry, unroll=unroll) for unroll in (True, False)
    ]
    return by_platform(count if copies is None else copies, *loops, start)


def to_host(array: jax.Array) -> np.ndarray:
    """A NumPy copy, whole in every process where the array lies on the devices of many."""
    if getattr(array, 'is_fully_addressable', True):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _scaled(x):
    """(x in float32 or wider over its largest entry, that entry [B]), by example: its squares do not underflow."""
    x = wide(x)
    largest = jnp.abs(x).max(axis=tuple(range(1, x.ndim)))
    scale = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    return x / expand(scale, x.ndim), scale


def _length(x):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def _is_label(logits, labels):
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)


def _best_other(logits, labels):
    return jnp.max(jnp.where(_is_label(logits, labels), -jnp.inf, logits), axis=-1)


def _checked_logits(logits, labels, classes):
    if logits.ndim != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < classes:
        raise UserError(f'logits.shape={logits.shape}: expected [{labels.shape[0]}, K] with K at least {classes}')
    return wide(logits)
