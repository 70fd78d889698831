"""A run as the training loop sees it; classifiers and GANs are its two kinds."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data import pipeline, sources, splits, streaming
from convnorm_jax.runs.progress import Progress
from convnorm_jax.training.batches import MemoryFeed, StreamFeed

# Test examples of a streamed data set that are attacked if config.eval.examples is 0.
STREAMED_ATTACK_EXAMPLES = 1000

# Values of config.train.algorithm that attack their batches.
ADVERSARIAL = ('free', 'fast', 'pgd', 'trades')


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run, ready to start.

    Attributes:
      config: as given.
      source, prepared: the data set, and its splits with label noise applied.
      data: {'train' | 'validation' | 'test': {'images', 'labels'}} on every device; `streaming.StreamedImages` and
        NumPy labels if the data set is streamed.
      mesh, schedule: devices, learning rate.
      train_step: (state, batch) -> (state, metrics).
      batch_examples: examples in the batch of a step.
      passes: over the data in what the loop calls an epoch.
      steps_per_epoch, total_steps: int.
      metric_names: of the metrics.
    """

    config: ConfigDict
    source: sources.Source
    prepared: splits.Prepared
    data: dict
    mesh: Mesh
    schedule: optax.Schedule
    train_step: Any
    batch_examples: int
    passes: int
    steps_per_epoch: int
    total_steps: int

    metric_names: ClassVar[tuple[str, ...]]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of metrics.csv."""
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, ...]:
        """[H, W, C] of an image."""
        return self.source.train.images.shape[1:]

    @property
    def streamed(self) -> bool:
        """Whether images are read from disk during training."""
        return isinstance(self.source.train.images, streaming.StreamedImages)

    def feed(self) -> MemoryFeed | StreamFeed:
        """Where the steps get their batches: a `MemoryFeed` or a `StreamFeed`."""
        train = self.prepared.train
        if not isinstance(train.images, streaming.StreamedImages):
            return MemoryFeed(self.data['train'], self.epoch_order, self.steps_per_epoch, self.mesh)
        batches = streaming.TrainingBatches(
            train.images,
            train.labels,
            self.batch_examples,
            self.config.data.augmentation,
            self.config.seed,
            jax.process_index(),
            jax.process_count(),
        )
        return StreamFeed(batches, self.mesh, self.total_steps)

    @functools.cached_property
    def attacked(self) -> sources.Split:
        """The test examples that are attacked, in memory: the first config.eval.examples, 0 for all.

        Of a streamed data set, 0 stands for `STREAMED_ATTACK_EXAMPLES`.
        """
        test = self.prepared.test
        count = self.config.eval.examples or (STREAMED_ATTACK_EXAMPLES if self.streamed else len(test.labels))
        return _first(test, count)

    @functools.cached_property
    def probed(self) -> dict[str, jax.Array] | None:
        """{'images', 'labels'} on every device: the validation examples that are attacked during training, or None."""
        count, validation = self.config.train.adversarial.probe_examples, self.prepared.validation
        if self.config.train.algorithm not in ADVERSARIAL or not min(count, len(validation.labels)):
            return None
        first = _first(validation, count)
        return mesh_lib.replicate(self.mesh, {'images': first.images, 'labels': first.labels})

    @functools.cached_property
    def attacked_data(self) -> dict[str, jax.Array]:
        """{'images', 'labels'} on every device: the whole test set, or `attacked` of a streamed one."""
        if not self.streamed:
            return self.data['test']
        return mesh_lib.replicate(self.mesh, {'images': self.attacked.images, 'labels': self.attacked.labels})

    def create_state(self) -> Any:
        """The state before the first step; jittable."""
        raise NotImplementedError

    def initial_state(self) -> Any:
        """The state before the first step, on every device."""
        return jax.jit(self.create_state, out_shardings=mesh_lib.replicated(self.mesh))()

    def abstract_state(self) -> Any:
        """Shapes, dtypes and shardings of the state, without computing it.

        Raises:
          UserError: the net cannot take images of this size.
        """
        sharding = mesh_lib.replicated(self.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self.create_state),
        )

    def abstract_states(self) -> Sequence[Any]:
        """The structures that a checkpoint may have, see `abstract_state`: the current one, then earlier versions'."""
        return [self.abstract_state()]

    def completed(self, state: Any) -> Any:
        """A restored state, with what an earlier version did not save."""
        return state

    def epoch_order(self, epoch: Any) -> jax.Array:
        """The examples of an epoch, int32 [steps_per_epoch, batch_examples]; jittable."""
        examples = len(self.prepared.train.labels)
        order = jax.vmap(lambda number: pipeline.epoch_order(self.config.seed, number, examples, self.batch_examples))(
            epoch * self.passes + jnp.arange(self.passes)
        )
        return order.reshape(-1, self.batch_examples)

    def training_row(self, values: dict[str, float]) -> dict[str, float]:
        """{column of metrics.csv: value} of the means of an epoch's metrics."""
        raise NotImplementedError

    def validate(self, state: Any, step: int, workdir: str) -> dict[str, float]:
        """{column: value} of what is measured at the end of an epoch; may write into `workdir`."""
        raise NotImplementedError

    def rating(self, found: dict[str, float]) -> float | None:
        """How good the state is, from what `validate` found; higher is better, None if unknown."""
        raise NotImplementedError

    def warning(self, row: dict[str, float], progress: Progress) -> str:
        """What the user should know at once of an epoch; '' for nothing.

        Args:
          row: of metrics.csv.
          progress: before this epoch was rated.
        """
        return ''

    def describe(self, values: dict[str, float]) -> str:
        """The means of the metrics so far, in a few words."""
        raise NotImplementedError

    def describe_validation(self, found: dict[str, float]) -> str:
        """What `validate` found, in a few words; '' for nothing."""
        raise NotImplementedError


def _first(split: sources.Split, count: int) -> sources.Split:
    return sources.Split(np.asarray(split.images[:count]), split.labels[:count].astype(np.int32))
