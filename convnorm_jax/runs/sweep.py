"""The runs of a sweep: which of them are finished, and their processes."""

import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from convnorm_jax.configs.default import KEYS
from convnorm_jax.configs.keys import flatten
from convnorm_jax.errors import UserError
from convnorm_jax.runs.interrupt import Stopped, StopRequest
from convnorm_jax.runs.workdir import keep_earlier_result, load_config, read_result

# Settings of the attacks that result.json holds, by the names of the config.
_ATTACK_FIGURES = ('epsilon', 'step_size', 'pgd_steps', 'restarts')
_SECONDS_BETWEEN_LOOKS = 0.1


@dataclasses.dataclass(frozen=True)
class Run:
    """One combination of a grid with one seed.

    Attributes:
      values: {grid key: value}, in the order of the grid.
      seed: of this run.
      folder: of this run.
      arguments: of `convnorm_jax.cli.run`.
      config: that they make.
    """

    values: dict
    seed: int
    folder: str
    arguments: tuple[str, ...]
    config: ConfigDict

    @property
    def name(self) -> str:
        """Name of the folder."""
        return os.path.basename(self.folder)


def finished_result(run: Run) -> dict[str, Any] | None:
    """The flat dict of a run's result.json; None unless it is there and of this config."""
    result = read_result(run.folder)
    try:
        saved = flatten(load_config(run.folder))
    except UserError:
        return None
    if result is None or 'incomplete' in result:
        return None
    given = flatten(run.config)
    same = all(given[k] == saved.get(k, given[k]) for k in given if KEYS[k].affects_result)
    # An evaluation by hand writes another result but the same config.
    attacks = ((result.get(name), given[f'attack.{name}']) for name in _ATTACK_FIGURES)
    return result if same and all(found in (None, value) for found, value in attacks) else None


def run_all(
    runs: Sequence[Run],
    jobs: int,
    say: Callable[[str], None],
    ended: Callable[[Run, dict | None, float, str], None] = lambda *_: None,
) -> list[Run]:
    """Runs `convnorm_jax.cli.run` for each, up to `jobs` at a time, each in a process of its own.

    Their output is appended to log.txt in their folders.

    Args:
      runs: those to do.
      jobs: at least 1.
      say: prints a line of text.
      ended: called with (run, its result, seconds, '') after a run, or with (run, None, seconds, why it failed).

    Returns:
      The runs that failed.

    Raises:
      Stopped: after a first SIGINT or SIGTERM, when the processes have saved and stopped.
    """
    waiting = list(enumerate(runs, 1))
    running: list[_Process] = []
    failed: list[Run] = []
    told = False
    with StopRequest() as stop:
        try:
            while running or (waiting and not stop.signal):
                while waiting and len(running) < jobs and not stop.signal:
                    number, run = waiting.pop(0)
                    running.append(_Process(run, f'[{number}/{len(runs)}] {run.name}', say))
                if stop.signal and not told:
                    told = True
                    say('stopping: the runs save first')
                    _interrupt(running)
                for process in [process for process in running if process.ended()]:
                    running.remove(process)
                    failed += [process.run] if process.failed(told, say, ended) else []
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException:  # a second Ctrl-C: the second one makes the runs stop at once
            _interrupt(running)
            raise
    if stop.signal and (told or waiting):
        raise Stopped(stop.signal, 'stopped')
    return failed


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """{key: its short name}: without its section, where that is clear enough."""
    short = {key: key.split('.', 1)[-1] for key in keys}
    vague = [name for name in short.values() if name in ('name', 'kind') or list(short.values()).count(name) > 1]
    return {key: key if name in vague else name for key, name in short.items()}


class _Process:
    """A run's process; it holds the lock on its log.txt until it ends, even if the sweep is killed first."""

    def __init__(self, run, title, say):
        self.run, self.title, self.begin = run, title, time.monotonic()
        self.path, self.start = os.path.join(run.folder, 'log.txt'), 0
        self.process, self.error = None, f'another process is working in {run.folder}'
        try:
            os.makedirs(run.folder, exist_ok=True)
            with open(self.path, 'ab') as log:
                if _lock(log):
                    self.start = log.tell()
                    keep_earlier_result(run.folder)  # a result at the end is then new
                    self.process = _start(run, log)
                    say(f'{title}: started')
        except OSError as error:
            self.error = f'{run.folder}: cannot write there ({error.strerror})'

    def ended(self):
        return self.process is None or self.process.poll() is not None

    def interrupt(self):
        if not self.ended():
            self.process.send_signal(signal.SIGINT)

    def failed(self, told, say, ended):
        """Prints in one line how it ended; True if it failed without having been told to stop."""
        problem, seconds = self._problem(), time.monotonic() - self.begin
        if not problem or not told:
            ended(self.run, None if problem else finished_result(self.run), seconds, problem or '')
        if not problem:
            say(f'{self.title}: done in {seconds:.0f} s, {_headline(finished_result(self.run))}')
        elif told and self.process:
            say(f'{self.title}: {self._last_line()}')
        else:
            say(f'{self.title}: failed: {problem}')
        return bool(problem) and not told

    def _problem(self):
        if not self.process:
            return self.error
        code = self.process.returncode
        if code:
            return f'{f"exit code {code}" if code > 0 else f"killed by signal {-code}"}: {self._last_line()}'
        return None if finished_result(self.run) else f'no result.json of this config in {self.run.folder}'

    def _last_line(self):
        """The last line it printed."""
        with open(self.path, 'rb') as log:
            log.seek(self.start)
            lines = [line.strip() for line in log.read().decode(errors='replace').splitlines()]
        return next((line for line in reversed(lines) if line), 'it said nothing')


def _headline(result):
    if 'test_accuracy' in result:
        return f'test accuracy {100 * result["test_accuracy"]:.2f} %'
    name = next(name for name in ('fid', 'fid_classifier') if name in result)
    return f'{name} {result[name]:.3f}'


def _lock(file):
    """False if another process holds the lock; a process that inherits the file holds the lock until it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _start(run, log):
    # A session of its own keeps Ctrl-C in the terminal from it: the sweep sends it one SIGINT.
    return subprocess.Popen(
        [sys.executable, '-m', 'convnorm_jax.cli.run', *run.arguments, f'--workdir={run.folder}'],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, 'PYTHONUNBUFFERED': '1'},  # otherwise the table would come after the error
    )


def _interrupt(processes):
    for process in processes:
        process.interrupt()
