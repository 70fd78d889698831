"""Interrupts runs in five ways at random moments and shows that nothing is lost on the way.

    python -m benchmarks.faults [--moments=2] [--seed=0] [--kinds=clean,free,gan]
        [--faults=kill,terminate,corrupt,disk,process] [--jobs=2] [--output=faults.json]

For each kind of training one run is left alone, and another is interrupted again and again, and started again with
the same command, until it is through; then a new one begins, until there were so many moments of that kind and fault
(2 make 30 in all):
  kill       SIGKILL
  terminate  SIGTERM, after which it must save and end with exit code 143
  corrupt    SIGKILL; then a bit of a file of the newest checkpoint flips, or the file is cut short
  disk       the disk becomes full (a small tmpfs, which needs root): one line of error, exit code 2; then there is room
  process    the run is two processes, one gets SIGKILL: the other must end by itself, not with 0
A quarter of the moments lie in the start of the command, the others in its training and its report; with two
processes all of them lie behind the start, for a process waits long for one that never comes.

Every run must end with the state of the one left alone, bit for bit, and its metrics.csv but for the speed. The
processes are forked from one that has imported everything: no start is spent on imports.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl import logging

from benchmarks import warm

KINDS = {
    'clean': [
        '--config=configs/digits_convnorm.py',
        '--config.model.width=8',
        '--config.model.depth=(1,)',
        '--config.train.epochs=3',
    ],
    'free': [
        '--config=configs/digits_free_adversarial.py',
        '--config.model.width=8',
        '--config.model.depth=(1,)',
        '--config.train.epochs=4',
    ],
    'gan': [
        '--config=configs/digits_gan.py',
        '--config.model.width=8',
        '--config.gan.generator_width=8',
        '--config.gan.passes=1',
        '--config.gan.score_examples=0',
        '--config.train.steps=40',
        '--config.eval.samples=64',
        '--config.eval.features=()',
    ],
}
COMMON = [
    '--config.checkpoint.every_steps=4',
    '--config.checkpoint.keep=3',
    '--config.log.every_steps=4',
    '--noconfig.plots',
    '--config.attack.names=()',
]
FAULTS = ('kill', 'terminate', 'corrupt', 'disk', 'process')
PATIENCE = 300  # seconds that a process may take to notice what happened
IN_START = 0.25  # share of the moments


@dataclasses.dataclass
class Cell:
    """What one kind of training went through under one fault.

    Attributes:
      moments, starts, runs, equal: interruptions, commands given, runs that came to their end, as they should.
      seconds: from each moment to the end of the processes it left alive.
      notes: whatever was not as it should be, and what was left out.
    """

    kind: str
    fault: str
    moments: int = 0
    starts: int = 0
    runs: int = 0
    equal: int = 0
    seconds: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)


class Run:
    """One run folder, and the commands given in it.

    Attributes:
      workdir: its folder; what the commands said is in `log`.
    """

    def __init__(self, context, kind, workdir, processes=1, log=None):
        self.context, self.kind, self.workdir, self.processes = context, kind, workdir, processes
        self.log = log or workdir + '.log'
        self.seen = 0

    def start(self):
        """Gives the command; returns its processes."""
        port = free_port()
        self.seen = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        started = []
        for i in range(self.processes):
            joined = [f'--coordinator=localhost:{port}', f'--num_processes={self.processes}', f'--process_id={i}']
            arguments = [*KINDS[self.kind], *COMMON, f'--workdir={self.workdir}', *(joined * (self.processes > 1))]
            started.append(warm.start(self.context, arguments, self.log))
        return started

    def said(self):
        """What the last command said so far."""
        if not os.path.exists(self.log):
            return ''
        with open(self.log, errors='replace') as file:
            file.seek(self.seen)
            return file.read()

    def wait_for_training(self, processes):
        """Returns when the data is loaded and the net built, or a process is gone."""
        while 'run folder' not in self.said() and all(p.is_alive() for p in processes):
            time.sleep(0.01)

    def newest(self):
        """Folder of the newest checkpoint, or None."""
        folder = os.path.join(self.workdir, 'checkpoints')
        names = [n for n in os.listdir(folder) if n.isdigit()] if os.path.isdir(folder) else []
        return os.path.join(folder, max(names, key=int)) if names else None


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


def contents(workdir):
    """(step, {name: (dtype, shape, bytes)} of the newest checkpoint, rows of metrics.csv without the speed)."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from convnorm_jax.runs.metrics import read_rows

    path = Run(None, '', workdir).newest()
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(f'{path}/arrays').item_metadata.tree
    host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    arrays = jax.tree_util.tree_leaves_with_path(checkpointer.restore(f'{path}/arrays', restore_args=host))
    bits = {jax.tree_util.keystr(k): (str(v.dtype), v.shape, v.tobytes()) for k, v in arrays}
    rows = read_rows(os.path.join(workdir, 'metrics.csv'))
    return os.path.basename(path), bits, [{**row, 'examples_per_second': 0} for row in rows]


