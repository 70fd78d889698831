"""Classification: logits of pixels, the clean training step, the evaluation step."""

import jax
import jax.numpy as jnp
import optax

from convnorm_jax.attacks.loops import repeat
from convnorm_jax.attacks.losses import correct
from convnorm_jax.data.augment import normalize, to_float
from convnorm_jax.steps.state import average, global_norm, without_counts


def make_logits_fn(model, mean, std):
    """The net as attacks and evaluation see it, with fixed statistics.

    Args:
      model: a Linen classifier of normalized images.
      mean, std: per channel, of pixels in [0, 1].

    Returns:
      A function (variables, pixels) -> float32 logits [B, K]; pixels float [B, H, W, C] in [0, 1].
    """

    def logits_fn(variables, pixels):
        return model.apply(variables, normalize(pixels, mean, std), train=False)

    return logits_fn


def make_loss_fn(model, *, mean, std, label_smoothing=0.0, penalty_fn=None):
    """The training loss of a batch of pixels, with batch statistics.

    Args:
      model: a Linen classifier of normalized images.
      mean, std: per channel, of pixels in [0, 1].
      label_smoothing: share of the target spread evenly over all classes.
      penalty_fn: params -> scalar added to the loss, or None.

    Returns:
      A function (params, model_state, pixels, labels) -> (loss, (logits [B, K], new model_state)).
    """

    def loss_fn(params, model_state, pixels, labels):
        logits, model_state = train_logits(model, params, model_state, normalize(pixels, mean, std))
        loss = classification_loss(logits, labels, label_smoothing).mean()
        return loss + (penalty_fn(params) if penalty_fn else 0), (logits, model_state)

    return loss_fn


def train_logits(model, params, model_state, images):
    """(logits, new model_state) of normalized images in training mode, with batch statistics."""
    return model.apply({'params': params, **model_state}, images, train=True, mutable=list(model_state))


def make_train_step(
    model, tx, *, mean, std, augment_fn, label_smoothing=0.0, ema_decay=0.0, penalty_fn=None, microbatches=1
):
    """The clean training step.

    Args:
      model, tx: Linen classifier and optax transformation.
      mean, std: per channel, of pixels in [0, 1].
      augment_fn: (key, uint8 images) -> uint8 images.
      label_smoothing, penalty_fn: see `make_loss_fn`.
      ema_decay: share of the old average that an update keeps, see `state.average`; unused if the state has none.
        Where it has one, a step takes one more forward pass, of the averaged parameters: for their statistics.
      microbatches: parts that the batch is taken in, one after another, for less memory. The gradients
        are averaged; batch statistics are those of each part, and move the running averages in turn.

    Returns:
      A pure function (state, batch) -> (state, metrics). batch: 'images' uint8 [B, H, W, C]
      and 'labels' int [B]. metrics: (sum, count) pairs of float32 scalars for 'loss',
      'accuracy' and 'gradient_norm'.
    """
    loss_fn = make_loss_fn(model, mean=mean, std=std, label_smoothing=label_smoothing, penalty_fn=penalty_fn)

    def train_step(state, batch):
        key = jax.random.fold_in(state.rng, state.step)
        pixels = to_float(augment_fn(key, batch['images']))
        if microbatches == 1:
            return update(state, loss_fn, tx, ema_decay, pixels, batch['labels'])
        return _update_in_parts(state, loss_fn, tx, ema_decay, microbatches, pixels, batch['labels'])

    return train_step


def _update_in_parts(state, loss_fn, tx, ema_decay, microbatches, pixels, labels):
    """As `update`, the batch taken in parts."""
    # Every so many-th example: so each part lies on all devices, as the batch does.
    parts = [a.reshape(-1, microbatches, *a.shape[1:]) for a in (pixels, labels)]
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    part = lambda number: [jax.lax.dynamic_index_in_dim(a, number, 1, keepdims=False) for a in parts]

    def body(number, carry):
        model_state, grads, metrics = carry
        images, classes = part(number)
        (loss, (logits, model_state)), new = value_and_grad(state.params, model_state, images, classes)
        grads = jax.tree.map(lambda total, g: total + g / microbatches, grads, new)
        found = step_metrics(loss, logits, classes, new)
        return model_state, grads, jax.tree.map(jnp.add, metrics, found)

    zeros = (jnp.float32(0), jnp.float32(0))
    start = (
        state.model_state,
        jax.tree.map(jnp.zeros_like, state.params),
        {name: zeros for name in ('loss', 'accuracy', 'gradient_norm')},
    )
    model_state, grads, metrics = repeat(microbatches, body, start)
    metrics['gradient_norm'] = (global_norm(grads), jnp.float32(1))

    def statistics_fn(params, model_state):
        def body(number, model_state):
            images, classes = part(number)
            return loss_fn(params, model_state, images, classes)[1][1]

        return repeat(microbatches, body, model_state)

    return apply_gradients(state, grads, model_state, tx, ema_decay, statistics_fn), metrics


