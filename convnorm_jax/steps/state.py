"""The state of a training run, its optimizer, and the average of its parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from convnorm_jax.errors import UserError

OPTIMIZERS = ('sgd', 'adam', 'adamw')

Params = Any  # a tree of arrays
Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


@struct.dataclass
class TrainState:
    """Everything that a step reads and writes: a frozen pytree.

    Attributes:
      step: int32 scalar, batches done.
      params: the model's parameters.
      model_state: every other collection, e.g. {'batch_stats': ...}.
      opt_state: state of the optimizer (optax).
      rng: key data of the run; randomness is `fold_in(rng, step)`, so `rng` never changes.
      ema: exponential moving average of `params`, see `average`, or None.
      ema_state: every other collection, computed with the averaged parameters (not an average of `model_state`),
        or None.
      perturbation: float32 [B, H, W, C], what Free training carries over from batch to batch, or None.
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
    def eval_variables(self) -> dict[str, Any]:
        """Variables to evaluate: the averaged parameters with their own statistics if there are any.

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


def create_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    input_shape: Sequence[int],
    seed: int,
    *,
    use_ema: bool = False,
    carried_batch: int = 0,
) -> TrainState:
    """Initializes a state; jittable.

    >>> from convnorm_jax.models import create_model
    >>> model = create_model('simple_cnn', num_classes=10, layer='convnorm')
    >>> tx = make_optimizer('sgd', 0.1)
    >>> state = jax.eval_shape(lambda: create_state(model, tx, input_shape=(32, 32, 3), seed=0))
    >>> sorted(state.model_state), state.step.dtype
    (['batch_stats'], dtype('int32'))

    Args:
      model: a Linen module called as `model.apply(variables, images, train=...)`.
      tx: the optimizer.
      input_shape: [H, W, C] of an image.
      seed: of the initial values and of the run's random numbers.
      use_ema: keep an average of the parameters, and statistics for it.
      carried_batch: keep the perturbations of this many images from batch to batch; 0 for none.

    Returns:
      The state before the first step.
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


def unshared(tree: Any) -> Any:
    """Copies an array that occurs in a tree more than once, so that the tree can be donated outside `jit` too."""
    seen: set[int] = set()

    def own(leaf: jax.Array) -> jax.Array:
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def average(old: Any, new: Any, decay: float, updates: int | jax.Array) -> Any:
    r"""Exponential moving average after one more update.

    .. math::
        \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \qquad
        d = \min\left(\text{decay},\ \frac{1 + \text{updates}}{10 + \text{updates}}\right)

    The average reaches back by at most about the last tenth of the run so far. So the initial values are soon
    forgotten, and a decay that is too long for a short run does no harm.

    Args:
      old: tree of arrays, the average.
      new: tree of arrays.
      decay: share of the old average that an update keeps in the long run.
      updates: int or traced integer, updates before this one.

    Returns:
      The tree, with the dtypes of `old`.
    """
    # 1 - d, computed without cancellation: 1 - 0.9999 in float32 has a relative error of a thousandth.
    weight = jnp.maximum(1 - decay, 9 / (10 + jnp.asarray(updates, jnp.float32)))
    return jax.tree.map(lambda a, b: (weight * b + (1 - weight) * a).astype(a.dtype), old, new)


def without_counts(model_state: Any) -> Any:
    """Sets ConvNorm's update counts to 0, so that the next update replaces the running spectrum by the current one.

    The published schedule averages the spectrum over up to a hundred updates. That is not needed for averaged
    parameters: they move slowly, and their spectrum follows from them exactly.
    """
    spectrum, count = (jax.tree_util.DictKey(name) for name in ('preconditioner', 'count'))
    layers = {path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(model_state) if path[-1] == spectrum}
    reset = lambda path, leaf: jnp.zeros_like(leaf) if path[-1] == count and path[:-1] in layers else leaf
    return jax.tree_util.tree_map_with_path(reset, model_state)


def make_optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Makes an optimizer with PyTorch's meaning of weight decay.

    'sgd' and 'adam' add weight decay to the gradient before momentum, as the published code does; 'adamw' is
    optax's. All decay every parameter except the shift of the shifted ReLU.

    Args:
      name: one of `OPTIMIZERS`.
      learning_rate: float, or a schedule step -> float.
      momentum: of SGD; of Adam the first beta.
      beta2: the second beta of Adam.
      weight_decay: factor of the parameters that is added to the gradient.

    Returns:
      An optax transformation.

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


def _decayed(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != 'shift', params)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all numbers of a tree of arrays: `optax.global_norm`, which takes twice as long to trace."""
    return jnp.sqrt(optax.tree_utils.tree_vdot(tree, tree))