def difference(one, other):
    """What differs between two `contents`; '' for nothing."""
    if one[0] != other[0]:
        return f'ends at step {other[0]}, not {one[0]}'
    names = [name for name in one[1].keys() | other[1].keys() if one[1].get(name) != other[1].get(name)]
    if names:
        return f'{len(names)} of {len(one[1])} arrays differ, {min(names)} among them'
    return '' if one[2] == other[2] else 'metrics.csv differs'


def alone(context, kind, folder, processes):
    """(contents, seconds to the training, seconds from there) of a run left alone; of two, which must be equal."""
    found = []
    for name in ('cold', 'warm'):  # the second finds the compiled programs: its time is that of those to come
        run = Run(context, kind, os.path.join(folder, f'{kind}-{processes}-{name}'), processes)
        start = time.monotonic()
        started = run.start()
        run.wait_for_training(started)
        middle = time.monotonic()
        for process in started:
            process.join()
        end = time.monotonic()
        if any(process.exitcode for process in started):
            raise SystemExit(f'{kind}: a run left alone failed:\n{run.said()[-2000:]}')
        found.append(contents(run.workdir))
    if difference(*found):
        raise SystemExit(f'{kind}: two runs left alone are not equal: {difference(*found)}')
    print(
        f'{kind}, {processes} processes: {middle - start:.1f} s to the training, {end - middle:.1f} s', file=sys.stderr
    )
    return found[-1], middle - start, end - middle


class Interruptions:
    """Interrupts runs of one kind by one fault until there were so many moments."""

    def __init__(self, context, cell, reference, moments, generator, folder):
        self.context, self.cell, self.moments, self.generator, self.folder = context, cell, moments, generator, folder
        self.expected, self.in_start, self.in_training = reference

    def go(self):
        """Returns the cell, filled."""
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
        )  # not on a full disk
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
        """Waits for a random moment; False if the run ended before."""
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
        """Waits for the end of a command that nothing happens to."""
        for process in started:
            process.join(PATIENCE)
        codes = [process.exitcode for process in started]
        # After many cuts in a row no whole checkpoint may be left: then the same command starts from 0.
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
        # Outside of the training the signal ends it at once, which a shell calls 143, too; or it came just too late.
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
        # 0: it had done all that it does when the first was killed.
        return (
            ''
            if other.exitcode in (0, 1, 2, 75, -signal.SIGABRT)
            else f'exit code {other.exitcode} of the other process'
        )


def table(cells):
    """The cells as Markdown; 'slowest end' is the longest that a process outlived what happened."""
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
    """A type for argparse: a,b,c of known names."""

    def parse(text):
        found = text.split(',')
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f'expected some of {",".join(known)}')
        return found

    return parse


def main():
    """Prints the table and whatever went wrong; exits with 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--moments', type=int, default=2, help='of each kind and fault')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kinds', type=names(KINDS), default=list(KINDS))
    parser.add_argument('--faults', type=names(FAULTS), default=list(FAULTS))
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--output', help='a JSON file of what is in the table')
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
