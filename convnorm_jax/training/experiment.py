"""What the loop knows of a run; each kind of training says the rest."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data import pipeline, sources, splits, streaming
from convnorm_jax.training.batches import MemoryFeed, StreamFeed

# Test examples of a streamed data set that are attacked where config.eval.examples is 0.
STREAMED_ATTACK_EXAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run, ready to start.

    Attributes:
      config: as given.
      source, prepared: the data set, and its splits with what label noise changed.
      data: {'train' | 'validation' | 'test': {'images', 'labels'}} on every device; `streaming.StreamedImages` and
        NumPy labels where the data set is streamed.
      mesh, schedule: devices, learning rate.
      train_step: (state, batch) -> (state, metrics).
      batch_examples: examples in the batch of a step.
      passes: over the data in what the loop calls an epoch.
      steps_per_epoch, total_steps: int.
      metric_names: of the metrics.
      columns: of metrics.csv.
    """

    config: Any
    source: sources.Source
    prepared: splits.Prepared
    data: dict
    mesh: Any
    schedule: Any
    train_step: Any
    batch_examples: int
    passes: int
    steps_per_epoch: int
    total_steps: int

    metric_names: ClassVar[tuple]
    columns: ClassVar[tuple]

    @property
    def input_shape(self):
        """[H, W, C] of a picture."""
        return self.source.train.images.shape[1:]

    @property
    def streamed(self):
        """Whether the pictures are read while they are needed."""
        return isinstance(self.source.train.images, streaming.StreamedImages)

    def feed(self):
        """Where the steps get their batches: a `MemoryFeed` or a `StreamFeed`."""
        if not self.streamed:
            return MemoryFeed(self.data['train'], self.epoch_order, self.steps_per_epoch, self.mesh)
        train = self.prepared.train
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
    def attacked(self):
        """The test examples that attacks see, a `Split` in memory: the first config.eval.examples, 0 for all.

        Of a streamed data set 0 stands for `STREAMED_ATTACK_EXAMPLES`.
        """
        test = self.prepared.test
        count = self.config.eval.examples or (STREAMED_ATTACK_EXAMPLES if self.streamed else len(test.labels))
        return sources.Split(np.asarray(test.images[:count]), test.labels[:count].astype(np.int32))

    @functools.cached_property
    def attacked_data(self):
        """{'images', 'labels'} on every device that hold `attacked`, and more where the whole test set is there."""
        if not self.streamed:
            return self.data['test']
        return mesh_lib.replicate(self.mesh, {'images': self.attacked.images, 'labels': self.attacked.labels})

    def create_state(self):
        """The state before the first step; jittable."""
        raise NotImplementedError

    def initial_state(self):
        """The state before the first step, on every device."""
        return jax.jit(self.create_state, out_shardings=mesh_lib.replicated(self.mesh))()

    def abstract_state(self):
        """Shapes, dtypes and shardings of the state, without computing it.

        Raises:
          ValueError: the net can not take pictures of this size.
        """
        sharding = mesh_lib.replicated(self.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self.create_state),
        )

    def abstract_states(self):
        """What the state in a checkpoint may look like, see `abstract_state`: today's, then earlier versions'."""
        return [self.abstract_state()]

    def completed(self, state):
        """A restored state with what an earlier version did not keep."""
        return state

    def epoch_order(self, epoch):
        """The examples of an epoch, int32 [steps_per_epoch, batch_examples]; jittable."""
        examples = len(self.prepared.train.labels)
        order = jax.vmap(lambda number: pipeline.epoch_order(self.config.seed, number, examples, self.batch_examples))(
            epoch * self.passes + jnp.arange(self.passes)
        )
        return order.reshape(-1, self.batch_examples)

    def training_row(self, values):
        """What metrics.csv says of the means of an epoch's metrics."""
        raise NotImplementedError

    def validate(self, state, step, workdir):
        """{column: value} of what is measured at the end of an epoch; may write into `workdir`."""
        raise NotImplementedError

    def rating(self, found):
        """How good the state is by what `validate` found, more is better; None if that is not known."""
        raise NotImplementedError

    def describe(self, values):
        """The means of the metrics so far, in a few words."""
        raise NotImplementedError

    def describe_validation(self, found):
        """What `validate` found, in a few words; '' for nothing."""
        raise NotImplementedError
