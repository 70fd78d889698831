"""The arguments of attacks: checks, radii, random keys.

Shapes and dtypes are checked when a function is called or traced, and so are the values of concrete arrays: once,
before the attack, which waits only for the images to be computed. The values of a traced array (under `jit`) cannot be
checked. There an image whose pixels, label or target are out of range becomes NaN, and so does everything that is
computed from it: it cannot be mistaken for a result. That costs one comparison of the pixels per attack and no
synchronization.
"""

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError

LogitsFn = Callable[[jax.Array], jax.Array]
Array = jax.Array | np.ndarray

LOSSES = ('cross_entropy', 'margin', 'dlr')
NORMS = ('linf', 'l2')

# Pixels may be so far outside of [0, 1], or two units in the last place of their dtype, by rounding.
_ROUNDING = 1e-5
_GENERATOR = 'threefry2x32'


def checked_problem(
    logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, targets: jax.Array | None = None, *, classes: int = 2
) -> tuple[jax.Array, jax.Array]:
    """Checked images and labels; see the docstring of this module.

    The network is traced once, not run, to count its classes.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K].
      images: float [B, H, W, C] in [0, 1]. labels: int [B]. targets: int [B], or [T, B], or None.
      classes: K must be at least this.

    Returns:
      (images, labels) as JAX arrays, images a constant to differentiation and clipped to [0, 1]; NaN where traced
      pixels or classes are out of range.

    Raises:
      UserError: an argument of the wrong shape, dtype or range.
    """
    known = [_low_and_high(array) for array in (images, labels, targets)]
    images, labels = checked_batch(images, labels)
    count = class_count(logits_fn, images, classes)
    valid = [_pixels_in_range(images, known[0]), _classes_in_range(labels, count, 'labels', known[1])]
    if targets is not None:
        targets = jnp.asarray(targets)
        for row in targets if targets.ndim == 2 else [targets]:
            check_classes(row, images.shape[0], 'targets')
        in_range = _classes_in_range(targets, count, 'targets', known[2])
        valid.append(in_range if in_range is None or targets.ndim == 1 else in_range.all(0))
    for flags in valid:
        if flags is not None:
            images = jnp.where(flags.reshape(-1, 1, 1, 1), images, jnp.nan)
    return jnp.clip(images, 0, 1), labels


def checked_batch(images: Array, labels: Array) -> tuple[jax.Array, jax.Array]:
    """Both as JAX arrays of checked shape and dtype; images as constants to differentiation.

    Raises:
      UserError: images that are not float [B, H, W, C], labels that are not int [B].
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if images.ndim != 4:
        raise UserError(f'images.shape={images.shape}: expected [B, H, W, C]')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f'images.dtype={images.dtype}: expected floating pixels in [0, 1]; divide those of 0 to 255 by 255'
        )
    check_classes(labels, images.shape[0], 'labels')
    # Adversarial training must not differentiate through the attack.
    return jax.lax.stop_gradient(images), labels


def checked_examples(
    images: np.ndarray, labels: np.ndarray, epsilon: float, norm: str, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(images float32 [N, H, W, C] in [0, 1], labels int32 [N]); raises UserError for what `run_ensemble` refuses."""
    images, labels = np.asarray(images), np.asarray(labels)
    checked_batch(images[:1], labels[:1])
    check_classes(labels, len(images), 'labels')
    check_ball(epsilon, norm)
    if np.ndim(epsilon) or epsilon is None:
        raise UserError(f'epsilon of shape {np.shape(epsilon)}: expected one number for all images')
    check_count(batch_size, 'batch_size')
    if not len(images):
        raise UserError('images: expected at least one')
    check_pixels(images)
    return np.clip(images, 0, 1).astype(np.float32), labels.astype(np.int32)


