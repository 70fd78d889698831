"""Checkpoints by Orbax: atomic, asynchronous, the latest and the best kept."""

import contextlib
import os

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


def _rank(metrics):
    # The first of equals is the best, whatever was saved later.
    return (metrics['rating'], -metrics['step'])


class Checkpointer:
    """Saves and restores what a run needs to continue: device arrays and host progress.

    Keeps the `keep` latest checkpoints and the one with the best rating.
    """

    def __init__(self, workdir, keep=2, read_only=False):
        self.folder = os.path.abspath(os.path.join(workdir, 'checkpoints'))
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_rank,
            best_mode='max',
            preservation_policy=policy,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        handlers = {'arrays': ocp.StandardCheckpointHandler(), 'progress': ocp.JsonCheckpointHandler()}
        with self._readable(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
            self._manager.best_step()  # reads the ratings, which may be damaged

    @contextlib.contextmanager
    def _readable(self, folder):
        """Turns what Orbax raises for a damaged folder, which is of many kinds, into one line."""
        try:
            yield
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'.strip().split('\n')[0][:200]
            raise ValueError(
                f'{folder}: the checkpoint can not be read ({reason}); '
                'move the damaged step away to go on from the one before it'
            ) from error

    @property
    def latest_step(self):
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self):
        """Step of the checkpoint with the best rating; None if none was rated."""
        return self._manager.best_step()

    def save(self, step, arrays, progress, rating=None):
        """Saves in the background.

        Args:
          step: int.
          arrays: pytree of arrays; may be donated to the next step as soon as this returns.
          progress: JSON-able dict.
          rating: how good it is, for `best_step`; None leaves it unrated.
        """
        metrics = None if rating is None else {'rating': rating, 'step': step}
        # force: the loop decides when to save, not Orbax.
        self._manager.save(
            step,
            metrics=metrics,
            force=True,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(progress)),
        )

    def restore(self, step, like):
        """(arrays, progress) of a step.

        Args:
          step: int.
          like: pytree of arrays or ShapeDtypeStructs with shardings, the structure saved.

        Raises:
          ValueError: the checkpoint can not be read as such.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        with self._readable(f'{self.folder}/{step}'):
            restored = self._manager.restore(step, args=items)
        return restored['arrays'], restored['progress']

    def restore_progress(self, step):
        """The progress alone, see `restore`."""
        with self._readable(f'{self.folder}/{step}'):
            return self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))['progress']

    def close(self):
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
