"""Classification: the net's logits of pixels, the clean training step, the evaluation step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from convnorm_jax.attacks.loops import repeat
from convnorm_jax.attacks.losses import correct
from convnorm_jax.data.augment import normalize, to_float
from convnorm_jax.steps.state import Batch, Metrics, Params, TrainState, average, global_norm, without_counts

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
LossFn = Callable[..., tuple[jax.Array, tuple[jax.Array, Any]]]  # see `update`
AugmentFn = Callable[[jax.Array, jax.Array], jax.Array]  # (key, uint8 images) -> uint8 images


def make_logits_fn(
    model: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any, jax.Array], jax.Array]:
    """Makes the function that attacks and evaluations see: a net of pixels with its running statistics.

    Args:
      model: a Linen classifier of normalized images.
      mean: of each channel, of pixels in [0, 1].
      std: of each channel, of pixels in [0, 1].

    Returns:
      A function (variables, pixels) -> float32 logits [B, K]; pixels float [B, H, W, C] in [0, 1].
    """

    def logits_fn(variables: Any, pixels: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, normalize(pixels, mean, std), train=False)
        return logits

    return logits_fn


def make_loss_fn(
    model: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    label_smoothing: float = 0.0,
    penalty_fn: Callable[[Params], jax.Array] | None = None,
) -> LossFn:
    """Makes the training loss of a batch of pixels, with batch statistics.

    Args:
      model: a Linen classifier of normalized images.
      mean: of each channel, of pixels in [0, 1].
      std: of each channel, of pixels in [0, 1].
      label_smoothing: share of the target that is spread evenly over all classes.
      penalty_fn: params -> scalar added to the loss, or None.

    Returns:
      A function (params, model_state, pixels, labels) -> (loss, (logits [B, K], new model_state)).
    """

    def loss_fn(
        params: Params, model_state: Any, pixels: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, model_state = train_logits(model, params, model_state, normalize(pixels, mean, std))
        loss = classification_loss(logits, labels, label_smoothing).mean()
        return loss + (penalty_fn(params) if penalty_fn else 0), (logits, model_state)

    return loss_fn


def train_logits(model: nn.Module, params: Params, model_state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    """(logits, new model_state) of normalized images in training mode, with batch statistics."""
    logits, model_state = model.apply({'params': params, **model_state}, images, train=True, mutable=list(model_state))
    return logits, model_state


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    augment_fn: AugmentFn,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    penalty_fn: Callable[[Params], jax.Array] | None = None,
    microbatches: int = 1,
) -> TrainStep:
    """Makes the clean training step.

    >>> from convnorm_jax.models import create_model
    >>> from convnorm_jax.steps.state import create_state, make_optimizer
    >>> model, tx = create_model('simple_cnn', num_classes=10, layer='convnorm'), make_optimizer('sgd', 0.1)
    >>> state = jax.eval_shape(lambda: create_state(model, tx, input_shape=(32, 32, 3), seed=0))
    >>> step = make_train_step(model, tx, mean=(0.5,) * 3, std=(0.2,) * 3, augment_fn=lambda key, images: images)
    >>> batch = {'images': jnp.zeros((4, 32, 32, 3), jnp.uint8), 'labels': jnp.zeros(4, int)}
    >>> state, metrics = jax.eval_shape(step, state, batch)  # jax.jit(step) runs it
    >>> sorted(metrics)
    ['accuracy', 'gradient_norm', 'loss']

    Args:
      model: a Linen classifier of normalized images.
      tx: the optimizer.
      mean: of each channel, of pixels in [0, 1].
      std: of each channel, of pixels in [0, 1].
      augment_fn: (key, uint8 images) -> uint8 images.
      label_smoothing: see `make_loss_fn`.
      ema_decay: share of the old average that an update keeps, see `state.average`; unused if the state has none.
        If it has one, a step takes one more forward pass with the averaged parameters, for their statistics.
      penalty_fn: see `make_loss_fn`.
      microbatches: parts into which the batch is divided, processed one after another to save memory. Gradients
        are averaged. Each part has batch statistics of its own, and they update the running averages in turn.

    Returns:
      A pure function (state, batch) -> (state, metrics). batch: 'images' uint8 [B, H, W, C]
      and 'labels' int [B]. metrics: (sum, count) pairs of float32 scalars for 'loss',
      'accuracy' and 'gradient_norm'.
    """
    loss_fn = make_loss_fn(model, mean=mean, std=std, label_smoothing=label_smoothing, penalty_fn=penalty_fn)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        pixels = to_float(augment_fn(key, batch['images']))
        if microbatches == 1:
            return update(state, loss_fn, tx, ema_decay, pixels, batch['labels'])
        return _update_in_parts(state, loss_fn, tx, ema_decay, microbatches, pixels, batch['labels'])

    return train_step


def _update_in_parts(
    state: TrainState,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
    microbatches: int,
    pixels: jax.Array,
    labels: jax.Array,
) -> tuple[TrainState, Metrics]:
    """The same as `update`, with the batch divided into parts."""
    # Strided parts: each of them is spread over all devices, as the batch is.
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


def update(
    state: TrainState, loss_fn: LossFn, tx: optax.GradientTransformation, ema_decay: float, *inputs: jax.Array
) -> tuple[TrainState, Metrics]:
    """Makes one update of the optimizer.

    Args:
      state: the state before.
      loss_fn: function ``(params, model_state, *inputs)`` -> (loss, (logits [B, K], new model_state)).
      tx: the optimizer.
      ema_decay: see `make_train_step`.
      *inputs: of the loss; the last are the labels, int [B].

    Returns:
      (state, metrics), as of a step.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, model_state)), grads = value_and_grad(state.params, state.model_state, *inputs)
    statistics_fn = lambda params, model_state: loss_fn(params, model_state, *inputs)[1][1]
    state = apply_gradients(state, grads, model_state, tx, ema_decay, statistics_fn)
    return state, step_metrics(loss, logits, inputs[-1], grads)


