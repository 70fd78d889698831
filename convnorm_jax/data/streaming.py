"""Streams images from the disk: grain prefetches whole batches, in threads or worker processes.

The content of a batch is a pure function of (seed, step). It does not depend on the number of workers, processes
or devices, and a run that resumes in the middle of an epoch needs the step alone.
"""

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from multiprocessing.process import BaseProcess
from typing import Any

import jax
import numpy as np

from convnorm_jax.data import images as images_lib
from convnorm_jax.data.augment import STREAMED_AUGMENTATIONS
from convnorm_jax.data.pipeline import padded_batches, streamed_order
from convnorm_jax.data.records import Records

_CROP_STREAM = 0xC409  # makes the crops independent of the order of the same seed
_MAX_WORKERS = 16  # each holds two or three batches in memory
_CHUNK = 16  # images decoded at a time when all of them are loaded into memory


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images of one size that are decoded on demand; used in place of an array [N, H, W, 3].

    Attributes:
        records: the encoded images.
        rows: int64 [N], which of the records.
        size: pixels of a side.
        workers: processes that decode; 0 for threads of this process.
    """

    records: Records
    rows: np.ndarray
    size: int
    workers: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, size, size, 3)."""
        return len(self.rows), self.size, self.size, 3

    @property
    def dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice | np.ndarray) -> 'StreamedImages':
        """Some of the images, by a slice or an array of indices; nothing is read."""
        return dataclasses.replace(self, rows=self.rows[chosen])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Loads the center crops of all images into memory."""
        starts = range(0, len(self), _CHUNK)
        parts = read(functools.partial(_centers, self), len(starts), workers=0)
        found = np.concatenate([np.empty((0, *self.shape[1:]), np.uint8), *parts])
        return found if dtype is None else found.astype(dtype)

    def decoded(self, index: int) -> np.ndarray:
        """One image of its own size, uint8 [H, W, 3]."""
        return images_lib.decode(*self.records.read(self.rows[index]))

    def center(self, index: int) -> np.ndarray:
        """The center crop of one image, uint8 [size, size, 3]."""
        return images_lib.center_crop(self.decoded(index), self.size)


def default_workers() -> int:
    """Number of worker processes: one for each core but one, at most 16; none on a single core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(cores - 1, _MAX_WORKERS)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingBatches:
    """Maps a step to this process's part of the step's batch.

    Each epoch is shuffled again and cut into whole batches, as `pipeline.epoch_order` does. Process p of P gets
    the rows [p * B / P, (p + 1) * B / P) of a batch of B.

    Attributes:
        images: of the training set.
        labels: int32 [N], of the training set.
        batch_size: examples of the batch, all processes together.
        augmentation: one of `augment.AUGMENTATIONS`; those that run on the device get center crops here.
        seed: of order and crops.
        process: p.
        processes: P.
    """

    images: StreamedImages
    labels: np.ndarray
    batch_size: int
    augmentation: str
    seed: int
    process: int = 0
    processes: int = 1

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, indices into `images`, int [batch_size / processes]) of a step."""
        epoch, index = divmod(step, len(self.images) // self.batch_size)
        share = self.batch_size // self.processes
        start = index * self.batch_size + self.process * share
        return epoch, streamed_order(self.seed, epoch, len(self.images))[start : start + share]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """{'images': uint8 [batch_size / processes, size, size, 3], 'labels': int32} of a step."""
        epoch, chosen = self.indices(step)
        images = np.empty((len(chosen), *self.images.shape[1:]), np.uint8)
        for image, index in zip(images, chosen):
            image[:] = self._augmented(epoch, index)
        return {'images': images, 'labels': self.labels[chosen].astype(np.int32)}

    def _augmented(self, epoch: int, index: int) -> np.ndarray:
        if self.augmentation not in STREAMED_AUGMENTATIONS:
            return self.images.center(index)
        # The crop depends on the image and the epoch, not on the batch or the worker.
        row = int(self.images.rows[index])
        rng = np.random.Generator(np.random.Philox(key=[self.seed, _CROP_STREAM], counter=[0, 0, epoch, row]))
        image = images_lib.random_resized_crop(self.images.decoded(index), rng, self.images.size)
        flips = self.augmentation == 'resized_crop_flip' and rng.random() < 0.5
        return image[:, ::-1] if flips else image


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationBatches:
    """Maps a number to this process's part of a batch of center crops: every image once, the last batch padded.

    Attributes:
        images: of the split.
        labels: int32 [N], of the split.
        batch_size: examples of the batch, all processes together.
        process: see `TrainingBatches`.
        processes: see `TrainingBatches`.
    """

    images: StreamedImages
    labels: np.ndarray
    batch_size: int
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """{'images': uint8, 'labels': int32, 'mask': float32} of a batch, each [batch_size / processes, ...]."""
        indices, mask = padded_batches(len(self.images), self.batch_size)
        share = self.batch_size // self.processes
        mine = slice(self.process * share, (self.process + 1) * share)
        indices, mask = indices[number, mine], mask[number, mine]
        images = np.zeros((share, *self.images.shape[1:]), np.uint8)
        for i in np.flatnonzero(mask):
            images[i] = self.images.center(indices[i])
        return {'images': images, 'labels': self.labels[indices].astype(np.int32), 'mask': mask}


def _centers(images: StreamedImages, chunk: int) -> np.ndarray:
    indices = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(images)))
    return np.stack([images.center(index) for index in indices])


def read(
    load: Callable[[int], Any],
    stop: int,
    *,
    start: int = 0,
    workers: int = 0,
    place: Callable[[Any], Any] | None = None,
    ahead: int = 2,
) -> Generator[Any, None, None]:
    """Yields `load(start)`, ..., `load(stop - 1)` in this order, prefetched by grain.

    Closing the generator ends its threads and processes.

    Args:
        load: a picklable function of a number -> tree of NumPy arrays.
        stop: see above.
        start: see above.
        workers: processes; 0 for threads of this process.
        place: applied to each tree in a thread of this process before its use, e.g. to put it on the devices.
        ahead: trees that `place` is applied to in advance.

    Raises:
        ValueError: raised by `load`, in whichever process it ran.
    """
    import grain  # imported here, because it takes seconds
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads flags of its own, even in a program without absl
        flags.FLAGS.mark_as_parsed()
    numbers = grain.MapDataset.range(start, max(stop, start))
    workers = min(workers, len(numbers))
    threads = 0 if workers else max(1, min(default_workers(), len(numbers)))
    data = numbers.map(load).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        data = data.mp_prefetch(options, worker_init_fn=_prepare_worker)
        # The workers' arrays lie in shared memory; a batch that is alive when the process ends must not refer to it.
        data = data.map(_copied)
    if place:
        data = grain.experimental.ThreadPrefetchIterDataset(data.map(place), prefetch_buffer_size=ahead)
    batches, failure = iter(data), None
    try:
        yield from batches
    except Exception as error:
        failure = error
        raise
    finally:
        batches.close()
        if workers:
            del batches
            _free_shared_memory(failure)
            del failure  # the error and this frame refer to each other


def _copied(batch: Any) -> Any:
    return jax.tree.map(np.array, batch)


def _free_shared_memory(failure: BaseException | None) -> None:
    """Frees grain's unused arrays before the process ends, when they would only cause a warning."""
    # The frames of a traceback and their callers hold batches; grain removes its own frames from the traceback only.
    for frame, _ in traceback.walk_tb(failure.__traceback__ if failure else None):
        for caller, _ in traceback.walk_stack(frame):
            with contextlib.suppress(RuntimeError):  # a frame that is still running
                caller.clear()
    gc.collect()  # grain's iterators are cycles
    # grain unlinks shared memory in a thread that the end of the process would not wait for.
    arrays = sys.modules.get('grain._src.python.ipc.shared_memory_array')
    unlinking = getattr(getattr(arrays, 'SharedMemoryArray', None), '_del_thread_pool', None)
    if unlinking is not None:
        unlinking.apply(int)  # returns when everything queued before it is done


def _prepare_worker(index: int, count: int) -> None:
    """Lets the main process decide when a worker ends: it ignores signals, and ends with its parent."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(1)  # each core has a process already
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
