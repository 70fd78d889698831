"""Train a net and report on it, or evaluate a run.

convnorm train --config=digits_convnorm [--workdir=DIR] [--config.KEY=VALUE ...]
convnorm eval --workdir=DIR [--config.KEY=VALUE ...]
    [--coordinator=HOST:PORT --num_processes=N --process_id=I]

In a clone, python -m experiments.main --config=configs/digits_convnorm.py [--mode=train|eval] is the same.
On several hosts run the same command on each. SLURM, a TPU pod and Kubernetes connect the processes; elsewhere give the
last three options. --workdir must be a folder that all hosts share.
"""

import contextlib
import os
import sys

from absl import flags

from convnorm_jax.cli import command_line

flags.DEFINE_string('workdir', None, "the run's folder (default: runs/ and a name made from the config)")
flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'train and report, or evaluate what --workdir holds')
flags.DEFINE_string('coordinator', '', 'HOST:PORT of process 0, if the environment does not give it')
flags.DEFINE_integer('num_processes', 0, 'processes of this run, if the environment does not give it')
flags.DEFINE_integer('process_id', -1, 'number of this process, from 0')

LOST = 75  # exit code when another process has ended: EX_TEMPFAIL, rerunning the command may succeed


def run() -> int:
    """One command, from `sys.argv`; returns the exit code. A user's mistake is raised as `UserError`."""
    config, workdir, mode = command_line.parse(sys.argv)
    # JAX is imported only now: a mistake on the command line is answered without it.
    import jax

    from convnorm_jax import mesh
    from convnorm_jax.cli.compiled import keep_programs

    mesh.reserve_host_threads()
    options = flags.FLAGS
    mesh.start_distributed(options.coordinator, options.num_processes, options.process_id)
    if jax.process_count() == 1:
        # GPU autotuning is collective: a process with a cache hit would leave the others waiting. Only the user knows
        # a folder that all processes share.
        keep_programs()
        return _train_and_report(config, workdir, mode)
    return _run_together(config, workdir, mode)


def _run_together(config, workdir, mode):
    """One process of several: the leader prints, but all print errors."""
    from jax.errors import JaxRuntimeError

    from convnorm_jax import mesh
    from convnorm_jax.errors import UserError

    try:
        mesh.check_same_everywhere('config, --workdir or --mode', [config.to_dict(), workdir, mode])
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(sys.stdout if mesh.is_leader() else nowhere):
            return _train_and_report(config, workdir, mode)
    except JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' in str(error):  # of this process
            _leave(command_line.report_error(error))
        words = ' '.join(str(error).split())[:200]
        lost = UserError(
            f'another process of this run has ended ({words}); rerun the same command on every host to resume from '
            'the last checkpoint'
        )
        lost.__cause__ = error
        command_line.report_error(lost)
        _leave(LOST)
    except Exception as error:
        _leave(command_line.report_error(error))


def _leave(code):
    """Ends this process at once: a normal exit would wait for the others, which may wait for this one."""
    sys.stdout.flush()
    os._exit(code)


def _train_and_report(config, workdir, mode):
    from convnorm_jax import mesh
    from convnorm_jax.reports import classifier as report
    from convnorm_jax.reports import gan as gan_report
    from convnorm_jax.reports import gan_scores
    from convnorm_jax.runs.disk import explained
    from convnorm_jax.runs.workdir import check_workdir
    from convnorm_jax.training import loop, setup

    if mode == 'train':
        check_workdir(workdir, config)
    generates = config.train.algorithm == 'gan'
    if generates and mode == 'train':
        gan_scores.check_scorers(config)
    experiment = setup.build(config)
    if mode == 'train':
        if mesh.is_leader():
            print(_headline(experiment, workdir), file=sys.stderr)
        try:
            with explained(workdir):
                loop.train(gan_scores.with_scorer(experiment, workdir) if generates else experiment, workdir)
        except loop.Stopped as stop:
            if mesh.is_leader():
                print(stop, file=sys.stderr)
            return 128 + stop.signal  # what a shell says of a process that a signal ended
    with explained(workdir):
        (gan_report if generates else report).report(experiment, workdir)
    return 0


def _headline(experiment, workdir):
    config, prepared = experiment.config, experiment.prepared
    sizes = ', '.join(f'{len(getattr(prepared, part).labels)} {part}' for part in ('train', 'validation', 'test'))
    return (
        f'{config.model.name} with {config.model.layer} on {experiment.source.description} ({sizes} examples), '
        f'{experiment.total_steps} steps, run folder {workdir}'
    )


def main() -> int:
    """The command, see `command_line.run_command`."""
    return command_line.run_command(run, __doc__, command_line.ABOUT_CONFIGS)


if __name__ == '__main__':
    sys.exit(main())
