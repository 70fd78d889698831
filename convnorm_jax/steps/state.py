"""The state of a training run, and its optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

OPTIMIZERS = ('sgd', 'adam', 'adamw')


@struct.dataclass
class TrainState:
    """All that a step reads and writes; a frozen pytree.

    Attributes:
      step: int32 scalar, batches done.
      params: the model's parameters.
      model_state: every other collection, e.g. {'batch_stats': ...}.
      opt_state: optax's.
      rng: key data of the run; randomness is `fold_in(rng, step)`, so it never changes.
      ema: exponential moving average of `params`, or None.
      perturbation: float32 [B, H, W, C], what Free training carries from batch to batch, or None.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    rng: jax.Array
    ema: Any = None
    perturbation: Any = None

    @property
    def eval_variables(self):
        """Variables to evaluate: the averaged parameters where there are any."""
        return {'params': self.params if self.ema is None else self.ema, **self.model_state}


def create_state(model, tx, input_shape, seed, *, use_ema=False, carried_batch=0):
    """A fresh state; jittable.

    Args:
      model: a Linen module called as `model.apply(variables, images, train=...)`.
      tx: an optax transformation.
      input_shape: [H, W, C] of a picture.
      seed: int.
      use_ema: keep an average of the parameters.
      carried_batch: keep perturbations of so many pictures from batch to batch; 0 for none.
    """
    init_key, rng = jax.random.split(jax.random.PRNGKey(seed))
    variables = dict(model.init(init_key, jnp.zeros((1, *input_shape), jnp.float32), train=False))
    params = variables.pop('params')
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables,
        opt_state=tx.init(params),
        rng=rng,
        ema=params if use_ema else None,
        perturbation=jnp.zeros((carried_batch, *input_shape), jnp.float32) if carried_batch else None,
    )


def make_optimizer(name, learning_rate, *, momentum=0.9, beta2=0.999, weight_decay=0.0):
    """Optimizer with PyTorch's meaning of weight decay.

    'sgd' adds weight decay to the gradient before momentum, on every parameter but the
    shifted ReLU's shift, as the published code does, and so does 'adam'. 'adamw' is optax's,
    decaying the same parameters.

    Args:
      name: one of `OPTIMIZERS`.
      learning_rate: float or schedule step -> float.
      momentum: Adam's first beta; beta2: its second.

    Raises:
      ValueError: another name.
    """
    decay = optax.add_decayed_weights(weight_decay, mask=_decayed)
    if name == 'sgd':
        return optax.chain(decay, optax.sgd(learning_rate, momentum=momentum or None))
    if name == 'adam':
        return optax.chain(decay, optax.adam(learning_rate, b1=momentum, b2=beta2))
    if name == 'adamw':
        return optax.adamw(learning_rate, b1=momentum, b2=beta2, weight_decay=weight_decay, mask=_decayed)
    raise ValueError(f'optimizer.name={name!r}: expected one of {OPTIMIZERS}')


def _decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != 'shift', params)


def global_norm(tree):
    """Euclidean norm of all the numbers of a tree of arrays: `optax.global_norm`, half as long to trace."""
    return jnp.sqrt(optax.tree_utils.tree_vdot(tree, tree))
