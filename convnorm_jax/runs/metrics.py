"""Writes and reads the metrics of a run: CSV, JSON lines, TensorBoard events."""

import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from convnorm_jax.files import write_text, written
from convnorm_jax.mesh import is_leader


def read_rows(path: str) -> list[dict[str, float]]:
    """Rows of a metrics.csv as dicts of floats; leaves out empty cells and incomplete rows."""
    try:
        with open(path, newline='', errors='replace') as file:
            rows = [_numbers(row) for row in csv.DictReader(line.replace('\0', '') for line in file)]
    except FileNotFoundError:
        return []
    return [row for row in rows if row.keys() >= {'epoch', 'step'}]


def _numbers(row):
    """A row's cells as numbers; {} for a row that a full disk or a kill has truncated."""
    if None in row or None in row.values():  # more cells than columns, or fewer
        return {}
    try:
        return {name: float(cell) for name, cell in row.items() if cell}
    except ValueError:
        return {}


def read_lines(path: str) -> list[dict[str, Any]]:
    """The dicts of a file of JSON lines; leaves out truncated lines."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(path, errors='replace') as file:
        for line in file:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and 'step' in line]


class MetricWriter:
    """Writes rows of epochs to `metrics.csv`; these and values within an epoch to `metrics.jsonl` and TensorBoard.

    Of several processes, the leader writes.

    Args:
      workdir: of the run.
      step: rows after it are dropped, so that the files of a resumed run are those of an uninterrupted one.
      columns: of `metrics.csv`.
      reached: values within an epoch after this step are dropped; None: after `step`.
    """

    def __init__(self, workdir: str, step: int, columns: Sequence[str], reached: int | None = None) -> None:
        self.path = os.path.join(workdir, 'metrics.csv')
        self._columns = columns
        self._board: _Board | None = None
        if not is_leader():
            return
        self._lines = os.path.join(workdir, 'metrics.jsonl')
        kept = [row for row in read_rows(self.path) if row['step'] <= step]
        self._rewrite(kept)
        until = lambda line: step if 'epoch' in line or reached is None else reached
        lines = [line for line in read_lines(self._lines) if line['step'] <= until(line)]
        write_text(self._lines, ''.join(json.dumps(line) + '\n' for line in lines))
        self._board = _Board(workdir, step + 1)

    def _rewrite(self, rows):
        file = io.StringIO(newline='')
        writer = csv.DictWriter(file, self._columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows({**row, 'epoch': int(row['epoch']), 'step': int(row['step'])} for row in rows)
        write_text(self.path, file.getvalue())

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row, which has some of the columns, and syncs it to disk."""
        if self._board is None:
            return
        with written(self.path), open(self.path, 'a', newline='') as file:
            csv.DictWriter(file, self._columns).writerow(row)
            file.flush()
            os.fsync(file.fileno())
        self.scalars(row, row['step'])
        self._board.flush()

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Writes values to TensorBoard and `metrics.jsonl`."""
        if self._board is None:
            return
        with written(self._lines), open(self._lines, 'a') as file:
            file.write(json.dumps({'step': step, **values}) + '\n')
        for name, value in values.items():
            if name not in ('epoch', 'step'):
                self._board.scalar(name, value, int(step))

    def close(self) -> None:
        """Flushes and closes the TensorBoard events."""
        if self._board is not None:
            self._board.close()


class _Board:
    """TensorBoard events, written in this thread.

    tensorboardX's own writer uses a thread. When a full disk ends that thread, no error is raised, and later events
    wait for it forever.
    """

    SECONDS_BETWEEN_FLUSHES = 60

    def __init__(self, folder, purge_step) -> None:
        self._path = os.path.join(folder, 'events')
        with written(self._path):
            self._writer = EventsWriter(self._path)
        self._write(step=purge_step, file_version='brain.Event:2')
        self._write(
            step=purge_step, session_log=SessionLog(status=SessionLog.START)
        )  # TensorBoard hides what was written after this step
        self.flush()

    def _write(self, **content):
        with written(self._path):
            self._writer.write_event(Event(wall_time=time.time(), **content))

    def scalar(self, name, value, step):
        self._write(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > self.SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self):
        with written(self._path):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self):
        with written(self._path):
            self._writer.close()
