"""Balls around images: norms, projections, directions of steepest ascent, random starts.

`epsilon` and step sizes are in the units of the pixels: 8/255, not 8; each is one number, or one per image, [B].

Norms are computed in float32 or wider, whatever the dtype of the images: squares of small float16 numbers underflow,
sums of large ones overflow.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from convnorm_jax.attacks.inputs import example_keys, per_image

_SMALLEST_NORM = 1e-12


def clip_pixels(images: jax.Array) -> jax.Array:
    """Clipped to [0, 1]."""
    return jnp.clip(images, 0, 1)


def project_linf(perturbed: jax.Array, images: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """The nearest point to `perturbed` within +-`epsilon` of `images` and within [0, 1].

    Both of shape [B, H, W, C], `epsilon` one number, or one per image, [B]. Clipping to the ball and
    then to [0, 1] is exact, because both are boxes and `images` lies in both.
    """
    epsilon = per_image(epsilon, images, 'epsilon')
    return clip_pixels(images + jnp.clip(perturbed - images, -epsilon, epsilon))


def project_l2(perturbed: jax.Array, images: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """A point within the Euclidean distance `epsilon` of `images` and within [0, 1].

    Arguments as `project_linf`'s. The difference is scaled to length `epsilon`, then pixels are
    clipped to [0, 1], which shortens it further: the result is in both sets, though not always the nearest such point
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


def wide_dtype(x: jax.Array) -> Any:
    """The dtype that norms of `x` are computed in: float32, or its own if that is wider."""
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

    NaN counts as 0.
    """
    if norm == 'linf':
        return jnp.where(jnp.isnan(gradient), 0, jnp.sign(gradient))
    return unit(finite(gradient), norm).astype(gradient.dtype)


def finite(x: jax.Array) -> jax.Array:
    """In float32 or wider: NaN becomes 0, infinities become very large numbers."""
    x = wide(x)
    largest = float(jnp.finfo(x.dtype).max) / 4  # its reciprocal does not underflow
    return jnp.where(jnp.isnan(x), 0, jnp.clip(x, -largest, largest))


def expand(per_example: jax.Array, ndim: int = 4) -> jax.Array:
    """[B] -> [B, 1, 1, 1], which broadcasts with images."""
    return per_example.reshape(per_example.shape + (1,) * (ndim - 1))


def choose(condition: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """Per example (condition bool [B]) `yes` or `no`, arrays [B, ...]."""
    return jnp.where(expand(condition, yes.ndim), yes, no)


def uniform_start(rng: jax.Array, images: jax.Array, epsilon: float | jax.Array, norm: str = 'linf') -> jax.Array:
    """Start noise, uniform in the ball of radius `epsilon`: shape and dtype of `images`.

    Args:
      rng: see `example_keys`.
      epsilon: one radius, or one per image, [B].
    """
    shape, dtype = images.shape[1:], wide_dtype(images)
    if norm == 'linf':
        draw = lambda key: jax.random.uniform(key, shape, dtype, -1, 1)
    else:
        draw = lambda key: jax.random.ball(key, math.prod(shape), dtype=dtype).reshape(shape)
    noise = jax.vmap(draw)(example_keys(rng, images.shape[0]))
    return noise.astype(images.dtype) * per_image(epsilon, images, 'epsilon')


def _scaled(x):
    """(x in float32 or wider divided by its largest entry, that entry [B]), per example: squares do not underflow."""
    x = wide(x)
    largest = jnp.abs(x).max(axis=tuple(range(1, x.ndim)))
    scale = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    return x / expand(scale, x.ndim), scale


def _length(x):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))
