"""Train a net and report on it, or evaluate a run: flags and wiring only.

python -m experiments.main --config=configs/digits_convnorm.py [--workdir=DIR]
    [--mode=train|eval] [--config.KEY=VALUE ...]
"""

import os
import sys

from absl import flags, logging

from experiments import command_line

flags.DEFINE_string('workdir', None, "the run's folder (default: runs/ and a name made from the config)")
flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'train and report, or evaluate what --workdir holds')


def run():
    """One command, from `sys.argv`; returns the exit code. User errors are raised as ValueError."""
    config, workdir, mode = command_line.parse(sys.argv)
    # Only now: a mistake on the command line is answered before anything heavy is loaded.
    from convnorm_jax.mesh import reserve_host_threads
    from convnorm_jax.training import loop, setup
    from convnorm_jax.training.workdir import check_workdir
    from experiments import gan_report, gan_scores, report

    reserve_host_threads()
    if mode == 'train':
        check_workdir(workdir, config)
    experiment = setup.build(config)
    generates = config.train.algorithm == 'gan'
    if mode == 'train':
        print(_headline(experiment, workdir), file=sys.stderr)
        try:
            loop.train(gan_scores.with_scorer(experiment, workdir) if generates else experiment, workdir)
        except loop.Stopped as stop:
            print(stop, file=sys.stderr)
            return 128 + stop.signal  # what a shell says of a process that a signal ended
    (gan_report if generates else report).report(experiment, workdir)
    return 0


def _headline(experiment, workdir):
    config, prepared = experiment.config, experiment.prepared
    sizes = ', '.join(f'{len(getattr(prepared, part).labels)} {part}' for part in ('train', 'validation', 'test'))
    return (
        f'{config.model.name} with {config.model.layer} on {experiment.source.description} ({sizes} examples), '
        f'{experiment.total_steps} steps, run folder {workdir}'
    )


def main():
    """Runs the command; a user's mistake becomes one line and exit code 2.

    CONVNORM_TRACEBACK=1 in the environment shows where in the code it was noticed.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is meant
    if any(argument.lstrip('-') in ('help', 'h') for argument in sys.argv[1:]):
        print(__doc__.strip(), '\n\nEvery key of a config is in configs/default.py.', sep='')
        return 0
    try:
        return run()
    except ValueError as error:
        if os.environ.get('CONVNORM_TRACEBACK'):
            raise
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
