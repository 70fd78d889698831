"""The progress of a run, and the line that shows it."""

import dataclasses
import sys
import time

from tqdm import tqdm

from convnorm_jax.mesh import is_leader


@dataclasses.dataclass
class Progress:
    """The host's part of a run's state; saved with every checkpoint.

    Attributes:
      step: updates done.
      best_step, best_rating: of the best state so far, see `Experiment.rating`; None if none was rated.
      rating: of the last epoch.
      epochs_since_best: for early stopping.
      seconds, examples: training time without compilation and evaluation, and examples in it.
    """

    step: int = 0
    best_step: int = 0
    best_rating: float | None = None
    rating: float | None = None
    epochs_since_best: int = 0
    seconds: float = 0.0
    examples: int = 0

    @property
    def examples_per_second(self) -> float:
        """Training speed; 0 before anything was timed."""
        return self.examples / self.seconds if self.seconds else 0.0


class ProgressLine:
    """One line with the metrics so far and the time left, and a line for each epoch.

    Without a terminal, such as in a log file, the line is printed again every minute. Of several processes, the leader
    prints.
    """

    SECONDS_BETWEEN_LINES = 60

    def __init__(self, total_steps: int, step: int) -> None:
        self._terminal, self._prints = sys.stderr.isatty() and is_leader(), is_leader()
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self._terminal,
            bar_format='{desc} [{percentage:.0f}% of {total_fmt} steps, left {remaining}]',
        )
        self._start, self._first, self._total = time.monotonic(), step, total_steps
        self._printed = self._start

    def update(self, step: int, text: str) -> None:
        """Shows a text at a step."""
        if self._terminal:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._printed > self.SECONDS_BETWEEN_LINES:
            elapsed = time.monotonic() - self._start
            left = elapsed * (self._total - step) / max(step - self._first, 1)
            self.line(f'{text} [step {step} of {self._total}, left {tqdm.format_interval(left)}]')

    def line(self, text: str) -> None:
        """Prints a separate line above the progress line."""
        self._printed = time.monotonic()
        if self._terminal:
            self._bar.write(text, file=sys.stderr)
        elif self._prints:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the progress line."""
        self._bar.close()
