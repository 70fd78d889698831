"""A profile of a few steps, for TensorBoard's profile page or Perfetto."""

import os

import jax

from convnorm_jax.files import written
from convnorm_jax.mesh import is_leader

# Steps that are left out at first: compilation, and what follows it.
_WARM_UP = 3


class Profiler:
    """Writes a trace of some steps to `workdir/profile`, by `jax.profiler`; of many processes, the leader's.

    Attributes:
      folder: of the traces.
      steps: how many; 0 for none.
    """

    def __init__(self, workdir, steps):
        self.folder, self.steps = os.path.join(workdir, 'profile'), steps if is_leader() else 0
        self._done = 0

    def step_done(self, work):
        """To be called after each step with arrays that it makes.

        Returns:
          The folder when the trace has just been written, else None.
        """
        self._done += 1
        if not self.steps:
            return None
        if self._done == _WARM_UP:
            jax.block_until_ready(work)
            with written(self.folder):
                jax.profiler.start_trace(self.folder)
        if self._done != _WARM_UP + self.steps:
            return None
        jax.block_until_ready(work)
        return self.close()

    def close(self):
        """Ends a trace that is being made; returns the folder if one was."""
        if not self.steps or self._done < _WARM_UP:
            return None
        self.steps = 0
        with written(self.folder):
            jax.profiler.stop_trace()
        return self.folder
