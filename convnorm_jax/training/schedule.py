"""Durations and learning rates: `to_steps` converts every duration of a config."""

from collections.abc import Mapping, Sequence

import optax

from convnorm_jax.errors import UserError

SCHEDULES = ('step', 'cosine', 'linear', 'constant')


def to_steps(section: Mapping, *, steps_per_epoch: int, batch_size: int, prefix: str = '') -> int:
    """A duration in steps, from `{prefix}steps`, `{prefix}examples` or `{prefix}epochs`.

    Args:
      section: has any of those keys; the first of steps, examples and epochs that is neither absent, None nor 0
        counts.
      steps_per_epoch: of the run.
      batch_size: examples of a step.
      prefix: of the keys, such as 'warmup_'.

    Returns:
      0 if none is given; at least 1 otherwise.

    Example:
      >>> to_steps({'epochs': 1.5, 'steps': 0}, steps_per_epoch=100, batch_size=128)
      150
    """
    steps, examples, epochs = (section.get(prefix + unit) or 0 for unit in ('steps', 'examples', 'epochs'))
    if steps:
        return max(1, round(steps))
    if examples:
        return max(1, round(examples / batch_size))
    return max(1, round(epochs * steps_per_epoch)) if epochs else 0


def make_schedule(
    kind: str,
    learning_rate: float,
    total_steps: int,
    *,
    milestones: Sequence[float] = (),
    factor: float = 0.1,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Learning rate as a function of the step.

    Args:
      kind: 'step' multiplies by `factor` at each of `milestones`; 'cosine' and 'linear' decay to zero; 'constant'.
      learning_rate: the peak.
      total_steps: length of the run.
      milestones: shares of the run, so that a shorter run keeps its shape.
      factor: see `kind`.
      warmup_steps: of linear increase from zero, at the start of the run and part of it.

    Raises:
      UserError: another kind, or a warmup that fills the run.
    """
    if warmup_steps >= total_steps:
        raise UserError(
            f'config.schedule.warmup_epochs gives {warmup_steps} steps of warmup: '
            f'expected fewer than the {total_steps} of the run'
        )
    if kind == 'step':
        boundaries: dict[int, float] = {}
        for share in milestones:  # two of them can fall on one step of a short run
            step = round(share * total_steps) - warmup_steps
            boundaries[step] = boundaries.get(step, 1.0) * factor
        schedule = optax.piecewise_constant_schedule(learning_rate, boundaries)
    elif kind == 'cosine':
        schedule = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1))
    elif kind == 'linear':
        schedule = optax.linear_schedule(learning_rate, 0.0, max(total_steps - warmup_steps, 1))
    elif kind == 'constant':
        schedule = optax.constant_schedule(learning_rate)
    else:
        raise UserError(f'schedule.kind={kind!r}: expected one of {SCHEDULES}')
    if not warmup_steps:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), schedule], [warmup_steps])
