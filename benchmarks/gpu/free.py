"""The last stage of the GPU plan: the published Free protocol, in pieces of the minutes that there are.

ResNet-18 on CIFAR-10 as in configs/cifar10_free_adversarial.py, in bfloat16, with one layer and then with the next;
when a run has ended FGSM, PGD-20 and AutoAttack on 1000 test images. Stopped at any time it leaves parts of its
checkpoint (see `packed_state`), from which it goes on the next time. The net that is attacked is the one that was
packed.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile

import jax
import jax.numpy as jnp

from benchmarks.gpu import packed_data, packed_state
from convnorm_jax import mesh
from convnorm_jax.cli.command_line import read_config
from convnorm_jax.reports import classifier as run_report
from convnorm_jax.runs import metrics
from convnorm_jax.runs.checkpoint import Checkpointer
from convnorm_jax.training import loop, setup

CONFIG = os.path.join('configs', 'cifar10_free_adversarial.py')
OVERRIDES = {
    'model.dtype': 'bfloat16',
    'plots': False,
    'attack.pgd_steps': 20,
    'eval.suite': 'standard',
    'eval.parts': ('autoattack',),
    'eval.examples': 1000,
    'eval.batch_size': 500,
    'checkpoint.every_steps': 0,
}
# The same place every time: a run knows its data by the folder.
_ROOT = os.path.join(tempfile.gettempdir(), 'convnorm_gpu_plan')


class OutOfTime(Exception):
    """Raised by the alarm, wherever no training notes it."""


def run(report, data, output, seconds, resume='', layers=('convnorm', 'batchnorm'), overrides=None, saving=35.0):
    """Trains and attacks until the time is over.

    Args:
      data: as `packed_data.pack` writes it.
      output: folder that the parts of the checkpoint are written to. resume: folder with those of before, or ''.
      seconds: that there are. saving: how many of them are kept for writing the parts.
      layers: in this order.
      overrides: {key of the config: value} beyond `OVERRIDES`.
    """
    if not data:
        raise ValueError('--data is missing: give CIFAR-10 as benchmarks/pack_gpu.py packs it')
    shutil.rmtree(_ROOT, ignore_errors=True)
    runs, data_dir = os.path.join(_ROOT, 'runs'), os.path.join(_ROOT, 'data')
    with _alarm(seconds - saving), _no_time_left(report):
        packed_data.unpack(data, data_dir)
        held = packed_state.load(resume, runs) if resume else None
        for layer in layers:
            workdir = os.path.join(runs, layer)
            if is_done(workdir):
                continue
            experiment = setup.build(_config(layer, data_dir, overrides or {}))
            if held and held[0] == layer:
                _put_back(experiment, workdir, *held[1:])
            if not _go_on(report, experiment, layer, runs, output):
                return


def _config(layer, data_dir, overrides):
    config = read_config([f'--config={CONFIG}', f'--config.model.layer={layer}', f'--config.data.data_dir={data_dir}'])
    for key, value in {**OVERRIDES, **overrides}.items():
        *sections, name = key.split('.')
        section = config
        for part in sections:
            section = section[part]
        section[name] = tuple(value) if isinstance(value, list) else value
    return config


@contextlib.contextmanager
def _alarm(seconds):
    """Within it, SIGTERM comes after so many seconds: the training loop stops at it, and saves; else `OutOfTime`."""

    def raise_it(number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGTERM, raise_it)
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    try:
        yield
    finally:
        _no_alarm()
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _no_time_left(report):
    """Within it, `OutOfTime` is said and no error: nothing new was trained."""
    try:
        yield
    except OutOfTime:
        report.say('no time was left for the next run; what was packed before holds')


def _no_alarm():
    signal.setitimer(signal.ITIMER_REAL, 0)


def _go_on(report, experiment, layer, runs, output):
    """Trains and attacks; returns whether all of it is done. What there is is packed in any case."""
    workdir, total = os.path.join(runs, layer), experiment.total_steps
    before, stopped = _steps_done(experiment, workdir), False
    try:
        if before < total:
            try:
                loop.train(experiment, workdir)
            except loop.Stopped:
                stopped = True
            _say_training(report, layer, workdir)
        if not stopped:
            if before < total:
                _pack(report, experiment, layer, runs, output)
                _put_back(experiment, workdir, *packed_state.load(output, runs)[1:])
            _attack(report, experiment, layer, workdir)
    except OutOfTime:
        stopped = True
    if stopped:
        _no_alarm()
    done = is_done(workdir)
    _pack(report, experiment, layer, runs, output, done)
    report.say(f'{layer}: {"done" if done else "goes on the next time, with --resume"}')
    return done


def is_done(workdir):
    """Whether a run was trained and attacked to its end: its result may be of an evaluation that was interrupted."""
    try:
        with open(os.path.join(workdir, 'result.json')) as file:
            result = json.load(file)
    except FileNotFoundError:
        return False
    return 'autoattack_accuracy' in result and 'incomplete' not in result


def _steps_done(experiment, workdir):
    found = Checkpointer(workdir, read_only=True) if os.path.isdir(os.path.join(workdir, 'checkpoints')) else None
    step = found.latest_step if found else None
    if found:
        found.close()
    return step or 0


def _arrays_like(experiment):
    totals = mesh.replicate(experiment.mesh, metrics.zero_totals(experiment.metric_names))
    return {'state': experiment.abstract_state(), 'totals': totals}


def _put_back(experiment, workdir, decode, progress):
    """Makes the packed state the only checkpoint of a run."""
    shutil.rmtree(os.path.join(workdir, 'checkpoints'), ignore_errors=True)
    checkpointer = Checkpointer(workdir, experiment.config.checkpoint.keep)
    checkpointer.save(progress['step'], decode(_arrays_like(experiment)), progress)
    checkpointer.close()


def _pack(report, experiment, layer, runs, output, done=False):
    """Writes the parts: of the run that goes on with its newest checkpoint, of one that is done without it."""
    workdir = os.path.join(runs, layer)
    if done:
        shutil.rmtree(os.path.join(workdir, 'evaluation'), ignore_errors=True)
        size = packed_state.save(output, runs)
    elif not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        report.say(f'{layer}: there was no time for a checkpoint')
        return
    else:
        checkpointer = Checkpointer(workdir, read_only=True)
        arrays, progress, _ = checkpointer.restore_one('latest', _arrays_like(experiment))
        checkpointer.close()
        if progress['step'] == experiment.total_steps:  # nothing moves any more
            state = arrays['state']
            arrays['state'] = dataclasses.replace(state, opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))
        size = packed_state.save(output, runs, layer, jax.device_get(arrays), progress)
    report.row(layer=layer, packed_bytes=size)
    report.say(f'{layer}: packed, {size / 1e6:.1f} MB')


def _say_training(report, layer, workdir):
    rows = metrics.read_rows(os.path.join(workdir, 'metrics.csv'))
    for row in rows:
        report.row(layer=layer, **row)
    columns = ('epoch', 'learning_rate', 'train_loss', 'train_accuracy', 'validation_accuracy', 'examples_per_second')
    for row in rows[-5:]:
        report.show({'Free': layer, **{name: row.get(name) for name in columns}})


def _attack(report, experiment, layer, workdir):
    with contextlib.redirect_stdout(sys.stderr):
        result = run_report.report(experiment, workdir)
    report.row(layer=layer, result=result)
    names = ('test_accuracy', 'fgsm_accuracy', 'pgd_accuracy', 'autoattack_accuracy')
    report.show({'Free, attacked': layer, **{name: f'{100 * result[name]:.2f} %' for name in names}})
