"""Pictures that are read while they are needed: grain reads whole batches ahead, in threads or worker processes.

What a batch holds is a pure function of (seed, step): the number of workers, processes and devices changes
nothing, and a run goes on in mid-epoch by its step alone.
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

import jax
import numpy as np

from convnorm_jax.data import images as pictures_lib
from convnorm_jax.data.augment import STREAMED_AUGMENTATIONS
from convnorm_jax.data.pipeline import padded_batches, streamed_order

_CROP_STREAM = 0xC409  # keeps the crops apart from the order of the same seed
_MAX_WORKERS = 16  # by default: each holds two or three batches
_CHUNK = 16  # pictures at a time where all of them go into memory


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one size that are decoded when they are asked for; stands where an array [N, H, W, 3] would.

    Attributes:
        store: a `stores.FolderStore` or `stores.RecordStore`.
        rows: int64 [N], which of the store's.
        size: pixels of a side.
        workers: processes that read; 0 for threads of this one.
    """

    store: object
    rows: np.ndarray
    size: int
    workers: int

    @property
    def shape(self):
        """(N, size, size, 3)."""
        return len(self.rows), self.size, self.size, 3

    @property
    def dtype(self):
        """uint8."""
        return np.dtype(np.uint8)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, chosen):
        """Some of them, by a slice or an array of places; nothing is read."""
        return dataclasses.replace(self, rows=self.rows[chosen])

    def __array__(self, dtype=None, copy=None):
        """All of them in memory, center crops."""
        starts = range(0, len(self), _CHUNK)
        parts = read(functools.partial(_centers, self), len(starts), workers=0)
        found = np.concatenate([np.empty((0, *self.shape[1:]), np.uint8), *parts])
        return found if dtype is None else found.astype(dtype)

    def decoded(self, place):
        """One picture as it is, uint8 [H, W, 3]."""
        return pictures_lib.decode(*self.store.read(self.rows[place]))

    def center(self, place):
        """One picture as nets are tested with it, uint8 [size, size, 3]."""
        return pictures_lib.center_crop(self.decoded(place), self.size)


