"""A profile of a few steps, for TensorBoard's profile page or Perfetto."""

import os
from typing import Any

import jax

from convnorm_jax.files import written
from convnorm_jax.mesh import is_leader

# The first steps are left out: compilation, and what follows it.
_WARM_UP = 3


class Profiler:
    """Writes a trace of some steps to `workdir/profile` by `jax.profiler`; of several processes, the leader's.

    Attributes:
      folder: of the traces.
      steps: how many; 0 for none.
    """

    def __init__(self, workdir: str, steps: int) -> None:
        self.folder, self.steps = os.path.join(workdir, 'profile'), steps if is_leader() else 0
        self._done = 0

    def step_done(self, work: Any) -> str | None:
        """Call it after each step with arrays that the step computes.

        Returns:
          The folder if the trace has just been written, else None.
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

    def close(self) -> str | None:
        """Ends a running trace; returns its folder, None if there was none."""
        if not self.steps or self._done < _WARM_UP:
            return None
        self.steps = 0
        with written(self.folder):
            jax.profiler.stop_trace()
        return self.folder
