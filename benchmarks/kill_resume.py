"""Kills a training run with SIGKILL at random moments and shows that nothing is lost.

    python -m benchmarks.kill_resume [--kills=3] [--seed=0] [--config=configs/digits_convnorm.py]

One run is left alone. The other is started, killed at a moment drawn uniformly from the
time that the first one took (start-up and compilation included), and started again with the
same command, as often as asked or until it ends. Both must end with the same state, bit for
bit, and the same metrics.csv (but for the speed column).
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from convnorm_jax.training.metrics import read_rows


def command(options, workdir):
    """The command line of one run, without attacks and pictures."""
    return [
        sys.executable,
        '-m',
        'experiments.main',
        f'--config={options.config}',
        f'--workdir={workdir}',
        '--config.attack.names=()',
        '--noconfig.plots',
        '--config.checkpoint.every_steps=7',
        f'--config.train.epochs={options.epochs}',
    ]


def latest_step(workdir):
    """Newest complete checkpoint of a run, 0 if none."""
    folder = os.path.join(workdir, 'checkpoints')
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return max((int(n) for n in names if n.isdigit()), default=0)


def run_and_kill(options, workdir, delay):
    """Runs for `delay` seconds, None for ever; True if it was killed before its end."""
    with open(workdir + '.log', 'a') as log:
        process = subprocess.Popen(command(options, workdir), stdout=log, stderr=log)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
    if process.returncode:
        with open(workdir + '.log') as log:
            raise SystemExit(f'the run failed by itself (exit {process.returncode}):\n{log.read()[-2000:]}')
    return False


def final_state(workdir):
    """Everything in the newest checkpoint, as {name: NumPy array}."""
    path = os.path.join(os.path.abspath(workdir), 'checkpoints', str(latest_step(workdir)), 'arrays')
    tree = ocp.StandardCheckpointer().restore(path)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def rows(workdir):
    """metrics.csv without the speed."""
    return [
        {k: v for k, v in row.items() if k != 'examples_per_second'}
        for row in read_rows(os.path.join(workdir, 'metrics.csv'))
    ]


def main():
    """Prints one line for each kill and the verdict; exits with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=40)
    parser.add_argument('--config', default='configs/digits_convnorm.py')
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = os.path.join(folder, 'alone'), os.path.join(folder, 'killed')
        start = time.time()
        run_and_kill(options, alone, None)
        seconds = time.time() - start
        print(f'uninterrupted: step {latest_step(alone)} in {seconds:.0f} s', flush=True)
        for kill in range(options.kills):
            if not run_and_kill(options, killed, generator.uniform(0, seconds)):
                print(f'kill {kill + 1}: came too late, the run had ended')
                break
            print(f'kill {kill + 1}: newest checkpoint then was step {latest_step(killed)}', flush=True)
        run_and_kill(options, killed, None)
        reference, resumed = final_state(alone), final_state(killed)
        same = reference.keys() == resumed.keys() and all(
            np.array_equal(reference[k], resumed[k], equal_nan=True) for k in reference
        )
        same_rows = rows(alone) == rows(killed)
        print(
            f'{len(reference)} arrays after step {latest_step(killed)}: '
            f'{"equal bit for bit" if same else "DIFFERENT"}; metrics.csv: {"equal" if same_rows else "DIFFERENT"}'
        )
    sys.exit(0 if same and same_rows else 1)


if __name__ == '__main__':
    main()
