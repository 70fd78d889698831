"""The one training loop: a new algorithm is a new step, never another loop."""

import dataclasses
import math
import os
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.errors import UserError
from convnorm_jax.runs.checkpoint import Checkpointer, first_fitting
from convnorm_jax.runs.disk import explained
from convnorm_jax.runs.interrupt import Stopped, StopRequest
from convnorm_jax.runs.lock import locked
from convnorm_jax.runs.metrics import MetricWriter
from convnorm_jax.runs.profile import Profiler
from convnorm_jax.runs.progress import Progress, ProgressLine
from convnorm_jax.runs.workdir import check_workdir, prepare_workdir, save_config
from convnorm_jax.training.batches import Waiting
from convnorm_jax.training.experiment import Experiment
from convnorm_jax.training.totals import means, zero_totals

NON_FINITE = 'the loss or the gradient became infinite or NaN'


class NonFiniteLoss(UserError):
    """The loss or the gradient became infinite or NaN."""


def train(experiment: Experiment, workdir: str) -> Progress:
    """Trains to the end of the config, resuming the run that `workdir` holds.

    Args:
      experiment: see `setup.build`.
      workdir: of the run; made if it is missing.

    Returns:
      `Progress` at the end.

    Raises:
      UserError: `workdir` holds another run, another process trains there, or all checkpoints are damaged.
      DiskTrouble: it cannot be written; the last good checkpoint is kept.
      NonFiniteLoss: the last good checkpoint is kept.
      Stopped: after a SIGINT or SIGTERM, with everything saved.
    """
    experiment.abstract_state()  # a net that cannot take these images is refused before a folder is made
    check_workdir(workdir, experiment.config)
    with explained(workdir), locked(workdir):
        return _train(experiment, workdir)


def _train(experiment, workdir):
    prepare_workdir(workdir, experiment.config, experiment.prepared)
    checkpointer = Checkpointer(workdir, experiment.config.checkpoint.keep)
    try:
        run = _Run(experiment, workdir, checkpointer)
        save_config(workdir, experiment.config)  # only now: a refused config does not replace the old one
        return run.run()
    finally:
        checkpointer.close()


def restore_variables(experiment: Experiment, workdir: str, which: str) -> tuple[Any, Progress, Progress]:
    """As `restore_state`, but returns the variables to evaluate instead of the state."""
    state, chosen, final = restore_state(experiment, workdir, which)
    return state.eval_variables, chosen, final


