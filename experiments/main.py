"""Train a net and report on it, or evaluate a run: flags and wiring only.

python -m experiments.main --config=configs/digits_convnorm.py [--workdir=DIR]
    [--mode=train|eval] [--config.KEY=VALUE ...]
"""

import sys

from absl import flags, logging

from experiments import command_line

flags.DEFINE_string('workdir', None, "the run's folder (default: runs/ and a name made from the config)")
flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'train and report, or evaluate what --workdir holds')


def run(argv):
    """One command, from its arguments; user errors are raised as ValueError."""
    config, workdir, mode = command_line.parse(argv)
    # Only now: a mistake on the command line is answered before anything heavy is loaded.
    from convnorm_jax.training import loop, setup
    from experiments.report import report

    if mode == 'train':
        loop.check_workdir(workdir, config)
    experiment = setup.build(config)
    if mode == 'train':
        print(_headline(experiment, workdir), file=sys.stderr)
        loop.train(experiment, workdir)
    return report(experiment, workdir)


def _headline(experiment, workdir):
    config, prepared = experiment.config, experiment.prepared
    sizes = ', '.join(f'{len(getattr(prepared, part).labels)} {part}' for part in ('train', 'validation', 'test'))
    return (
        f'{config.model.name} with {config.model.layer} on {experiment.source.description} ({sizes} examples), '
        f'{experiment.total_steps} steps, run folder {workdir}'
    )


def main(argv=None):
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is meant
    try:
        run(sys.argv if argv is None else argv)
    except ValueError as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
