"""Adversarial training steps, each a pure (state, batch) -> (state, metrics).

Free:   Shafahi et al. 2019 (arXiv 1904.12843), algorithm 1, and the ConvNorm paper's variant of it.
PGD:    Madry et al. 2018 (arXiv 1706.06083), section 2.1.
Fast:   Wong, Rice, Kolter 2020 (arXiv 2001.03994), algorithm 3: PGD with one step of 1.25 epsilon.
TRADES: Zhang et al. 2019 (arXiv 1901.08573), algorithm 1.

What the attack sees is explicit. With `batch_statistics='train'` the layers use the statistics of
the attacked batch, as in the training pass itself; with 'eval' their running averages. Neither
moves the running averages: only the passes that train do.
"""

import functools

import jax
import jax.numpy as jnp

from convnorm_jax import attacks
from convnorm_jax.data.augment import normalize, to_float
from convnorm_jax.errors import UserError
from convnorm_jax.steps import classify

BATCH_STATISTICS = ('train', 'eval')

# TRADES starts its attack from this much Gaussian noise: at the picture itself the divergence has no gradient.
_TRADES_START = 1e-3


def make_free_step(
    model, tx, *, mean, std, augment_fn, epsilon, step_size, replays, carry_over=False, ema_decay=0.0, **loss_options
):
    """Free adversarial training: one gradient serves the weights and the perturbation.

    Every batch is trained on `replays` times in a row. Each time one backward pass gives the
    gradient by the parameters, for an update, and by the perturbation, which then moves by
    `step_size` times its sign and is clipped to +-`epsilon`. The perturbed picture is clipped
    to [0, 1] inside the graph: a clipped pixel has no gradient. The attack sees the statistics
    of its batch, because it is the training pass.

    Args:
      model, tx, mean, std, augment_fn, ema_decay: see `classify.make_train_step`. `tx` is called
        `replays` times a batch.
      epsilon, step_size: in units of pixels in [0, 1].
      replays: int, at least 1.
      carry_over: a batch starts from the perturbations that the one before ended with (the
        original method; the state must hold them) instead of from zero (the ConvNorm paper).
      **loss_options: see `classify.make_loss_fn`.

    Returns:
      The step; its metrics are of perturbed pictures, over all replays.
    """
    loss_fn = classify.make_loss_fn(model, mean=mean, std=std, **loss_options)

    def perturbed_loss(params, perturbation, model_state, pixels, labels):
        return loss_fn(params, model_state, attacks.clip_pixels(pixels + perturbation), labels)

    gradient_fn = jax.value_and_grad(perturbed_loss, argnums=(0, 1), has_aux=True)

    def replay(state, perturbation, pixels, labels, updates):
        (loss, (logits, model_state)), (grads, by_pixel) = gradient_fn(
            state.params, perturbation, state.model_state, pixels, labels
        )
        statistics_fn = lambda params, given: perturbed_loss(params, perturbation, given, pixels, labels)[1][1]
        updated = classify.apply_gradients(state, grads, model_state, tx, ema_decay, statistics_fn, updates)
        perturbation = jnp.clip(perturbation + step_size * jnp.sign(by_pixel), -epsilon, epsilon)
        return updated, perturbation, classify.step_metrics(loss, logits, labels, grads)

    def train_step(state, batch):
        step, labels = state.step, batch['labels']
        pixels = to_float(augment_fn(jax.random.fold_in(state.rng, step), batch['images']))
        perturbation = state.perturbation if carry_over else jnp.zeros_like(pixels)
        totals = None
        for i in range(replays):  # not a loop of XLA's, in which a convolution is slow on the CPU
            state, perturbation, metrics = replay(state, perturbation, pixels, labels, replays * step + i)
            totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)
        carried = perturbation if carry_over else state.perturbation
        return state.replace(step=step + 1, perturbation=carried), totals

    return train_step


def make_pgd_step(
    model,
    tx,
    *,
    mean,
    std,
    augment_fn,
    epsilon,
    step_size,
    steps,
    batch_statistics='train',
    ema_decay=0.0,
    **loss_options,
):
    """Adversarial training on PGD examples only, from a random start.

    Args:
      model, tx, mean, std, augment_fn, ema_decay: see `classify.make_train_step`.
      epsilon, step_size: in units of pixels in [0, 1]. steps: of the attack.
      batch_statistics: one of `BATCH_STATISTICS`, what the attack sees.
      **loss_options: see `classify.make_loss_fn`.

    Returns:
      The step; its metrics are of attacked pictures.
    """
    loss_fn = classify.make_loss_fn(model, mean=mean, std=std, **loss_options)
    attacked_logits = _make_attacked_logits(model, mean, std, batch_statistics)

    def train_step(state, batch):
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


def make_fast_step(model, tx, **options):
    """Fast adversarial training: `make_pgd_step` with one step, of the published 1.25 epsilon by default.

    Args:
      model, tx, **options: as `make_pgd_step`'s, without `steps`.
    """
    return make_pgd_step(model, tx, steps=1, **{'step_size': 1.25 * options['epsilon'], **options})


def make_trades_step(
    model,
    tx,
    *,
    mean,
    std,
    augment_fn,
    epsilon,
    step_size,
    steps,
    beta,
    batch_statistics='eval',
    ema_decay=0.0,
    **loss_options,
):
    """TRADES: cross-entropy of clean pictures plus `beta` times KL(clean prediction || attacked one).

    The attack drives up that divergence, from Gaussian noise of 0.001 around the picture. Both
    passes train with the statistics of their own batch, and move the running averages in turn.

    Args:
      model, tx, mean, std, augment_fn, ema_decay: see `classify.make_train_step`.
      epsilon, step_size, steps, batch_statistics: see `make_pgd_step`.
      beta: weight of the divergence, 1/lambda of the paper.
      **loss_options: see `classify.make_loss_fn`.

    Returns:
      The step; 'accuracy' is of clean pictures, 'loss' the sum.
    """
    loss_fn = classify.make_loss_fn(model, mean=mean, std=std, **loss_options)
    attacked_logits = _make_attacked_logits(model, mean, std, batch_statistics)

    def trades_loss(params, model_state, pixels, attacked, labels):
        loss, (clean, model_state) = loss_fn(params, model_state, pixels, labels)
        logits, model_state = classify.train_logits(model, params, model_state, normalize(attacked, mean, std))
        return loss + beta * divergence(clean, logits).mean(), (clean, model_state)

    def train_step(state, batch):
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


def divergence(clean, attacked):
    """KL(softmax(clean) || softmax(attacked)) of every example, float32 [B], of logits [B, K]."""
    log_clean, log_attacked = jax.nn.log_softmax(clean), jax.nn.log_softmax(attacked)
    return jnp.sum(jnp.exp(log_clean) * (log_clean - log_attacked), axis=-1)


def _make_attacked_logits(model, mean, std, batch_statistics):
    """(state, pixels) -> logits, with the statistics that the attack is to see."""
    if batch_statistics not in BATCH_STATISTICS:
        raise UserError(f'batch_statistics={batch_statistics!r}: expected one of {BATCH_STATISTICS}')

    def attacked_logits(state, pixels):
        images = normalize(pixels, mean, std)
        if batch_statistics == 'eval':
            return model.apply({'params': state.params, **state.model_state}, images, train=False)
        return classify.train_logits(model, state.params, state.model_state, images)[0]

    return attacked_logits