def class_count(logits_fn: LogitsFn, images: jax.Array | jax.ShapeDtypeStruct, at_least: int = 2) -> int:
    """K of the logits [B, K] of these images; the network is traced, not run.

    Raises:
      UserError: another shape, or fewer classes than `at_least`.
    """
    logits = jax.eval_shape(logits_fn, images)
    if not hasattr(logits, 'shape'):
        raise UserError(f'logits_fn returns a {type(logits).__name__}: expected an array of logits [B, K]')
    if len(logits.shape) != 2 or logits.shape[0] != images.shape[0] or logits.shape[1] < at_least:
        raise UserError(f'logits.shape={logits.shape}: expected [{images.shape[0]}, K] with K at least {at_least}')
    return logits.shape[1]


def check_pixels(images: np.ndarray) -> None:
    """Raises UserError unless the pixels of a concrete array are in [0, 1], up to rounding."""
    _pixels_in_range(images, _low_and_high(images))


def check_classes(classes: Array, batch: int, name: str, count: int | None = None) -> None:
    """Raises UserError unless `classes` (labels, targets) is int [batch], and, if given, below `count`."""
    if classes.shape != (batch,):
        raise UserError(f'{name}.shape={classes.shape}: expected {(batch,)}, one per image')
    if not jnp.issubdtype(classes.dtype, jnp.integer):
        raise UserError(f'{name}.dtype={classes.dtype}: expected integers')
    if count is not None:
        _classes_in_range(classes, count, name, _low_and_high(classes))


def check_loss(loss: str, classes: int | None = None) -> None:
    """Raises UserError for a loss that is not one of `LOSSES`, or that needs more classes."""
    if loss not in LOSSES:
        raise UserError(f'loss={loss!r}: expected one of {", ".join(LOSSES)}')
    if classes is not None and classes < fewest_classes(loss):
        raise UserError(f'loss={loss!r}: needs at least {fewest_classes(loss)} classes, the model has {classes}')


def fewest_classes(loss: str, targeted: bool = False) -> int:
    """The number of classes that a loss needs, at least 2."""
    return (4 if targeted else 3) if loss == 'dlr' else 2


def check_ball(epsilon: float | jax.Array | None, norm: str) -> None:
    """Raises UserError for an unknown norm or an impossible radius (a traced one is not checked)."""
    if norm not in NORMS:
        raise UserError(f'norm={norm!r}: expected one of {", ".join(NORMS)}')
    words = '0 to 1, in units of [0, 1] (8/255, not 8)' if norm == 'linf' else '0 or more'
    _check_length(epsilon, 'epsilon', norm, words, lambda values: values >= 0)


def check_step_size(step_size: float | jax.Array, norm: str) -> None:
    """Raises UserError for an impossible step size (a traced one is not checked)."""
    words = 'above 0, up to 1, in units of [0, 1] (2/255, not 2)' if norm == 'linf' else 'above 0'
    _check_length(step_size, 'step_size', norm, words, lambda values: values > 0)


def check_count(value: int, name: str) -> None:
    """Raises UserError unless `value` is an integer of at least 1."""
    if not isinstance(value, numbers.Integral) or value < 1:
        raise UserError(f'{name}={value}: expected an integer of at least 1')


def per_image(value: float | jax.Array, images: jax.Array, name: str) -> jax.Array:
    """A radius or a step size for images [B, H, W, C], in their dtype: of shape [], or [B, 1, 1, 1] if one per image.

    Raises:
      UserError: another shape, such as one value per channel.
    """
    value, batch = jnp.asarray(value, images.dtype), images.shape[0]
    if value.ndim == 0:
        return value
    if value.shape not in ((batch,), (batch, 1, 1, 1)):
        raise UserError(f'{name}.shape={value.shape}: expected a number, or {(batch,)}, one per image')
    return value.reshape(batch, 1, 1, 1)