def step_metrics(loss: jax.Array, logits: jax.Array, labels: jax.Array, grads: Params) -> Metrics:
    """(sum, count) pairs of one update: 'loss', 'accuracy' and 'gradient_norm', float32 scalars.

    Logits that are not finite count as wrong.
    """
    count = jnp.float32(labels.shape[0])
    return {
        'loss': (loss * count, count),
        'accuracy': (jnp.sum(correct(logits, labels)).astype(jnp.float32), count),
        'gradient_norm': (global_norm(grads), jnp.float32(1)),
    }


def classification_loss(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each example, float32 [B]."""
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def apply_gradients(
    state: TrainState,
    grads: Params,
    model_state: Any,
    tx: optax.GradientTransformation,
    ema_decay: float,
    statistics_fn: Callable[[Params, Any], Any],
    updates: jax.Array | None = None,
) -> TrainState:
    """The state after one update of the optimizer.

    Args:
      state: the state before.
      grads: of the loss with respect to the parameters.
      model_state: the new one.
      tx: the optimizer.
      ema_decay: see `make_train_step`.
      statistics_fn: (params, model_state) -> the new model_state of a training pass over this batch.
      updates: updates of the optimizer before this one; None means one per step.
    """
    changes, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    updated = dataclasses.replace(
        state, step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state
    )
    if state.ema is None:
        return updated
    ema = average(state.ema, params, ema_decay, state.step if updates is None else updates)
    return dataclasses.replace(updated, ema=ema, ema_state=statistics_fn(ema, without_counts(state.ema_state)))


def make_statistics_step(
    model: nn.Module, *, mean: Sequence[float], std: Sequence[float], augment_fn: AugmentFn
) -> Callable[[Params, Any, jax.Array, jax.Array], Any]:
    """Makes a step that estimates the statistics of given parameters, as `torch.optim.swa_utils.update_bn` does.

    Args:
      model: see `make_train_step`.
      mean: see `make_train_step`.
      std: see `make_train_step`.
      augment_fn: see `make_train_step`.

    Returns:
      A pure function (params, model_state, key, images uint8 [B, H, W, C]) -> model_state. Call it with about a
      hundred batches in turn, each time with the model_state of the call before: the first one is then forgotten.
    """

    def statistics_step(params: Params, model_state: Any, key: jax.Array, images: jax.Array) -> Any:
        images = normalize(to_float(augment_fn(key, images)), mean, std)
        return train_logits(model, params, without_counts(model_state), images)[1]

    return statistics_step


def make_eval_step(logits_fn: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, Batch], Metrics]:
    """Makes the evaluation step.

    Args:
      logits_fn: see `make_logits_fn`.

    Returns:
      A pure function (variables, batch) -> metrics, as of `make_train_step`, for 'loss' and
      'accuracy'; batch also has 'mask' float32 [B], 0 for padding, which does not count.
    """

    def eval_step(variables: Any, batch: Batch) -> Metrics:
        logits = logits_fn(variables, to_float(batch['images']))
        mask, labels = batch['mask'], batch['labels']
        loss = classification_loss(logits, labels)
        count = mask.sum()
        # jnp.where, not a product: NaN from padding must not reach the sum.
        right = jnp.where(correct(logits, labels), mask, 0).sum()
        return {'loss': (jnp.where(mask > 0, loss, 0).sum(), count), 'accuracy': (right, count)}

    return eval_step