def update(state, loss_fn, tx, ema_decay, *inputs):
    """One update of the optimizer.

    Args:
      state: a `TrainState`.
      loss_fn: function (params, model_state, *inputs) -> (loss, (logits [B, K], new model_state)).
      tx, ema_decay: see `make_train_step`.
      *inputs: of the loss; the last are the labels, int [B].

    Returns:
      (state, metrics), as a step's.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, model_state)), grads = value_and_grad(state.params, state.model_state, *inputs)
    statistics_fn = lambda params, model_state: loss_fn(params, model_state, *inputs)[1][1]
    state = apply_gradients(state, grads, model_state, tx, ema_decay, statistics_fn)
    return state, step_metrics(loss, logits, inputs[-1], grads)


def step_metrics(loss, logits, labels, grads):
    """(sum, count) pairs of one update: 'loss', 'accuracy' and 'gradient_norm', float32 scalars.

    Logits that are not finite are wrong.
    """
    count = jnp.float32(labels.shape[0])
    return {
        'loss': (loss * count, count),
        'accuracy': (jnp.sum(correct(logits, labels)).astype(jnp.float32), count),
        'gradient_norm': (global_norm(grads), jnp.float32(1)),
    }


def classification_loss(logits, labels, label_smoothing=0.0):
    """Cross-entropy of each example, float32 [B]."""
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def apply_gradients(state, grads, model_state, tx, ema_decay, statistics_fn, updates=None):
    """The state after one update of the optimizer.

    Args:
      state, grads, tx, ema_decay: see `make_train_step`.
      model_state: the new one.
      statistics_fn: (params, model_state) -> the new model_state of a training pass over this batch.
      updates: of the optimizer before this one; None is one a step.
    """
    changes, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    updated = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state)
    if state.ema is None:
        return updated
    ema = average(state.ema, params, ema_decay, state.step if updates is None else updates)
    return updated.replace(ema=ema, ema_state=statistics_fn(ema, without_counts(state.ema_state)))


def make_statistics_step(model, *, mean, std, augment_fn):
    """Estimates the statistics of parameters that were not trained with them, as `torch.optim.swa_utils.update_bn`.

    Args:
      model, mean, std, augment_fn: see `make_train_step`.

    Returns:
      A pure function (params, model_state, key, images uint8 [B, H, W, C]) -> model_state. Called with a hundred
      batches in turn, each with the model_state of the one before, it forgets the first.
    """

    def statistics_step(params, model_state, key, images):
        images = normalize(to_float(augment_fn(key, images)), mean, std)
        return train_logits(model, params, without_counts(model_state), images)[1]

    return statistics_step


def make_eval_step(logits_fn):
    """The evaluation step.

    Args:
      logits_fn: see `make_logits_fn`.

    Returns:
      A pure function (variables, batch) -> metrics, as `make_train_step`'s, of 'loss' and
      'accuracy'; batch has 'mask' float32 [B] too, 0 for filled-up examples, which do not count.
    """

    def eval_step(variables, batch):
        logits = logits_fn(variables, to_float(batch['images']))
        mask, labels = batch['mask'], batch['labels']
        loss = classification_loss(logits, labels)
        count = mask.sum()
        # where, not a product: a filled-up example that is not finite must not spread.
        right = jnp.where(correct(logits, labels), mask, 0).sum()
        return {'loss': (jnp.where(mask > 0, loss, 0).sum(), count), 'accuracy': (right, count)}

    return eval_step
