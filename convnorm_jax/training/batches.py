"""Where a step gets its batch: from a data set on the devices, or from a prefetching reader."""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data import pipeline, streaming

# Waiting for input is reported from this share of the time, and from so many seconds of an epoch.
_REPORTED_SHARE = 0.1
_REPORTED_SECONDS = 1.0
_ENOUGH = 100  # steps of an epoch after which its share is known well enough


class MemoryFeed:
    """Batches of a data set that lives on the devices.

    Attributes:
      data: {'images', 'labels'} on every device.
      epoch_order: epoch -> int32 [steps_per_epoch, batch], jittable.
      steps_per_epoch: int.
      mesh: the devices.
    """

    streamed = False

    def __init__(
        self, data: dict[str, jax.Array], epoch_order: Callable[[Any], jax.Array], steps_per_epoch: int, mesh: Mesh
    ) -> None:
        self.data, self.steps_per_epoch = data, steps_per_epoch
        self.epoch_order = jax.jit(epoch_order, out_shardings=mesh_lib.replicated(mesh))

    def batches(self, start: int) -> Generator[tuple, None, None]:
        """Yields the arguments of `take` for the steps from `start` on."""
        first, index = divmod(start, self.steps_per_epoch)
        for epoch in itertools.count(first):
            order = self.epoch_order(epoch)
            while index < self.steps_per_epoch:
                yield self.data['images'], self.data['labels'], order, index
                index += 1
            index = 0

    @staticmethod
    def take(images: jax.Array, labels: jax.Array, order: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        """Within jit: a step's batch {'images', 'labels'}."""
        return pipeline.take_batch(images, labels, order, index)


class StreamFeed:
    """Batches that are read, decoded and put on the devices ahead of their steps.

    Attributes:
      training: a `streaming.TrainingBatches`.
      mesh: devices that a batch is split over.
      total_steps: of the run; nothing is read after the last one.
    """

    streamed = True

    def __init__(self, training: streaming.TrainingBatches, mesh: Mesh, total_steps: int) -> None:
        self.training, self.mesh, self.total_steps = training, mesh, total_steps

    def batches(self, start: int) -> Generator[tuple, None, None]:
        """Yields the arguments of `take` for the steps from `start` on; closing the iterator ends the workers."""
        workers = self.training.images.workers
        loaded = streaming.read(self.training, self.total_steps, start=start, workers=workers, place=self._place)
        with contextlib.closing(loaded):
            for batch in loaded:
                yield batch['images'], batch['labels']

    def _place(self, batch):
        return mesh_lib.global_batch(self.mesh, batch)

    @staticmethod
    def take(images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        """Within jit: a step's batch {'images', 'labels'}."""
        return {'images': images, 'labels': labels}


class Waiting:
    """How long the devices were idle because the next batch was not there; warns once an epoch."""

    def __init__(self) -> None:
        self.begin_epoch(0.0)

    def next_batch(self, batches: Iterator[tuple], work: Any) -> tuple:
        """The next of `batches`; the time counts from when `work`, arrays of the last step, is done."""
        jax.block_until_ready(work)
        start = time.perf_counter()
        batch = next(batches)
        self.seconds += time.perf_counter() - start
        self._steps += 1
        return batch

    def begin_epoch(self, seconds: float) -> None:
        """Starts to count again, after so many seconds of training."""
        self.seconds, self._before, self._steps, self._said = 0.0, seconds, 0, False

    def warning(self, seconds: float, workers: int, ended: bool) -> str:
        """A line if too much of this epoch was spent waiting, else ''.

        Args:
          seconds: of training so far.
          workers: processes that read.
          ended: whether the epoch has; before its end `_ENOUGH` steps are needed.
        """
        share = self.seconds / max(seconds - self._before, self.seconds, 1e-9)
        little = share < _REPORTED_SHARE or self.seconds < _REPORTED_SECONDS
        if self._said or little or not (ended or self._steps >= _ENOUGH):
            return ''
        self._said = True
        return (
            f'input bound: {share:.0%} of the time was spent waiting for images; more config.data.workers '
            f'(now {workers}) on more cores, a smaller config.data.image_size or smaller files would help'
        )