def example_keys(rng: jax.Array, batch: int) -> jax.Array:
    """One PRNG key per example, [batch].

    Args:
      rng: a key, split by the position in the batch, or one key per example.
      batch: number of examples.

    Raises:
      UserError: no key, or another number of keys.
    """
    rng = typed_key(rng)
    if rng.ndim == 0:
        return numbered_keys(rng, jnp.arange(batch))
    if rng.shape != (batch,):
        raise UserError(f'rng.shape={rng.shape}: expected one key, or {batch}, one per image')
    return rng


def numbered_keys(rng: jax.Array, numbers: jax.Array) -> jax.Array:
    """The keys [B] of the examples with these numbers, int [B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(typed_key(rng), numbers)


def fold_in(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """`jax.random.fold_in` of every key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def typed_key(rng: jax.Array) -> jax.Array:
    """Threefry keys of any shape, from keys of any generator, of `jax.random.key` or `jax.random.PRNGKey`.

    Under `vmap`, threefry draws for each key what it draws for that key alone; 'rbg' draws depend on the batch.

    Raises:
      UserError: not a key.
    """
    if not isinstance(rng, jax.Array | np.ndarray):
        raise UserError(f'rng={rng!r}: expected a PRNG key, such as jax.random.key(0)')
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        try:
            rng = jax.random.wrap_key_data(jnp.asarray(rng))
        except (TypeError, ValueError) as error:
            given = f'rng of dtype {rng.dtype} and shape {rng.shape}'
            raise UserError(f'{given}: expected a PRNG key, such as jax.random.key(0)') from error
    if jax.random.key_impl(rng) == _GENERATOR:
        return rng
    words = jax.random.key_data(rng)
    keys = jax.random.wrap_key_data(words[..., :2], impl=_GENERATOR)
    fold = jnp.vectorize(jax.random.fold_in)
    for place in range(2, words.shape[-1]):
        keys = fold(keys, words[..., place])
    return keys


def _low_and_high(array):
    """(smallest, largest) of a concrete array, floats; None for a traced or an empty one, and for None."""
    if array is None or isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array):
        if not array.size:
            return None
        with jax.ensure_compile_time_eval():
            low, high = jax.device_get((jnp.min(array), jnp.max(array)))
    else:
        array = np.asarray(array)
        if not array.size or array.dtype.kind in 'OSUMm':
            return None
        low, high = array.min(), array.max()
    return float(low), float(high)


def _pixels_in_range(images, known):
    """Flags [B] of traced images; None for concrete ones, which are in range."""
    slack = max(_ROUNDING, 2 * float(jnp.finfo(images.dtype).eps))
    if isinstance(images, jax.core.Tracer) and known is None:
        axes = (1, 2, 3)
        return (images.min(axes) >= -slack) & (images.max(axes) <= 1 + slack)  # false for NaN
    if known is not None and not (known[0] >= -slack and known[1] <= 1 + slack):
        raise UserError(
            f'images: pixels between {known[0]:.9g} and {known[1]:.9g}, expected 0 to 1; divide those of 0 to 255 '
            'by 255, and normalize within logits_fn'
        )
    return None


def _classes_in_range(classes, count, name, known):
    """Flags of traced classes; None for concrete ones, which are in range."""
    if isinstance(classes, jax.core.Tracer) and known is None:
        return (classes >= 0) & (classes < count)
    if known is not None and not (known[0] >= 0 and known[1] < count):
        raise UserError(
            f'{name}: classes between {known[0]:.0f} and {known[1]:.0f}, expected 0 to {count - 1}: '
            f'the model has {count} classes'
        )
    return None


def _check_length(value, name, norm, words, allowed):
    if value is None or isinstance(value, jax.core.Tracer):
        return
    try:
        values = np.asarray(value, np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise UserError(f'{name}={value!r}: expected a number') from error
    wrong = values[~(allowed(values) & (values <= (1 if norm == 'linf' else np.inf)))]
    if wrong.size:
        raise UserError(f'{name}={wrong[0] if np.ndim(value) else value}: expected {words}')
