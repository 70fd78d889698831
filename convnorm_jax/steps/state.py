"""The state of a training run, and its optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from convnorm_jax.errors import UserError

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
      ema: exponential moving average of `params`, see `average`, or None.
      ema_state: every other collection, as the averaged parameters make it (not an average of `model_state`), or None.
      perturbation: float32 [B, H, W, C], what Free training carries from batch to batch, or None.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    rng: jax.Array
    ema: Any = None
    ema_state: Any = None
    perturbation: Any = None

    @property
    def eval_variables(self):
        """Variables to evaluate: the averaged parameters, with their own statistics, where there are any.

        Raises:
          ValueError: an average without statistics of its own.
        """
        if self.ema is None:
            return {'params': self.params, **self.model_state}
        if self.ema_state is None:
            raise UserError(
                'TrainState.ema without ema_state: the statistics of the raw parameters do not fit the averaged ones; '
                'start from create_state(use_ema=True), or estimate them with classify.make_statistics_step'
            )
        return {'params': self.ema, **self.ema_state}


def create_state(model, tx, input_shape, seed, *, use_ema=False, carried_batch=0):
    """A fresh state; jittable.

    Args:
      model: a Linen module called as `model.apply(variables, images, train=...)`.
      tx: an optax transformation.
      input_shape: [H, W, C] of a picture.
      seed: int.
      use_ema: keep an average of the parameters, and statistics for it.
      carried_batch: keep perturbations of so many pictures from batch to batch; 0 for none.
    """
    init_key, rng = jax.random.split(jax.random.PRNGKey(seed))
    variables = dict(model.init(init_key, jnp.zeros((1, *input_shape), jnp.float32), train=False))
    params = variables.pop('params')
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables,
        opt_state=tx.init(params),
        rng=rng,
        ema=params if use_ema else None,
        ema_state=variables if use_ema else None,
        perturbation=jnp.zeros((carried_batch, *input_shape), jnp.float32) if carried_batch else None,
    )
    return unshared(state)


def unshared(tree):
    """The tree, an array that is in it more than once copied, so that it can be donated outside `jit` too."""
    seen = set()

    def own(leaf):
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def average(old, new, decay, updates):
    """An exponential moving average after one more update.

    The old average keeps the share min(decay, (1 + updates) / (10 + updates)): it never reaches back further than
    about the last tenth of the run so far. So the initial values are soon forgotten, and a decay that is long for a
    short run does no harm.

    Args:
      old, new: trees of arrays.
      decay: share of the old average that an update keeps in the long run.
      updates: int or traced integer, updates before this one.

    Returns:
      The tree, with the dtypes of `old`.
    """
    # 1 minus the share above: 1 - 0.9999 in float32 would be off by a thousandth.
    weight = jnp.maximum(1 - decay, 9 / (10 + jnp.asarray(updates, jnp.float32)))
    return jax.tree.map(lambda a, b: (weight * b + (1 - weight) * a).astype(a.dtype), old, new)


def without_counts(model_state):
    """The collections with ConvNorm's update counts at 0: the next update makes the running spectrum the current one.

    The published schedule averages the spectrum over up to a hundred updates. Averaged parameters move slowly, and
    their spectrum follows from them exactly.
    """
    spectrum, count = (jax.tree_util.DictKey(name) for name in ('preconditioner', 'count'))
    layers = {path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(model_state) if path[-1] == spectrum}
    reset = lambda path, leaf: jnp.zeros_like(leaf) if path[-1] == count and path[:-1] in layers else leaf
    return jax.tree_util.tree_map_with_path(reset, model_state)


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
    raise UserError(f'optimizer.name={name!r}: expected one of {OPTIMIZERS}')


def _decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != 'shift', params)


def global_norm(tree):
    """Euclidean norm of all the numbers of a tree of arrays: `optax.global_norm`, half as long to trace."""
    return jnp.sqrt(optax.tree_utils.tree_vdot(tree, tree))
