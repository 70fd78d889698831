"""The attacks of AutoAttack, each split into short jitted programs.

A member's run over a batch is a start, then chunks of iterations. Chunks are short enough to be
unrolled on a CPU (`loops.unrolls`), and the host can stop between them when all are fooled.
Iterations of the last chunk past the run change nothing. A round is one run, with one target class
or one random start.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from convnorm_jax.attacks import inputs
from convnorm_jax.attacks.apgd import apgd_advance, apgd_start
from convnorm_jax.attacks.fab import fab_advance, fab_start
from convnorm_jax.attacks.square import square_advance, square_start
from convnorm_jax.errors import UserError

MEMBERS = ('apgd-ce', 'apgd-dlr', 'apgd-t', 'fab-t', 'square')

# Iterations of one unrolled program: a compromise between compile time and dispatches.
_CPU_CHUNK = {'apgd': 10, 'fab': 5, 'square': 25}


@dataclasses.dataclass(frozen=True)
class Member:
    """An attack as the ensemble drives it.

    Attributes:
      name: one of `MEMBERS`.
      rounds: runs, one after another, each over the examples that are still robust.
      chunks: calls of `advance` in a run.
      repack_every: number of chunks after which the examples that are still robust are packed again.
      targeted: whether a round has a target class.
      white_box: whether it uses gradients.
      start: jitted (logits_fn, images, labels, keys, targets, epsilon) -> state.
      advance: jitted (logits_fn, images, labels, keys, targets, epsilon, state, chunk) -> state.
      found: (state, epsilon) -> (images [B, H, W, C], fooled bool [B]).

    logits_fn is a `jax.tree_util.Partial`: the arrays it holds are arguments of the programs.
    """

    name: str
    rounds: int
    chunks: int
    repack_every: int
    targeted: bool
    white_box: bool
    start: Callable[..., Any]
    advance: Callable[..., Any]
    found: Callable[..., Any]


@functools.lru_cache(maxsize=64)  # a member's programs are compiled once for all radii
def make_member(
    name: str,
    norm: str,
    classes: int,
    *,
    steps: int,
    queries: int,
    targets: int,
    restarts: int,
    platform: str = 'cpu',
) -> Member:
    """A member by its name.

    Args:
      name: one of `MEMBERS`.
      norm: 'linf' or 'l2'.
      classes: number of logits.
      steps: iterations of APGD and FAB; queries: of Square.
      targets: classes that a targeted attack tries; all wrong ones if there are fewer.
      restarts: runs of an untargeted attack.
      platform: that it will run on, 'cpu' or another: determines the length of the programs.

    Raises:
      UserError: another name or norm, a number below 1, too few classes for the DLR loss.
    """
    check_names((name,), classes)
    inputs.check_ball(0, norm)
    for value, word in ((steps, 'steps'), (queries, 'queries'), (targets, 'targets'), (restarts, 'restarts')):
        inputs.check_count(value, word)
    targets = min(targets, classes - 1)
    chunk = functools.partial(_chunk, on_cpu=platform == 'cpu')
    if name == 'fab-t':
        return _fab(norm, steps, targets, chunk)
    if name == 'square':
        return _square(norm, queries, restarts, chunk)
    if name == 'apgd-t':
        # The targeted DLR loss needs four classes.
        return _apgd(name, norm, 'dlr' if classes >= 4 else 'margin', steps, targets, chunk, targeted=True)
    loss = {'apgd-ce': 'cross_entropy', 'apgd-dlr': 'dlr'}[name]
    return _apgd(name, norm, loss, steps, restarts, chunk, targeted=False)


def check_names(names: Sequence[str], classes: int) -> None:
    """Raises UserError unless all are in `MEMBERS` and can attack a model of so many classes."""
    if isinstance(names, str):
        raise UserError(f'attacks={names!r}: expected a sequence of names, such as ({names!r},)')
    for name in names:
        if name not in MEMBERS:
            raise UserError(f'attacks: {name!r}, expected some of {", ".join(MEMBERS)}')
    if classes < 2:
        raise UserError(f'attacks: need at least two classes, the model has {classes}')
    if 'apgd-dlr' in names and classes < inputs.fewest_classes('dlr'):
        raise UserError(f"attacks: 'apgd-dlr' needs at least three classes, the model has {classes}")


def _chunk(family, total, otherwise, on_cpu):
    """(iterations of one program, calls of it) for at least `total` iterations, with the fewest past it."""
    most = _CPU_CHUNK[family] if on_cpu else otherwise
    chunks = -(-total // most)
    return -(-total // chunks), chunks


def _apgd(name, norm, loss, steps, rounds, chunk, *, targeted):
    count, chunks = chunk('apgd', steps, 25)

    def goal(targets, epsilon):
        return {'epsilon': epsilon, 'norm': norm, 'loss': loss, 'targets': targets if targeted else None}

    @jax.jit
    def start(logits_fn, images, labels, keys, targets, epsilon):
        return apgd_start(logits_fn, images, labels, rng=keys, **goal(targets, epsilon))

    @jax.jit
    def advance(logits_fn, images, labels, keys, targets, epsilon, state, chunk):
        return apgd_advance(logits_fn, images, labels, state, steps=steps, count=count, **goal(targets, epsilon))

    return Member(
        name, rounds, chunks, 1, targeted, True, start, advance, lambda state, _: (state.adversarial, state.fooled)
    )


def _fab(norm, steps, rounds, chunk):
    count, chunks = chunk('fab', steps, 25)

    @jax.jit
    def start(logits_fn, images, labels, keys, targets, epsilon):
        return fab_start(logits_fn, images, labels, epsilon=epsilon, norm=norm, rng=None, targets=targets)

    @jax.jit
    def advance(logits_fn, images, labels, keys, targets, epsilon, state, chunk):
        limit = steps - chunk * count
        return fab_advance(logits_fn, images, labels, state, norm=norm, targets=targets, count=count, limit=limit)

    return Member(
        'fab-t',
        rounds,
        chunks,
        max(1, 20 // count),
        True,
        True,
        start,
        advance,
        lambda s, epsilon: (s.nearest, s.distance <= epsilon),
    )


def _square(norm, queries, rounds, chunk):
    count, chunks = chunk('square', queries, 100)
    options = {'norm': norm}

    @jax.jit
    def start(logits_fn, images, labels, keys, targets, epsilon):
        return square_start(logits_fn, images, labels, epsilon=epsilon, rng=keys, **options)

    @jax.jit
    def advance(logits_fn, images, labels, keys, targets, epsilon, state, chunk):
        return square_advance(
            logits_fn,
            images,
            labels,
            state,
            epsilon=epsilon,
            rng=keys,
            first_query=chunk * count,
            queries=queries,
            count=count,
            **options,
        )

    return Member(
        'square',
        rounds,
        chunks,
        max(1, 100 // count),
        False,
        False,
        start,
        advance,
        lambda state, _: (state.images, state.fooled),
    )
