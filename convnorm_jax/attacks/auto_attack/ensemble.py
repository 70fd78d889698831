"""AutoAttack: several attacks in turn, each on the examples that are still robust.

Croce and Hein 2020 (arXiv 2003.01690): APGD on the cross-entropy, targeted APGD on the DLR loss,
targeted FAB, Square, without free parameters. Examples that are still robust are packed into
batches of one shape: every program is compiled once, and few computations are wasted.

Every example draws its random numbers from its own key, independently of packing and interruptions.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.attacks import inputs, losses, projections
from convnorm_jax.attacks.auto_attack import checks
from convnorm_jax.attacks.auto_attack.batches import Batches, joined
from convnorm_jax.attacks.auto_attack.members import Member, check_names, make_member
from convnorm_jax.attacks.auto_attack.saved import Progress, check_state_path, load_progress, save_progress
from convnorm_jax.attacks.nets import as_logits_fn

STANDARD = ('apgd-ce', 'apgd-t', 'fab-t', 'square')

_SAVE_EVERY = 30.0  # seconds; also at the end of every attack
# By rounding, a point may be outside of the ball by this share of its radius.
_ROUNDING = 1e-4
# Pixels are of 8 bits if they are so near to a multiple of 1/255, in units of 1/255.
_EIGHT_BITS = 1e-3
# Between chunks the host keeps a state of about `_STATE_SIZE` images per example. Above `_MOST_KEPT` bytes no state is
# kept, and examples are packed again only after a round.
_STATE_SIZE, _MOST_KEPT = 6, 4 * 2**30


@dataclasses.dataclass(frozen=True)
class EnsembleResult:
    """The result of an ensemble of attacks.

    Attributes:
      images: float32 [N, H, W, C]: adversarial where one was found, else the clean image.
      robust: bool [N]: classified correctly and not broken by any attack. Logits that are not finite
        count as misclassified.
      clean_accuracy, robust_accuracy: in [0, 1].
      attacks: for each attack, in order: {'name', 'attacked', 'broken', 'robust_accuracy' after it,
        'seconds'}.
      warnings: sentences, see `checks`.
      accuracy_again: on `images`, evaluated again in another order and so in other batches.
      accuracy_rounded: on `images` rounded to 8 bits, as a file of images holds them; None where the clean images are
        not of 8 bits themselves.
    """

    images: np.ndarray
    robust: np.ndarray
    clean_accuracy: float
    robust_accuracy: float
    attacks: list[dict[str, Any]]
    warnings: list[str]
    accuracy_again: float
    accuracy_rounded: float | None


def autoattack(
    logits_fn: inputs.LogitsFn,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float,
    norm: str = 'linf',
    rng: jax.Array,
    **options: Any,
) -> np.ndarray:
    """Adversarial images by AutoAttack's standard ensemble; see `run_ensemble`, whose options it takes.

    Returns:
      float32 [N, H, W, C], NumPy: adversarial where one was found, else the clean image.
    """
    return run_ensemble(logits_fn, images, labels, epsilon=epsilon, norm=norm, rng=rng, **options).images


def run_ensemble(
    logits_fn: inputs.LogitsFn,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float,
    norm: str = 'linf',
    rng: jax.Array,
    attacks: Sequence[str] = STANDARD,
    batch_size: int = 250,
    steps: int = 100,
    queries: int = 5000,
    targets: int = 9,
    restarts: int = 1,
    state_path: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
    log: Callable[[str], None] = print,
    progress: Callable[[str, int, int], None] | None = None,
) -> EnsembleResult:
    """Runs attacks one after another, each on the examples that are still robust. Not jittable: it jits.

    Args:
      logits_fn: pixels in [0, 1], [B, H, W, C] -> logits [B, K], or a net, see `nets.as_logits_fn`. Give a
        `jax.tree_util.Partial` that holds the variables of a large net: else they are compiled in as constants.
      images: float [N, H, W, C] in [0, 1]. labels: int [N].
      epsilon: radius of the ball, in pixel units of [0, 1].
      norm: 'linf' or 'l2'.
      rng: one PRNG key. Example i draws from `fold_in(rng, i)`.
      attacks: names among `members.MEMBERS`, in the order to run them.
      batch_size: examples at a time, split over the devices of `sharding`.
      steps, queries, targets, restarts: see `members.make_member`; the defaults are AutoAttack's.
      state_path: a file in which the state is saved; a run of the same arguments and net resumes from it. A net is
        identified by its logits, to the last bit, of all images and of the first batch moved at random; other logits
        are refused. On a GPU autotuning may change the logits of the same net:
        XLA_FLAGS=--xla_gpu_autotune_level=0 prevents it.
      sharding: of the batch axis, for several devices.
      log: takes a line of text.
      progress: called with (attack, examples done, examples in all) of a round.

    Raises:
      UserError: an argument of the wrong shape, dtype, range or name, or a state of other arguments.
    """
    images, labels = inputs.checked_examples(images, labels, epsilon, norm, batch_size)
    logits_fn = as_logits_fn(logits_fn)
    # Everything that can be refused is refused before the net has run.
    if state_path:
        check_state_path(state_path)
    one_batch = jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), jnp.float32)
    classes = inputs.class_count(logits_fn, one_batch)
    inputs.check_classes(labels, len(images), 'labels', classes)
    check_names(attacks, classes)
    sizes = {'steps': steps, 'queries': queries, 'targets': targets, 'restarts': restarts}
    batches = Batches(batch_size, sharding)
    members = [make_member(name, norm, classes, platform=batches.platform, **sizes) for name in attacks]
    problem = _Problem(logits_fn, images, labels, float(epsilon), norm, inputs.typed_key(rng))
    run = _Run(problem, batches, log, progress)
    clean = losses.correct(run.clean, labels)
    identity = run.identity(attacks, sizes, members) if state_path else {}
    state = load_progress(state_path, identity) if state_path else None
    if state is None:
        state = Progress(images.copy(), clean.copy(), warnings=run.first_warnings())
    else:
        log(f'resuming from {state_path}: {state.robust.mean():.2%} robust so far')
    clean_accuracy = float(clean.mean())
    log(f'clean accuracy {clean_accuracy:.2%} of {len(labels)} examples, {norm} epsilon {epsilon:.4g}')
    for warning in state.warnings:
        log(f'warning: {warning}')
    run.saver = _Saver(state_path, identity)
    for member in members[len(state.attacks) :]:
        run.attack(member, state)
    warning = checks.check_black_box(
        {a['name']: a['robust_accuracy'] for a in state.attacks},
        [m.name for m in members if m.white_box],
        [m.name for m in members if not m.white_box],
    )
    if warning:
        log(f'warning: {warning}')
    again, rounded = run.seen_again(state)
    found = [warning, *checks.check_found(float(state.robust.mean()), again, rounded, len(labels))]
    return EnsembleResult(
        images=state.images,
        robust=state.robust,
        clean_accuracy=clean_accuracy,
        robust_accuracy=float(state.robust.mean()),
        attacks=state.attacks,
        warnings=[*state.warnings, *filter(None, found)],
        accuracy_again=again,
        accuracy_rounded=rounded,
    )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is attacked, and in which ball: arguments of `run_ensemble`, checked."""

    logits_fn: jax.tree_util.Partial
    images: np.ndarray
    labels: np.ndarray
    epsilon: float
    norm: str
    rng: jax.Array


