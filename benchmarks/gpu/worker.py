"""The process that holds the GPU: it does one stage after the other, and can be killed at any time.

    python -m benchmarks.gpu.worker FILE_DESCRIPTOR

reads a line of JSON for each stage on its standard input, {'run': 'module:function', 'options': {...}}, and writes
lines of JSON to the descriptor: {'row': {...}} to be saved, {'line': text} to be shown, {'done': error or ''} at the
end. So what was measured before a stage was killed is known to `Worker`, its other end, and one process at a time
holds memory of the device. Whatever else is printed goes to the log.
"""

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback


class Worker:
    """A worker process, seen from the plan; started on the first stage, and again after it was killed or died."""

    def __init__(self, log, environment):
        self._log, self._environment, self._process, self._lines = log, environment, None, None

    def run(self, run, options, seconds, hear):
        """One stage.

        Args:
          run, options: see `plan.Stage`.
          seconds: after which it is killed.
          hear: is given every message but the last, as it comes.

        Returns:
          '' or why it did not end.
        """
        end = time.monotonic() + seconds
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps({'run': run, 'options': options}) + '\n')
            self._process.stdin.flush()
        except OSError:  # it died between two stages
            return self._lost()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.kill()
                return f'killed after {seconds:.0f} s'
            if line is None:
                return self._lost()
            message = json.loads(line)
            if 'done' in message:
                return message['done']
            hear(message)

    def kill(self):
        """Ends the process, whatever it does."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _lost(self):
        code = self._process.wait()
        self._process = None
        return f'the process died (exit code {code}), see the log'

    def _start(self):
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.gpu.worker', str(writing)],
            env={**os.environ, **self._environment},
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=[writing],
        )
        os.close(writing)
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(reading, self._lines), daemon=True).start()


def _read(descriptor, lines):
    with open(descriptor) as file:
        for line in file:
            lines.put(line)
    lines.put(None)


class Report:
    """What a stage says, seen from the worker. Rows are saved, tables and lines are shown."""

    def __init__(self, file):
        self._file, self._columns = file, None

    def row(self, **values):
        """Saves a row: JSON data."""
        self._send(row=values)

    def say(self, text):
        """Shows a line."""
        self._columns = None
        self._send(line=text)

    def show(self, cells):
        """Shows a row of a table, {column: text, number or None}, under a head where the columns are new ones."""
        from benchmarks import timing

        columns = list(cells)
        for line in timing.table([cells])[2 if columns == self._columns else 0 :]:
            self._send(line=line)
        self._columns = columns

    def done(self, error=''):
        """Ends a stage."""
        self._columns = None
        self._send(done=error)

    def _send(self, **message):
        self._file.write(json.dumps(message, default=float) + '\n')
        self._file.flush()


def main():
    """Stages, as they are asked for."""
    with open(int(sys.argv[1]), 'w') as file:
        report = Report(file)
        for line in sys.stdin:
            message = json.loads(line)
            module, function = message['run'].split(':')
            try:
                getattr(importlib.import_module(module), function)(report, **message['options'])
            except Exception as error:  # the next stage may be well
                traceback.print_exc()
                report.done(f'{type(error).__name__}: {" ".join(str(error).split())[:300]}')
            else:
                report.done()


if __name__ == '__main__':
    main()