def default_workers():
    """One process for each core but one, at most 16; on one core none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return min(cores - 1, _MAX_WORKERS)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingBatches:
    """Step -> this process's part of the step's batch.

    Each pass is shuffled anew and cut into whole batches, as `pipeline.epoch_order` does. Process p of P gets
    the rows [p * B / P, (p + 1) * B / P) of a batch of B.

    Attributes:
        pictures, labels: of the training set.
        batch_size: examples of the batch, all processes together.
        augmentation: one of `augment.AUGMENTATIONS`; those that the device does get center crops here.
        seed: of order and crops.
        process, processes: p and P.
    """

    pictures: Pictures
    labels: np.ndarray
    batch_size: int
    augmentation: str
    seed: int
    process: int = 0
    processes: int = 1

    def places(self, step):
        """(epoch, places in `pictures`, int [batch_size / processes])."""
        epoch, index = divmod(step, len(self.pictures) // self.batch_size)
        share = self.batch_size // self.processes
        start = index * self.batch_size + self.process * share
        return epoch, streamed_order(self.seed, epoch, len(self.pictures))[start : start + share]

    def __call__(self, step):
        """{'images': uint8 [batch_size / processes, size, size, 3], 'labels': int32}."""
        epoch, places = self.places(step)
        images = np.empty((len(places), *self.pictures.shape[1:]), np.uint8)
        for image, place in zip(images, places):
            image[:] = self._picture(epoch, place)
        return {'images': images, 'labels': self.labels[places].astype(np.int32)}

    def _picture(self, epoch, place):
        if self.augmentation not in STREAMED_AUGMENTATIONS:
            return self.pictures.center(place)
        # Of the picture and the epoch, not of its batch or worker.
        row = int(self.pictures.rows[place])
        rng = np.random.Generator(np.random.Philox(key=[self.seed, _CROP_STREAM], counter=[0, 0, epoch, row]))
        image = pictures_lib.random_resized_crop(self.pictures.decoded(place), rng, self.pictures.size)
        flips = self.augmentation == 'resized_crop_flip' and rng.random() < 0.5
        return image[:, ::-1] if flips else image


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationBatches:
    """Index -> this process's part of a batch of center crops; every picture once, the last batch filled up.

    Attributes:
        pictures, labels: of the split.
        batch_size: examples of the batch, all processes together.
        process, processes: as of `TrainingBatches`.
    """

    pictures: Pictures
    labels: np.ndarray
    batch_size: int
    process: int = 0
    processes: int = 1

    def __len__(self):
        return -(-len(self.pictures) // self.batch_size)

    def __call__(self, index):
        """{'images': uint8, 'labels': int32, 'mask': float32}, each [batch_size / processes, ...]."""
        places, mask = padded_batches(len(self.pictures), self.batch_size)
        share = self.batch_size // self.processes
        mine = slice(self.process * share, (self.process + 1) * share)
        places, mask = places[index, mine], mask[index, mine]
        images = np.zeros((share, *self.pictures.shape[1:]), np.uint8)
        for i in np.flatnonzero(mask):
            images[i] = self.pictures.center(places[i])
        return {'images': images, 'labels': self.labels[places].astype(np.int32), 'mask': mask}


def _centers(pictures, chunk):
    places = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(pictures)))
    return np.stack([pictures.center(place) for place in places])


def read(load, stop, *, start=0, workers=0, place=None, ahead=2):
    """Yield `load(start)`, ..., `load(stop - 1)`, in this order, read ahead by grain.

    Closing the generator ends its threads and processes.

    Args:
        load: a picklable function of a number -> tree of NumPy arrays.
        stop, start: ints.
        workers: processes; 0 for threads of this one.
        place: applied to each tree, in a thread of this process, `ahead` of its use; e.g. puts it on the devices.
        ahead: trees that wait for their use, where `place` is given.

    Raises:
        ValueError: raised by `load`, wherever it ran.
    """
    import grain  # only where it is needed: seconds
    from absl import flags

    if not flags.FLAGS.is_parsed():  # in a program without absl's flags; grain has some, and reads them
        flags.FLAGS.mark_as_parsed()
    numbers = grain.MapDataset.range(start, max(stop, start))
    workers = min(workers, len(numbers))
    threads = 0 if workers else max(1, min(default_workers(), len(numbers)))
    data = numbers.map(load).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        data = data.mp_prefetch(options, worker_init_fn=_prepare_worker)
        # The workers' arrays lie in shared memory, and must not be held by whoever holds a batch when the process ends.
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
            _give_shared_memory_back(failure)
            del failure  # or it and this frame would keep each other alive


def _copied(batch):
    return jax.tree.map(np.array, batch)


def _give_shared_memory_back(failure):
    """Frees grain's arrays that nobody asked for; at the end of the process it would be too late, with a warning."""
    # The frames of a traceback, and those that called them, hold batches: grain cuts its own out of the traceback only.
    for frame, _ in traceback.walk_tb(failure and failure.__traceback__):
        for caller, _ in traceback.walk_stack(frame):
            with contextlib.suppress(RuntimeError):  # one that is still running
                caller.clear()
    gc.collect()  # grain's iterators are cycles
    # grain unlinks in a thread, which the end of the process would not wait for.
    arrays = sys.modules.get('grain._src.python.ipc.shared_memory_array')
    unlinking = getattr(getattr(arrays, 'SharedMemoryArray', None), '_del_thread_pool', None)
    if unlinking is not None:
        unlinking.apply(int)  # behind all that it was given


def _prepare_worker(index, count):
    """The main process decides when a worker ends: it ignores signals sent to all, and does not outlive its parent."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(1)  # there is a process for each core already
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent):
    parent.join()
    os._exit(1)
