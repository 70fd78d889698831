"""Where a step gets its batch: from the data set on the devices, or from pictures that are read meanwhile."""

import contextlib
import itertools
import time

import jax

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data import pipeline, streaming

# Below this share of the time nobody would gain much from faster input.
_TOLERATED = 0.1
_WORTH_A_WORD = 1.0  # seconds of an epoch
_ENOUGH = 100  # steps to judge an epoch by before its end


class MemoryFeed:
    """Batches of a data set that lives on the devices.

    Attributes:
      data: {'images', 'labels'} on every device.
      epoch_order: epoch -> int32 [steps_per_epoch, batch], jittable.
      steps_per_epoch: int.
      mesh: these devices.
    """

    streamed = False

    def __init__(self, data, epoch_order, steps_per_epoch, mesh):
        self.data, self.steps_per_epoch = data, steps_per_epoch
        self.epoch_order = jax.jit(epoch_order, out_shardings=mesh_lib.replicated(mesh))

    def batches(self, start):
        """Yields what `take` wants for the steps from `start` on."""
        first, index = divmod(start, self.steps_per_epoch)
        for epoch in itertools.count(first):
            order = self.epoch_order(epoch)
            while index < self.steps_per_epoch:
                yield self.data['images'], self.data['labels'], order, index
                index += 1
            index = 0

    @staticmethod
    def take(images, labels, order, index):
        """Within jit: a step's batch {'images', 'labels'}."""
        return pipeline.take_batch(images, labels, order, index)


class StreamFeed:
    """Batches that are read, decoded and put on the devices ahead of their steps.

    Attributes:
      training: a `streaming.TrainingBatches`.
      mesh: devices that a batch is cut over.
      total_steps: of the run; nothing is read beyond.
    """

    streamed = True

    def __init__(self, training, mesh, total_steps):
        self.training, self.mesh, self.total_steps = training, mesh, total_steps

    def batches(self, start):
        """Yields what `take` wants for the steps from `start` on; closing it ends the workers."""
        workers = self.training.images.workers
        loaded = streaming.read(self.training, self.total_steps, start=start, workers=workers, place=self._place)
        with contextlib.closing(loaded):
            for batch in loaded:
                yield batch['images'], batch['labels']

    def _place(self, batch):
        return mesh_lib.global_batch(self.mesh, batch)

    @staticmethod
    def take(images, labels):
        """Within jit: a step's batch {'images', 'labels'}."""
        return {'images': images, 'labels': labels}


class Waiting:
    """How long the devices had nothing to do because the next batch was not there; speaks once an epoch."""

    def __init__(self):
        self.begin_epoch(0.0)

    def next_batch(self, batches, work):
        """The next of `batches`; the time counts from when `work`, arrays of the last step, is done."""
        jax.block_until_ready(work)
        start = time.perf_counter()
        batch = next(batches)
        self.seconds += time.perf_counter() - start
        self._steps += 1
        return batch

    def begin_epoch(self, seconds):
        """Counts anew, after so many seconds of training."""
        self.seconds, self._before, self._steps, self._said = 0.0, seconds, 0, False

    def warning(self, seconds, workers, ended):
        """A line if too much of this epoch went to waiting, else ''.

        Args:
          seconds: of training so far.
          workers: that read.
          ended: whether the epoch has; before that it takes a number of steps to say.
        """
        share = self.seconds / max(seconds - self._before, self.seconds, 1e-9)
        little = share < _TOLERATED or self.seconds < _WORTH_A_WORD
        if self._said or little or not (ended or self._steps >= _ENOUGH):
            return ''
        self._said = True
        return (
            f'input bound: {share:.0%} of the time went to waiting for pictures; more config.data.workers '
            f'(now {workers}) on more cores, a smaller config.data.image_size or smaller files would help'
        )
