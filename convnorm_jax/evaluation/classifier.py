"""Accuracy of a classifier, clean and attacked, with each example counted once."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax import attacks
from convnorm_jax.attacks import inputs, losses
from convnorm_jax.data.augment import to_float
from convnorm_jax.data.pipeline import padded_batches
from convnorm_jax.data.streaming import EvaluationBatches, StreamedImages, read
from convnorm_jax.mesh import fetch, global_batch, shard_batch
from convnorm_jax.steps.classify import make_eval_step
from convnorm_jax.steps.state import Metrics

ATTACKS = ('fgsm', 'pgd')


class RobustAccuracy(TypedDict):
    """The result of `Evaluator.robust_accuracy`; the accuracy of no examples is nan."""

    accuracy: float
    examples: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """One attack and its settings.

    Attributes:
      name: one of `ATTACKS`.
      epsilon: radius, in units of pixels in [0, 1].
      step_size: in units of pixels in [0, 1]; PGD only.
      steps: PGD only.
      restarts: PGD only.
      loss: that the attack maximizes, see `attacks.pgd`.
      norm: see `attacks.pgd`; PGD only.
    """

    name: str
    epsilon: float
    step_size: float
    steps: int
    restarts: int
    loss: str
    norm: str = 'linf'

    @property
    def program(self) -> 'AttackSettings':
        """The same settings without radius and step size, which a compiled attack takes as arguments."""
        return dataclasses.replace(self, epsilon=0.0, step_size=0.0)

    def run(
        self,
        logits_fn: Callable[[jax.Array], jax.Array],
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        epsilon: float | jax.Array | None = None,
        step_size: float | jax.Array | None = None,
    ) -> jax.Array:
        """Attacks a batch, see `attacks.fgsm` and `attacks.pgd`.

        Args:
          logits_fn: pixels -> logits.
          images: float [B, H, W, C] in [0, 1].
          labels: int [B].
          key: one PRNG key, or one for each image.
          epsilon: replaces the attack's own; may be traced.
          step_size: replaces the attack's own; may be traced.

        Returns:
          Adversarial images, of the shape of `images`.
        """
        epsilon = self.epsilon if epsilon is None else epsilon
        step_size = self.step_size if step_size is None else step_size
        if self.name == 'fgsm':
            return attacks.fgsm(logits_fn, images, labels, epsilon=epsilon, loss=self.loss)
        return attacks.pgd(
            logits_fn,
            images,
            labels,
            epsilon=epsilon,
            step_size=step_size,
            steps=self.steps,
            restarts=self.restarts,
            loss=self.loss,
            norm=self.norm,
            rng=key,
        )


class Evaluator:
    """Evaluates variables of one net on splits that lie on the device.

    Attributes:
      logits_fn: (variables, pixels in [0, 1]) -> logits.
      mesh: devices; batches are divided over them.
      batch_size: examples at a time, a multiple of the number of devices.
    """

    def __init__(
        self, logits_fn: Callable[[Any, jax.Array], jax.Array], mesh: jax.sharding.Mesh, batch_size: int
    ) -> None:
        self.logits_fn, self.mesh, self.batch_size = logits_fn, mesh, batch_size
        eval_step = make_eval_step(logits_fn)
        self._eval = jax.jit(lambda variables, *batch: eval_step(variables, self._gather(*batch)))
        self._eval_batch = jax.jit(eval_step)
        self._predict = jax.jit(lambda variables, pixels: _predicted(logits_fn(variables, shard_batch(mesh, pixels))))
        self._attack = functools.cache(self._make_attack)

    def _gather(self, images: Any, labels: Any, indices: Any, mask: Any) -> Any:
        batch = {'images': images[indices], 'labels': labels[indices], 'mask': mask}
        return shard_batch(self.mesh, batch)

    def evaluate(self, variables: Any, split: Mapping[str, Any]) -> dict[str, float]:
        """Mean loss and accuracy over a split.

        Args:
          variables: of the net.
          split: {'images': uint8 [N, H, W, C], 'labels'} on the device, or with `StreamedImages`.

        Returns:
          {'loss', 'accuracy'}; {} for a split without examples.
        """
        totals: Metrics = {}
        streamed = isinstance(split['images'], StreamedImages)
        for sums in (self._streamed_sums if streamed else self._sums)(variables, **split):
            totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
        return {name: float(s) / float(n) for name, (s, n) in totals.items()}

    def _sums(self, variables: Any, images: jax.Array, labels: jax.Array) -> Iterator[Metrics]:
        for indices, mask in zip(*padded_batches(len(labels), self.batch_size)):
            yield self._eval(variables, images, labels, indices, mask)

    def _streamed_sums(self, variables: Any, images: StreamedImages, labels: np.ndarray) -> Iterator[Metrics]:
        load = EvaluationBatches(images, labels, self.batch_size, jax.process_index(), jax.process_count())
        place = functools.partial(global_batch, self.mesh)
        with contextlib.closing(read(load, len(load), workers=images.workers, place=place)) as batches:
            for batch in batches:
                # Wait for each batch: batches queued for the device would take its memory.
                yield jax.block_until_ready(self._eval_batch(variables, batch))

    def predict(self, variables: Any, pixels: np.ndarray) -> np.ndarray:
        """Predicted classes, int [N], of pixels in [0, 1]; -1 if the logits are not finite."""
        found = [np.zeros(0, np.int32)]
        for indices, mask in zip(*padded_batches(len(pixels), self.batch_size)):
            found.append(fetch(self._predict(variables, pixels[indices]))[mask > 0])
        return np.concatenate(found)

    def robust_accuracy(
        self,
        variables: Any,
        split: Mapping[str, Any],
        attack: AttackSettings,
        *,
        seed: int,
        examples: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> RobustAccuracy:
        """Accuracy under an attack.

        Args:
          variables: of the net.
          split: {'images': uint8, 'labels'} on the device.
          attack: the attack and its settings.
          seed: of the random starts.
          examples: attack only the first examples, this many; 0 for all.
          progress: called with (done, total) after every batch.

        Returns:
          {'accuracy', 'examples', 'seconds'}; the accuracy of no examples is nan. Logits that are not
          finite count as wrong.
        """
        total = min(examples or len(split['labels']), len(split['labels']))
        correct, start = 0.0, time.perf_counter()
        run = functools.partial(
            self._attack(attack.program), jnp.float32(attack.epsilon), jnp.float32(attack.step_size)
        )
        indices, mask = padded_batches(total, self.batch_size)
        for i in range(len(indices)):
            key = jax.random.key(seed)
            correct += float(run(variables, split['images'], split['labels'], indices[i], mask[i], key))
            if progress:
                progress(min((i + 1) * self.batch_size, total), total)
        accuracy = correct / total if total else float('nan')
        return {'accuracy': accuracy, 'examples': total, 'seconds': time.perf_counter() - start}

    def _make_attack(self, attack: AttackSettings) -> Callable[..., jax.Array]:
        def attacked_correct(
            epsilon: Any, step_size: Any, variables: Any, images: Any, labels: Any, indices: Any, mask: Any, key: Any
        ) -> jax.Array:
            batch = self._gather(images, labels, indices, mask)
            logits_fn = functools.partial(self.logits_fn, variables)
            # Keys of examples, not of positions in the batch: the batch size does not change the result.
            keys = inputs.numbered_keys(key, indices)
            attacked = attack.run(logits_fn, to_float(batch['images']), batch['labels'], keys, epsilon, step_size)
            correct = losses.correct(logits_fn(attacked), batch['labels'])
            return jnp.where(correct, batch['mask'], 0).sum()

        return jax.jit(attacked_correct)

    def attack_images(
        self, variables: Any, pixels: np.ndarray, labels: np.ndarray, attack: AttackSettings, seed: int
    ) -> np.ndarray:
        """Attacks a few images given as pixels in [0, 1]; returns NumPy."""
        run = jax.jit(lambda v, x, y, key: attack.run(functools.partial(self.logits_fn, v), x, y, key))
        return fetch(run(variables, pixels, labels, jax.random.key(seed)))


def _predicted(logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)
