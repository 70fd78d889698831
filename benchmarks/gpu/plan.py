"""What is measured in the minutes that there are: stages in order of value, and those that no longer fit."""

import dataclasses
import time

# Seconds at the end that no stage may use: to kill a worker, and to write what was found.
RESERVE = 4.0
# A stage is killed at so many times its estimate, but not before so many seconds.
PATIENCE, LEAST_LIMIT = 3.0, 60.0
# One measurement says so much about the next stage of its kind, and no more.
LEAST_FACTOR, MOST_FACTOR = 0.3, 5.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """Something to measure.

    Attributes:
      name: of the command line's --stages.
      title: one line.
      family: stages whose times tell of each other, e.g. all training steps.
      seconds: how long it takes on an H100, as far as known before the run.
      run: 'module:function', see `worker`.
      options: {name: value} of that function.
      takes_what_is_left: it can stop at any time, goes on the next time, and needs `seconds` at least.
    """

    name: str
    title: str
    family: str
    seconds: float
    run: str
    options: dict = dataclasses.field(default_factory=dict)
    takes_what_is_left: bool = False


class Plan:
    """Time-keeping: which stages are begun, and when they are stopped.

    Attributes:
      left_out: [(stage, its estimate, seconds that were left)].
    """

    def __init__(self, stages, seconds, now=time.monotonic):
        self._stages, self._now, self._end = list(stages), now, now() + seconds
        self._factors = {}  # of each family, in the order of the measurements
        self.left_out = []

    def remaining(self):
        """Seconds until the end, without the reserve; never negative."""
        return max(0.0, self._end - RESERVE - self._now())

    def estimate(self, stage):
        """Seconds that a stage is expected to take, by what this run has seen so far."""
        factors = self._factors
        factor = factors.get(stage.family) or (list(factors.values())[-1] if factors else 1.0)
        return stage.seconds if stage.takes_what_is_left else stage.seconds * factor

    def limit(self, stage):
        """Seconds after which a stage that begins now is killed."""
        if stage.takes_what_is_left:
            return self.remaining()
        return min(self.remaining(), max(PATIENCE * self.estimate(stage), LEAST_LIMIT))

    def note(self, stage, seconds):
        """Learns from what a stage took."""
        if not stage.takes_what_is_left:
            factor = min(max(seconds / stage.seconds, LEAST_FACTOR), MOST_FACTOR)
            self._factors.pop(stage.family, None)  # the latest one is the last
            self._factors[stage.family] = factor

    def __iter__(self):
        """The stages that fit, when their turn comes; the others go to `left_out`."""
        for stage in self._stages:
            estimate, left = self.estimate(stage), self.remaining()
            if estimate > left:
                self.left_out.append((stage, estimate, left))
            else:
                yield stage
