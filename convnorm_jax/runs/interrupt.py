"""Stopping between two steps, so that Ctrl-C or a scheduler's SIGTERM loses nothing."""

import signal
import threading


class StopRequest:
    """Within `with`, notes the first SIGINT or SIGTERM instead of ending the process; a second one ends it.

    Attributes:
      signal: number of the signal that asked to stop, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        del frame
        self.signal = number
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self._restore()


class Stopped(Exception):
    """A run, or a sweep, was asked to stop and saved what it has.

    Attributes:
      signal: number of the signal that asked.
    """

    def __init__(self, number: int, words: str) -> None:
        super().__init__(f'{words}; rerun the same command to resume')
        self.signal = number