class _Saver:
    """Writes the state every `_SAVE_EVERY` seconds."""

    def __init__(self, path, identity):
        self.path, self.identity, self.last = path, identity, time.monotonic()

    def __call__(self, state, now=False):
        if self.path and mesh_lib.is_leader() and (now or time.monotonic() - self.last > _SAVE_EVERY):
            save_progress(self.path, self.identity, state)
            self.last = time.monotonic()


class _Run:
    """The examples and the programs of one call of `run_ensemble`."""

    def __init__(self, problem, batches, log, progress):
        self.logits_fn, self.images, self.labels = problem.logits_fn, problem.images, problem.labels
        self.epsilon, self.norm, self.rng = problem.epsilon, problem.norm, problem.rng
        self.batches, self.log, self.progress = batches, log, progress
        self.saver = None
        keys = inputs.example_keys(self.rng, len(self.labels))
        self.keys = np.asarray(jax.random.key_data(keys))
        self._predict = jax.jit(lambda f, x: f(x))
        self._length = jax.jit(lambda a, b: projections.norm_of(a - b, self.norm))
        self._keys = jax.jit(self._fold)
        packs = batches.packs(np.arange(len(self.labels)))
        self.clean = np.concatenate([self._logits(self.images[pack])[: len(chosen)] for chosen, pack in packs])

    def _logits(self, images):
        return mesh_lib.fetch(self._predict(self.logits_fn, self.batches.place(images))).astype(np.float32)

    def _fold(self, data, attack, turn):
        keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(self.rng))
        return inputs.fold_in(inputs.fold_in(keys, attack), turn)

    def seen_again(self, state):
        """(accuracy on the images that were found, in other batches; that of them rounded to 8 bits, or None)."""
        backwards = np.arange(len(self.labels))[::-1]
        again = self._accuracy(state.images, backwards)
        eight_bits = np.abs(self.images * 255 - np.round(self.images * 255)).max() < _EIGHT_BITS
        return again, self._accuracy(np.round(state.images * 255) / 255, backwards) if eight_bits else None

    def _accuracy(self, images, order):
        images = images.astype(np.float32)
        right = sum(
            int(losses.correct(self._logits(images[pack]), self.labels[pack])[: len(chosen)].sum())
            for chosen, pack in self.batches.packs(order)
        )
        return right / len(self.labels)

    def identity(self, attacks, sizes, members):
        """What must be equal to resume from a saved state."""
        return {
            'attacks': list(attacks),
            'epsilon': self.epsilon,
            'norm': self.norm,
            'rng': np.asarray(jax.random.key_data(self.rng)),
            **sizes,
            'chunks': [member.chunks for member in members],
            'images': self.images,
            'labels': self.labels,
            'predictions': self.clean.argmax(-1),
            'logits': self.clean,
            'logits next to the images': self._logits_nearby(),
        }

    def _logits_nearby(self):
        """The logits of the first batch moved at random: nets that agree on the images rarely agree next to them."""
        _, pack = next(self.batches.packs(np.arange(len(self.labels))))
        moved = self.images[pack] + np.random.default_rng(0).uniform(-0.05, 0.05, self.images[pack].shape)
        return self._logits(moved.clip(0, 1).astype(np.float32))

    def first_warnings(self):
        """The warnings before any attack, from the first batch; of outputs that are not finite, from all images."""
        lost = int((~np.isfinite(self.clean).all(-1)).sum())
        if lost:
            return [f'the outputs are not all finite for {lost} of {len(self.labels)} images, which count as wrong']
        batch = slice(0, self.batches.size)
        images, labels = self.images[batch], self.labels[batch]
        found = checks.check_outputs(lambda x: self._predict(self.logits_fn, jnp.asarray(x)), images)
        gradient = checks.check_gradients(self.logits_fn, jnp.asarray(images), jnp.asarray(labels))
        return found + ([gradient] if gradient else [])

    def attack(self, member: Member, state: Progress):
        """Runs all rounds of one attack; updates and saves `state`."""
        begun = time.monotonic() - state.seconds
        if state.attacked is None:
            state.attacked = int(state.robust.sum())
        while state.turn < member.rounds:
            self._round(member, state, begun)
            state.turn, state.chunk, state.kept = state.turn + 1, 0, None
        accuracy, broken = float(state.robust.mean()), state.attacked - int(state.robust.sum())
        seconds = time.monotonic() - begun
        self.log(f'{member.name}: broke {broken} of {state.attacked}, robust accuracy {accuracy:.2%} ({seconds:.1f} s)')
        state.attacks.append(
            {
                'name': member.name,
                'attacked': state.attacked,
                'broken': broken,
                'robust_accuracy': accuracy,
                'seconds': seconds,
            }
        )
        state.next_attack()
        self.saver(state, now=True)

    def _round(self, member, state, begun):
        every = member.repack_every if self.images.nbytes * _STATE_SIZE < _MOST_KEPT else member.chunks
        while state.chunk < member.chunks:
            examples = np.flatnonzero(state.robust)
            if not len(examples):
                return
            chunks = range(state.chunk, min(state.chunk + every, member.chunks))
            last, kept = chunks.stop == member.chunks, []
            for number, (chosen, pack) in enumerate(self.batches.packs(examples)):
                leaves = None if state.kept is None else self.batches.rows(state.kept, number)
                reached = self._advance(member, state, pack, leaves, chunks)
                self._note(member, state, chosen, pack, reached)
                if not last:
                    leaves = mesh_lib.fetch(jax.tree.leaves(reached))
                    kept.append([leaf[: len(chosen)] if leaf.ndim else leaf for leaf in leaves])
                if self.progress:
                    self.progress(member.name, number * self.batches.size + len(chosen), len(examples))
            state.kept = joined(kept, state.robust[examples]) if kept and state.robust.any() else None
            state.chunk, state.seconds = chunks.stop, time.monotonic() - begun
            self.saver(state)

    def _advance(self, member, state, pack, leaves, chunks):
        """The state of one batch after some chunks, or fewer if all are fooled before."""
        keys = self._keys(self.batches.place(self.keys[pack]), len(state.attacks), state.turn)
        images, labels = self.batches.place(self.images[pack]), self.batches.place(self.labels[pack])
        targets = self.batches.place(self._targets(member, pack, state.turn))
        epsilon = jnp.float32(self.epsilon)
        common = (self.logits_fn, images, labels, keys, targets, epsilon)
        if leaves is None:
            reached = member.start(*common)
        else:
            structure = jax.tree.structure(jax.eval_shape(member.start, *common))
            reached = jax.tree.unflatten(structure, self.batches.place(leaves))
        for chunk in chunks:
            reached = member.advance(*common, reached, chunk)
            if bool(member.found(reached, epsilon)[1].all()):
                break
        return reached

    def _targets(self, member, pack, turn):
        if not member.targeted:
            return self.labels[pack]
        return np.asarray(losses.nth_wrong_class(self.clean[pack], self.labels[pack], turn))

    def _note(self, member, state, chosen, pack, reached):
        """Records the examples that an attack broke, after checking them again."""
        found, fooled = member.found(reached, jnp.float32(self.epsilon))
        if not bool(fooled.any()):
            return
        found = jnp.clip(found, 0, 1)
        wrong = ~losses.correct(self._logits(found), self.labels[pack])
        inside = mesh_lib.fetch(self._length(found, self.batches.place(self.images[pack]))) <= self.epsilon * (
            1 + _ROUNDING
        )
        broken = (wrong & inside)[: len(chosen)]
        state.robust[chosen[broken]] = False
        state.images[chosen[broken]] = mesh_lib.fetch(found)[: len(chosen)][broken]
