"""Interrupts runs in five ways at random moments and checks that no work is lost.

    python -m benchmarks.faults [--moments=2] [--seed=0] [--kinds=clean,free,gan]
        [--faults=kill,terminate,corrupt,disk,process] [--jobs=2] [--output=faults.json]

For each kind of training one run is left alone. Another one is interrupted and resumed with
the same command until it is finished; then a new run begins, until the number of moments for this kind and fault is
reached (2 make 30 in all). The faults:
  kill       SIGKILL
  terminate  SIGTERM, after which the run must save and end with exit code 143
  corrupt    SIGKILL; then a bit of a file of the newest checkpoint flips, or the file is truncated
  disk       the disk becomes full (a small tmpfs, which needs root): one line of error, exit code 2; then room is made
  process    the run has two processes and one gets SIGKILL: the other must end by itself, with a nonzero exit code
A quarter of the moments are during the start of the command, the others during training and the report. With two
processes all are after the start, because a process waits long for one that never arrives.

Each run must end with the same state as the one left alone, bit for bit, and with the same metrics.csv except for the
speed. The processes are forked from one that has imported everything, so that a start takes no time for imports.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from absl import logging

from benchmarks import warm
from benchmarks.fault_runs import KINDS, Run, alone, contents, difference

FAULTS = ('kill', 'terminate', 'corrupt', 'disk', 'process')
PATIENCE = 300  # seconds that a process may take to notice a fault
IN_START = 0.25  # share of the moments


@dataclasses.dataclass
class Cell:
    """The results of one kind of training under one fault.

    Attributes:
      moments: number of interruptions.
      starts: number of commands given.
      runs: number of runs that finished.
      equal: number of runs that ended as they should.
      seconds: from each moment to the end of the processes that it left alive.
      notes: everything that was wrong, and what was left out.
    """

    kind: str
    fault: str
    moments: int = 0
    starts: int = 0
    runs: int = 0
    equal: int = 0
    seconds: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)


class Interruptions:
    """Interrupts runs of one kind by one fault, until the number of moments is reached."""

    def __init__(self, context, cell, reference, moments, generator, folder):
        self.context, self.cell, self.moments, self.generator, self.folder = context, cell, moments, generator, folder
        self.expected, self.in_start, self.in_training = reference

    def go(self):
        """Returns the completed cell."""
        while self.cell.moments < self.moments and not self.cell.notes:
            workdir = os.path.join(self.folder, f'{self.cell.kind}-{self.cell.fault}-{self.cell.runs}')
            self.cell.runs += 1
            if self.cell.fault != 'disk':
                self._a_run(workdir)
                continue
            os.makedirs(workdir)
            if subprocess.run(
                ['mount', '-t', 'tmpfs', '-o', 'size=24m', 'tmpfs', workdir], capture_output=True
            ).returncode:
                self.cell.runs, self.cell.notes = 0, ['left out: mounting a tmpfs is not permitted']
                return self.cell
            try:
                self._a_run(os.path.join(workdir, 'run'))
            finally:
                subprocess.run(['umount', '-l', workdir], check=True)
        return self.cell

    def _a_run(self, workdir):
        log = os.path.join(
            self.folder, f'{self.cell.kind}-{self.cell.fault}-{self.cell.runs}.log'
        )  # not on the full disk
        run = Run(self.context, self.cell.kind, workdir, 2 if self.cell.fault == 'process' else 1, log)
        while True:
            started = run.start()
            self.cell.starts += 1
            hit = self.cell.moments < self.moments and self._wait(run, started)
            if hit:
                self.cell.moments += 1
                moment = time.monotonic()
                problem = getattr(self, f'_{self.cell.fault}')(run, started)
                self.cell.seconds.append(round(time.monotonic() - moment, 2))
            else:
                problem = self._end(run, started)
            if problem:
                self.cell.notes.append(f'{problem}; {workdir}: ...{run.said()[-1500:]}')
                return
            if not hit and all(p.exitcode == 0 for p in started):
                break
        problem = difference(self.expected, contents(workdir))
        self.cell.equal += not problem
        if problem:
            self.cell.notes.append(f'{problem}; {workdir}')

    def _wait(self, run, started):
        """Waits for a random moment; returns False if the run ended before it."""
        draw = self.generator
        if draw.random() < IN_START and self.cell.fault != 'process':
            delay = draw.uniform(0, self.in_start)
        else:
            run.wait_for_training(started)
            delay = draw.uniform(0, self.in_training)
        end = time.monotonic() + delay
        while time.monotonic() < end and all(p.is_alive() for p in started):
            time.sleep(0.005)
        return all(p.is_alive() for p in started)

    def _end(self, run, started):
        """Waits for the end of a command that is not interrupted."""
        for process in started:
            process.join(PATIENCE)
        codes = [process.exitcode for process in started]
        # After many corruptions in a row no intact checkpoint may be left; the same command then starts from step 0.
        if codes == [0] * len(codes) or (codes == [2] and 'all checkpoints were damaged' in run.said()):
            return ''
        return f'exit codes {codes} of a command left alone'

    def _kill(self, run, started):
        del run
        for process in started:
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    def _terminate(self, run, started):
        (process,) = started
        os.kill(process.pid, signal.SIGTERM)
        process.join(PATIENCE)
        # Outside training the signal ends the process at once (143 in a shell too); or it arrived after the end.
        if process.exitcode not in (143, -signal.SIGTERM, 0):
            return f'exit code {process.exitcode} after SIGTERM'
        if process.exitcode == 143 and not run.newest():
            return 'stopped without a checkpoint'

    def _corrupt(self, run, started):
        self._kill(run, started)
        newest = run.newest()
        files = [os.path.join(place, name) for place, _, names in os.walk(newest or '') for name in names]
        files = sorted(file for file in files if os.path.getsize(file))
        if not files:
            return
        path = self.generator.choice(files)
        with open(path, 'rb') as file:
            content = bytearray(file.read())
        place = self.generator.randrange(len(content))
        if self.generator.random() < 0.5:
            content[place] ^= 1 << self.generator.randrange(8)
        else:
            del content[place:]
        with open(path, 'wb') as file:
            file.write(content)

    def _disk(self, run, started):
        (process,) = started
        ballast = os.path.join(os.path.dirname(run.workdir), 'ballast')
        try:
            with open(ballast, 'wb', buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        except OSError:
            pass
        process.join(PATIENCE)
        said, code = run.said(), process.exitcode
        os.unlink(ballast)
        lines = [line for line in said.splitlines() if line.startswith('error: ')]
        good = code == 2 and len(lines) == 1 and 'no space left on the device' in lines[0] and 'Traceback' not in said
        return '' if good or code == 0 else f'exit code {code} with a full disk'

    def _process(self, run, started):
        del run
        victim = self.generator.choice(started)
        os.kill(victim.pid, signal.SIGKILL)
        other = started[1 - started.index(victim)]
        other.join(PATIENCE)
        victim.join()
        if other.is_alive():
            self._kill(None, [other])
            return f'the other process was still there after {PATIENCE} s'
        # 0: it had finished before the first one was killed.
        return (
            ''
            if other.exitcode in (0, 1, 2, 75, -signal.SIGABRT)
            else f'exit code {other.exitcode} of the other process'
        )


def table(cells):
    """The cells as Markdown; 'slowest end' is the longest time that a process outlived a fault."""
    lines = [
        '| training | fault | moments | commands needed | slowest end | runs | ended equal |',
        '|---|---|---:|---:|---:|---:|---:|',
    ]
    for cell in cells:
        equal = f'{cell.equal} of {cell.runs}' if cell.runs else 'left out'
        counts = f'{cell.moments} | {cell.starts} | {max(cell.seconds, default=0):.1f} s | {cell.runs}'
        lines.append(f'| {cell.kind} | {cell.fault} | {counts} | {equal} |')
    return '\n'.join(lines)


def names(known):
    """Makes a type for argparse: known names separated by commas."""

    def parse(text):
        found = text.split(',')
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f'expected some of {",".join(known)}')
        return found

    return parse


def main():
    """Prints the table and every problem; exits with 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--moments', type=int, default=2, help='of each kind and fault')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kinds', type=names(KINDS), default=list(KINDS))
    parser.add_argument('--faults', type=names(FAULTS), default=list(FAULTS))
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--output', help='a JSON file with the results')
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        context = warm.prepare(os.path.join(folder, 'compiled'))
        logging.set_verbosity(logging.ERROR)
        cells = [Cell(kind, fault) for kind in options.kinds for fault in options.faults]
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            wanted = sorted({(cell.kind, 1 + (cell.fault == 'process')) for cell in cells})
            found = pool.map(lambda which: alone(context, which[0], folder, which[1]), wanted)
            references = dict(zip(wanted, found))
            interrupted = [
                Interruptions(
                    context,
                    cell,
                    references[cell.kind, 1 + (cell.fault == 'process')],
                    options.moments,
                    random.Random(f'{options.seed} {cell.kind} {cell.fault}'),
                    folder,
                )
                for cell in cells
            ]
            for cell in pool.map(Interruptions.go, interrupted):
                print(f'{cell.kind}, {cell.fault}: {cell.equal} of {cell.runs} equal', file=sys.stderr, flush=True)
    print(table(cells))
    for cell in cells:
        for note in cell.notes:
            print(f'\n{cell.kind}, {cell.fault}: {note}')
    print(f'\nseed {options.seed}, {time.monotonic() - begin:.0f} s, {os.cpu_count()} cores')
    if options.output:
        with open(options.output, 'w') as file:
            json.dump([dataclasses.asdict(cell) for cell in cells], file, indent=2)
    sys.exit(any(cell.equal < cell.runs for cell in cells))


if __name__ == '__main__':
    main()
