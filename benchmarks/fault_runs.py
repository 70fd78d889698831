"""The runs that benchmarks/faults.py interrupts, and what they leave."""

import os
import socket
import sys
import time

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


class Run:
    """One run folder, and the commands given in it.

    Attributes:
      workdir: its folder; the output of the commands is in `log`.
    """

    def __init__(self, context, kind, workdir, processes=1, log=None):
        self.context, self.kind, self.workdir, self.processes = context, kind, workdir, processes
        self.log = log or workdir + '.log'
        self.seen = 0

    def start(self):
        """Starts the command; returns its processes."""
        port = free_port()
        self.seen = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        started = []
        for i in range(self.processes):
            joined = [f'--coordinator=localhost:{port}', f'--num_processes={self.processes}', f'--process_id={i}']
            arguments = [*KINDS[self.kind], *COMMON, f'--workdir={self.workdir}', *(joined * (self.processes > 1))]
            started.append(warm.start(self.context, arguments, self.log))
        return started

    def said(self):
        """The output of the last command so far."""
        if not os.path.exists(self.log):
            return ''
        with open(self.log, errors='replace') as file:
            file.seek(self.seen)
            return file.read()

    def wait_for_training(self, processes):
        """Returns when the data is loaded and the net built, or when a process has ended."""
        while 'run folder' not in self.said() and all(p.is_alive() for p in processes):
            time.sleep(0.01)

    def newest(self):
        """Folder of the newest checkpoint, or None."""
        folder = os.path.join(self.workdir, 'checkpoints')
        names = [n for n in os.listdir(folder) if n.isdigit()] if os.path.isdir(folder) else []
        return os.path.join(folder, max(names, key=int)) if names else None


def free_port():
    """A port that is not in use."""
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
    """The difference between two `contents`; '' if they are equal."""
    if one[0] != other[0]:
        return f'ends at step {other[0]}, not {one[0]}'
    names = [name for name in one[1].keys() | other[1].keys() if one[1].get(name) != other[1].get(name)]
    if names:
        return f'{len(names)} of {len(one[1])} arrays differ, {min(names)} among them'
    return '' if one[2] == other[2] else 'metrics.csv differs'


def alone(context, kind, folder, processes):
    """Runs twice without faults and checks that the runs are equal.

    Returns:
      (contents, seconds until training starts, seconds from there to the end).
    """
    found = []
    for name in ('cold', 'warm'):  # the second finds the compiled programs, as later runs do: its time is used
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
