"""Where a run's figures go: CSV, TensorBoard, and the progress line."""

import csv
import json
import os
import sys

import jax
import jax.numpy as jnp
from tensorboardX import SummaryWriter
from tqdm import tqdm

COLUMNS = (
    'epoch',
    'step',
    'learning_rate',
    'train_loss',
    'train_accuracy',
    'gradient_norm',
    'validation_loss',
    'validation_accuracy',
    'examples_per_second',
)


def zero_totals():
    """Running (sum, count) pairs of the training metrics, all zero."""
    return {name: (jnp.zeros(()), jnp.zeros(())) for name in ('loss', 'accuracy', 'gradient_norm')}


def means(totals):
    """Host floats sum / count of (sum, count) pairs; NaN where the count is 0."""
    totals = jax.device_get(totals)
    return {name: float(s) / float(n) if n else float('nan') for name, (s, n) in totals.items()}


def write_json(path, content):
    """Writes a JSON file in one stroke: a reader sees the old one or the new one."""
    with open(path + '.tmp', 'w') as file:
        json.dump(content, file, indent=2)
        file.write('\n')
    os.replace(path + '.tmp', path)


def read_rows(path):
    """Rows of a metrics.csv as dicts of floats; empty cells and rows cut short are left out."""
    if not os.path.exists(path):
        return []
    with open(path, newline='') as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]


class MetricWriter:
    """Writes one row an epoch to `metrics.csv` and TensorBoard.

    On a resume the rows after the restored step are dropped, so that the file is that of
    an uninterrupted run.
    """

    def __init__(self, workdir, step):
        self.path = os.path.join(workdir, 'metrics.csv')
        kept = [row for row in read_rows(self.path) if row['step'] <= step]
        self._rewrite(kept)
        self._board = SummaryWriter(workdir, purge_step=step + 1 if step else None)

    def _rewrite(self, rows):
        temporary = self.path + '.tmp'
        with open(temporary, 'w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
            writer.writeheader()
            writer.writerows({**row, 'epoch': int(row['epoch']), 'step': int(row['step'])} for row in rows)
        os.replace(temporary, self.path)

    def write(self, row):
        """Appends a row (a dict with some of `COLUMNS`) and puts it on the disk."""
        with open(self.path, 'a', newline='') as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
            file.flush()
            os.fsync(file.fileno())
        self.scalars(row, row['step'])
        self._board.flush()

    def scalars(self, values, step):
        """Puts values on TensorBoard only."""
        for name, value in values.items():
            if name not in ('epoch', 'step'):
                self._board.add_scalar(name, value, step)

    def close(self):
        """Flushes and closes the TensorBoard events."""
        self._board.close()


class Progress:
    """One line: epoch, loss, accuracy, examples/s, time left; and a line for each epoch."""

    def __init__(self, total_steps, step, enabled=True):
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit='step',
            disable=not enabled,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            bar_format='{desc} [{percentage:.0f}% of {total_fmt} steps, left {remaining}]',
        )

    def update(self, step, epoch, epochs, values, examples_per_second):
        """Shows the figures at a step."""
        self._bar.set_description_str(
            f'epoch {epoch}/{epochs}  loss {values["loss"]:.4f}  accuracy {values["accuracy"]:.4f}  '
            f'{examples_per_second:,.0f} examples/s',
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def line(self, text):
        """Prints a line of its own above the progress line."""
        self._bar.write(text, file=sys.stderr)

    def close(self):
        """Ends the progress line."""
        self._bar.close()
