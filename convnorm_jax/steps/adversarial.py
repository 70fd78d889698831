"""Adversarial training steps, each a pure (state, batch) -> (state, metrics).

- Free: Shafahi et al. 2019 (arXiv 1904.12843), algorithm 1, and the ConvNorm paper's variant of it.
- PGD: Madry et al. 2018 (arXiv 1706.06083), section 2.1.
- Fast: Wong, Rice, Kolter 2020 (arXiv 2001.03994), algorithm 3: PGD with one step of 1.25 epsilon.
- TRADES: Zhang et al. 2019 (arXiv 1901.08573), algorithm 1.

`batch_statistics` says which statistics the attacked net uses: 'train' those of the attacked batch, as in
the training pass, 'eval' the running averages. An attack never updates the running averages; only training
passes do.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from convnorm_jax import attacks
from convnorm_jax.data.augment import normalize, to_float
from convnorm_jax.errors import UserError
from convnorm_jax.steps import classify
from convnorm_jax.steps.classify import AugmentFn, TrainStep
from convnorm_jax.steps.state import Batch, Metrics, Params, TrainState

BATCH_STATISTICS = ('train', 'eval')

# Standard deviation of the noise that TRADES starts from: at the image itself the divergence has no gradient.
_TRADES_START = 1e-3


def make_free_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    augment_fn: AugmentFn,
    epsilon: float,
    step_size: float,
    replays: int,
    carry_over: bool = False,
    ema_decay: float = 0.0,
    **loss_options: Any,
) -> TrainStep:
    r"""Makes the step of Free adversarial training (arXiv 1904.12843, algorithm 1).

    Each batch is trained on `replays` times in a row. One backward pass gives the gradients with respect to
    the parameters and to the perturbation, and both are updated:

    .. math::
        \theta &\leftarrow \text{optimizer}\left(\theta,
            \nabla_\theta\, \ell(f_\theta(\text{clip}(x + \delta, 0, 1)), y)\right) \\
        \delta &\leftarrow \text{clip}\left(\delta + \alpha\,
            \text{sign}\, \nabla_\delta\, \ell(f_\theta(\text{clip}(x + \delta, 0, 1)), y),
            -\varepsilon, \varepsilon\right)

    The clip to [0, 1] is differentiated: a clipped pixel has no gradient. The attack uses the statistics
    of its batch, because it is the training pass.

    Args:
      model: see `classify.make_train_step`.
      tx: the optimizer, called `replays` times a batch.
      mean: see `classify.make_train_step`.
      std: see `classify.make_train_step`.
      augment_fn: see `classify.make_train_step`.
      epsilon: radius, in units of pixels in [0, 1].
      step_size: alpha, in units of pixels in [0, 1].
      replays: int, at least 1.
      carry_over: a batch starts from the final perturbations of the batch before (the
        original method; the state must hold them) instead of from zero (the ConvNorm paper).
      ema_decay: see `classify.make_train_step`.
      **loss_options: see `classify.make_loss_fn`.

    Returns:
      The step; its metrics are of perturbed images, over all replays.
    """
    loss_fn = classify.make_loss_fn(model, mean=mean, std=std, **loss_options)

    def perturbed_loss(
        params: Params, perturbation: jax.Array, model_state: Any, pixels: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        return loss_fn(params, model_state, attacks.clip_pixels(pixels + perturbation), labels)

    gradient_fn = jax.value_and_grad(perturbed_loss, argnums=(0, 1), has_aux=True)

    def replay(
        state: TrainState, perturbation: jax.Array, pixels: jax.Array, labels: jax.Array, updates: jax.Array
    ) -> tuple[TrainState, jax.Array, Metrics]:
        (loss, (logits, model_state)), (grads, pixel_grads) = gradient_fn(
            state.params, perturbation, state.model_state, pixels, labels
        )
        statistics_fn = lambda params, given: perturbed_loss(params, perturbation, given, pixels, labels)[1][1]
        updated = classify.apply_gradients(state, grads, model_state, tx, ema_decay, statistics_fn, updates)
        perturbation = jnp.clip(perturbation + step_size * jnp.sign(pixel_grads), -epsilon, epsilon)
        return updated, perturbation, classify.step_metrics(loss, logits, labels, grads)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step, labels = state.step, batch['labels']
        pixels = to_float(augment_fn(jax.random.fold_in(state.rng, step), batch['images']))
        perturbation = state.perturbation if carry_over else jnp.zeros_like(pixels)
        totals: Metrics = {}
        for i in range(replays):  # unrolled: XLA:CPU runs a convolution slowly inside a loop
            state, perturbation, metrics = replay(state, perturbation, pixels, labels, replays * step + i)
            totals = jax.tree.map(jnp.add, totals, metrics) if totals else metrics
        carried = perturbation if carry_over else state.perturbation
        return dataclasses.replace(state, step=step + 1, perturbation=carried), totals

    return train_step


def make_pgd_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    augment_fn: AugmentFn,
    epsilon: float,
    step_size: float,
    steps: int,
    batch_statistics: str = 'train',
    ema_decay: float = 0.0,
    **loss_options: Any,
) -> TrainStep:
    r"""Makes the step of adversarial training on PGD examples only (arXiv 1706.06083, section 2.1).

    .. math::
        \min_\theta\ \mathbb{E}_{(x, y)} \max_{\|\delta\|_\infty \le \varepsilon} \ell(f_\theta(x + \delta), y)

    The inner maximum is approximated by `steps` of PGD from a random start.

    Args:
      model: see `classify.make_train_step`.
      tx: the optimizer.
      mean: see `classify.make_train_step`.
      std: see `classify.make_train_step`.
      augment_fn: see `classify.make_train_step`.
      epsilon: radius, in units of pixels in [0, 1].
      step_size: of the attack, in units of pixels in [0, 1].
      steps: of the attack.
      batch_statistics: one of `BATCH_STATISTICS`: the statistics of the attacked net.
      ema_decay: see `classify.make_train_step`.
      **loss_options: see `classify.make_loss_fn`.

    Returns:
      The step; its metrics are of attacked images.

    Raises:
      ValueError: unknown batch_statistics.
    """
    loss_fn = classify.make_loss_fn(model, mean=mean, std=std, **loss_options)
    attacked_logits = _make_attacked_logits(model, mean, std, batch_statistics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        augment_key, attack_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
        labels = batch['labels']
        pixels = attacks.pgd(
            functools.partial(attacked_logits, state),
            to_float(augment_fn(augment_key, batch['images'])),
            labels,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            rng=attack_key,
        )
        return classify.update(state, loss_fn, tx, ema_decay, pixels, labels)

    return train_step


def make_fast_step(model: nn.Module, tx: optax.GradientTransformation, **options: Any) -> TrainStep:
    """Makes the step of Fast adversarial training (arXiv 2001.03994, algorithm 3): PGD with one step.

    Args:
      model: see `make_pgd_step`.
      tx: the optimizer.
      **options: those of `make_pgd_step` without `steps`; `step_size` is 1.25 epsilon by default, as published.
    """
    return make_pgd_step(model, tx, steps=1, **{'step_size': 1.25 * options['epsilon'], **options})


def make_trades_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    augment_fn: AugmentFn,
    epsilon: float,
    step_size: float,
    steps: int,
    beta: float,
    batch_statistics: str = 'eval',
    ema_decay: float = 0.0,
    **loss_options: Any,
) -> TrainStep:
    r"""Makes the step of TRADES (arXiv 1901.08573, algorithm 1).

    .. math::
        \min_\theta\ \mathbb{E}_{(x, y)} \left[ \ell(f_\theta(x), y) + \beta
            \max_{\|\delta\|_\infty \le \varepsilon}
            \text{KL}\left(f_\theta(x)\ \|\ f_\theta(x + \delta)\right) \right]

    The attack maximizes the divergence by PGD, from Gaussian noise of standard deviation 0.001 around the image.
    The clean and the attacked pass use the statistics of their own batch, and update the running averages in turn.

    Args:
      model: see `classify.make_train_step`.
      tx: the optimizer.
      mean: see `classify.make_train_step`.
      std: see `classify.make_train_step`.
      augment_fn: see `classify.make_train_step`.
      epsilon: see `make_pgd_step`.
      step_size: see `make_pgd_step`.
      steps: see `make_pgd_step`.
      beta: weight of the divergence, 1 / lambda in the paper.
      batch_statistics: see `make_pgd_step`.
      ema_decay: see `classify.make_train_step`.
      **loss_options: see `classify.make_loss_fn`.

    Returns:
      The step; its 'accuracy' is of clean images, its 'loss' the sum.

    Raises:
      ValueError: unknown batch_statistics.
    """
    loss_fn = classify.make_loss_fn(model, mean=mean, std=std, **loss_options)
    attacked_logits = _make_attacked_logits(model, mean, std, batch_statistics)

    def trades_loss(
        params: Params, model_state: Any, pixels: jax.Array, attacked: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        loss, (clean, model_state) = loss_fn(params, model_state, pixels, labels)
        logits, model_state = classify.train_logits(model, params, model_state, normalize(attacked, mean, std))
        return loss + beta * divergence(clean, logits).mean(), (clean, model_state)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        augment_key, attack_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
        labels = batch['labels']
        pixels = to_float(augment_fn(augment_key, batch['images']))
        logits_fn = functools.partial(attacked_logits, state)
        clean = jax.lax.stop_gradient(logits_fn(pixels))
        attacked = attacks.pgd(
            logits_fn,
            pixels,
            labels,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            init=_TRADES_START * jax.random.normal(attack_key, pixels.shape),
            loss=functools.partial(divergence, clean),
        )
        return classify.update(state, trades_loss, tx, ema_decay, pixels, attacked, labels)

    return train_step


def divergence(clean: jax.Array, attacked: jax.Array) -> jax.Array:
    """KL(softmax(clean) || softmax(attacked)) of each example, float32 [B], of logits [B, K].

    >>> divergence(jnp.zeros((2, 10)), jnp.zeros((2, 10)))
    Array([0., 0.], dtype=float32)
    """
    log_clean, log_attacked = jax.nn.log_softmax(clean), jax.nn.log_softmax(attacked)
    return jnp.sum(jnp.exp(log_clean) * (log_clean - log_attacked), axis=-1)


def _make_attacked_logits(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], batch_statistics: str
) -> Callable[[TrainState, jax.Array], jax.Array]:
    """(state, pixels) -> logits, with the statistics that the attack uses."""
    if batch_statistics not in BATCH_STATISTICS:
        raise UserError(f'batch_statistics={batch_statistics!r}: expected one of {BATCH_STATISTICS}')

    def attacked_logits(state: TrainState, pixels: jax.Array) -> jax.Array:
        images = normalize(pixels, mean, std)
        if batch_statistics == 'eval':
            logits: Any = model.apply({'params': state.params, **state.model_state}, images, train=False)
            return logits
        return classify.train_logits(model, state.params, state.model_state, images)[0]

    return attacked_logits