def restore_state(experiment: Experiment, workdir: str, which: str) -> tuple[Any, Progress, Progress]:
    """(state, `Progress` at that checkpoint, `Progress` at the end) of a run.

    Args:
      experiment: the run; workdir: its folder.
      which: 'best', by its rating (the latest if none was rated), or 'latest'.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        raise UserError(f'--workdir={workdir}: no checkpoint there yet; train first')
    checkpointer = Checkpointer(workdir, read_only=True)
    try:
        likes = _expected(experiment, _no_totals(experiment))
        arrays, progress, final = first_fitting(lambda like: checkpointer.restore_one(which, like), likes)
    finally:
        checkpointer.close()
    return experiment.completed(arrays['state']), Progress(**progress), Progress(**final)


def _arrays(state, totals):
    return {'state': state, 'totals': totals}


def _expected(experiment, totals):
    return [_arrays(state, totals) for state in experiment.abstract_states()]


def _no_totals(experiment):
    return mesh_lib.replicate(experiment.mesh, zero_totals(experiment.metric_names))


class _Run:
    """One call of `train`: the state, the totals of the epoch so far, and the host's progress."""

    def __init__(self, experiment, workdir, checkpointer):
        self.experiment, self.config = experiment, experiment.config
        self.checkpointer, self.workdir = checkpointer, workdir
        self.totals, self.progress = _no_totals(experiment), Progress()
        found, latest = first_fitting(checkpointer.resume, _expected(experiment, self.totals)), None
        if found is None:
            self.state = experiment.initial_state()
        else:
            latest, arrays, saved = found
            self.state, self.totals = experiment.completed(arrays['state']), arrays['totals']
            self.progress = Progress(**saved)
        if self.progress.step > experiment.total_steps:
            raise UserError(
                f'{workdir} is at step {latest}, past the end of this config at {experiment.total_steps}; '
                'give it a longer train.epochs, or another --workdir'
            )
        self.epochs = math.ceil(experiment.total_steps / experiment.steps_per_epoch)
        self.stop_request = StopRequest()
        self.compiled = False
        full = self._last_full_epoch(latest or 0)
        self.writer = MetricWriter(workdir, full, experiment.columns, latest or 0)
        self.display = ProgressLine(experiment.total_steps, self.progress.step)
        if latest is not None:
            self.display.line(f'resuming {workdir} at step {latest} of {experiment.total_steps}')
        self.checked = latest or 0  # the last step known to be finite
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1), compiler_options=mesh_lib.compiler_options())
        self._norm = jax.jit(optax.global_norm)
        self.feed, self.waiting = experiment.feed(), Waiting()
        self.batches = self.feed.batches(self.progress.step)
        self.profiler = Profiler(workdir, self.config.log.profile_steps)

    def _last_full_epoch(self, step):
        """The last step whose row of metrics.csv is kept: a shorter run may have ended within an epoch."""
        if step == self.experiment.total_steps:
            return step
        return step - step % self.experiment.steps_per_epoch

    def _train_step(self, state, totals, *arrays):
        mesh = self.experiment.mesh
        batch = mesh_lib.shard_batch(mesh, self.feed.take(*arrays))
        with mesh_lib.in_use(mesh):
            state, sums = self.experiment.train_step(state, batch)
        return state, jax.tree.map(jnp.add, totals, sums)

    def run(self):
        total, per_epoch = self.experiment.total_steps, self.experiment.steps_per_epoch
        with self.stop_request:
            try:
                while self.progress.step < total and not self._out_of_patience():
                    epoch = self.progress.step // per_epoch
                    self._train_epoch(epoch, min((epoch + 1) * per_epoch, total))
                    self._end_epoch(epoch)
            finally:
                self.batches.close()
                self._say_profiled(self.profiler.close())
                self.display.close()
                self.writer.close()
                self.checkpointer.wait()  # a signal must not interrupt the last one
            if self._asked_to_stop(self.progress.step):  # at the end: before anything else starts
                raise self._stopped()
            return self.progress

    def _stopped(self):
        number = self.stop_request.signal or signal.SIGTERM
        return Stopped(number, f'stopped and saved at step {self.progress.step}')

    def _train_epoch(self, epoch, end):
        experiment, every = self.experiment, self.config.checkpoint.every_steps
        self.waiting.begin_epoch(self.progress.seconds)
        start = time.perf_counter()
        while self.progress.step < end:
            self.state, self.totals = self._step(self.state, self.totals, *self._next_batch())
            self.progress.step += 1
            if self.compiled:
                self.progress.examples += experiment.batch_examples
            else:  # wait for the first step, which compiles, and start the clock after it
                jax.block_until_ready(self.totals)
                self.compiled, start = True, time.perf_counter()
                self.waiting.begin_epoch(self.progress.seconds)
            self._say_profiled(self.profiler.step_done(self.totals))
            step = self.progress.step
            if step % self.config.log.every_steps == 0 and step < end:
                start = self._log(epoch, start)
            stops = step < end and self._asked_to_stop(step)
            if step < end and (stops or (every and step % every == 0)):
                start = self._checkpoint(start)
            if stops:
                raise self._stopped()
        jax.block_until_ready(self.totals)
        self.progress.seconds += time.perf_counter() - start
        self._warn_of_input(ended=True)

    def _say_profiled(self, folder):
        if folder:
            self.display.line(f'wrote a profile to {folder}; look at it with xprof {folder}, or ui.perfetto.dev')

    def _next_batch(self):
        if not self.feed.streamed:
            return next(self.batches)
        return self.waiting.next_batch(self.batches, self.totals)

    def _warn_of_input(self, ended):
        if self.feed.streamed:
            warning = self.waiting.warning(self.progress.seconds, self.feed.training.images.workers, ended)
            if warning:
                self.display.line(warning)

    def _asked_to_stop(self, step):
        """Whether any process was asked to stop; several processes ask at every log step, together."""
        if jax.process_count() > 1 and step % self.config.log.every_steps and step % self.experiment.steps_per_epoch:
            return False
        return mesh_lib.any_process(self.stop_request.signal is not None)

    def _clock(self, start):
        """Adds the time since `start`; returns the time now. Call it when the devices are done."""
        now = time.perf_counter()
        self.progress.seconds += now - start
        return now

    def _log(self, epoch, start):
        values = self._finite_means()  # waits for the device
        start = self._clock(start)
        self._warn_of_input(ended=False)
        self._show(epoch, values)
        running = {f'running_{name}': value for name, value in values.items() if name.endswith('loss')}
        self.writer.scalars(running, self.progress.step)
        return start

    def _show(self, epoch, values):
        words = (
            f'epoch {epoch + 1}/{self.epochs}',
            self.experiment.describe(values),
            f'{self.progress.examples_per_second:,.0f} examples/s',
        )
        self.display.update(self.progress.step, '  '.join(words))

    def _checkpoint(self, start):
        self._check_parameters()
        start = self._clock(start)
        self._save()
        return time.perf_counter()

    def _finite_means(self, *extra):
        """Means over the epoch so far; raises NonFiniteLoss if any step of it, or `extra`, was not finite."""
        values = means(self.totals)
        if not all(map(math.isfinite, [*values.values(), *extra])):
            saved = self.checkpointer.latest_step
            kept = (
                f'the last good checkpoint is of step {saved} in {self.checkpointer.folder}'
                if saved is not None
                else 'there was no checkpoint yet'
            )
            raise NonFiniteLoss(
                f'{NON_FINITE} between steps {self.checked} and '
                f'{self.progress.step}; {kept}; try a smaller config.optimizer.learning_rate '
                f'({self.config.optimizer.learning_rate}) or config.schedule.warmup_epochs, in another --workdir'
            )
        self.checked = self.progress.step
        return values

    def _check_parameters(self):
        """As `_finite_means`, also of the parameters after the last update."""
        return self._finite_means(float(self._norm(self.state.params)))

    def _end_epoch(self, epoch):
        experiment, step = self.experiment, self.progress.step
        values = self._check_parameters()
        found = experiment.validate(self.state, step, self.workdir)
        speed = self.progress.examples_per_second
        row = {
            'epoch': epoch + 1,
            'step': step,
            'learning_rate': float(experiment.schedule(step - 1)),
            **experiment.training_row(values),
            'examples_per_second': speed,
            **found,
        }
        rating, warning = experiment.rating(found), experiment.warning(row, self.progress)
        self._rate(rating, step)
        self._show(epoch, values)
        words = experiment.describe(values), experiment.describe_validation(found), f'{speed:,.0f} examples/s'
        self.display.line('  '.join([f'epoch {epoch + 1:>3}/{self.epochs}', *filter(None, words)]))
        if warning:
            self.display.line(f'warning: {warning}')
        self.writer.write(row)
        if step % experiment.steps_per_epoch == 0:  # a longer run may still finish the last epoch
            self.totals = _no_totals(experiment)
        self._save(rating)
        if step < experiment.total_steps and self._asked_to_stop(step):
            raise self._stopped()

    def _rate(self, rating, step):
        """Records the best rating and the epochs since."""
        progress = self.progress
        progress.rating = rating
        if rating is None:
            return
        if progress.best_rating is None or rating > progress.best_rating:
            progress.best_step, progress.best_rating, progress.epochs_since_best = step, rating, 0
        else:
            progress.epochs_since_best += 1

    def _out_of_patience(self):
        progress, patience = self.progress, self.config.train.early_stopping_epochs
        if not patience or progress.epochs_since_best < patience:
            return False
        self.display.line(
            f'early stopping: nothing better than {progress.best_rating:.4f} '
            f'(step {progress.best_step}) in {progress.epochs_since_best} epochs'
        )
        return True

    def _save(self, rating=None):
        self.checkpointer.save(
            self.progress.step, _arrays(self.state, self.totals), dataclasses.asdict(self.progress), rating
        )
