"""Runs what the claims of the paper rest on, and reports on it: arXiv 2103.00673.

convnorm paper --claims=training,robust,noise,scarcity,gan [--scale=small|full] [--seeds=0,1,2] [--jobs=N]
    [--data_dir=DIR] [--workdir=runs/paper] [--output=results] [--mode=train|trial|plan|report]

Says what is left and about how long it takes, runs it, and reports: for each claim means over the seeds, the paired
differences of ConvNorm from the other layers with 95 % intervals, plots, and the sentence that the data allows. For
each layer the learning rate is chosen on the validation set by a run with seed 100. Rerun the same command to resume:
what --output holds is not run again. --mode=trial runs one run of each study for ten steps, with small attacks, and
reports nothing: do that before a long job. --mode=plan only says what is left, --mode=report reports what there is.
Writes CLAIM.json (with --scale=full CLAIM_full.json), report.md and plots to --output.
"""

import os
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from convnorm_jax.cli import command_line
from convnorm_jax.errors import UserError
from convnorm_jax.paper.claims import CLAIMS, SCALES, studies, title
from convnorm_jax.version import __version__

# A trial: ten steps, and attacks of a few images.
_TRIAL = (
    '--config.train.steps=10',
    '--config.eval.examples=16',
    '--config.eval.batch_size=16',
    '--config.attack.pgd_steps=2',
    '--config.eval.autoattack.steps=5',
    '--config.eval.autoattack.queries=10',
    '--config.eval.autoattack.targets=2',
    '--config.eval.samples=64',
    '--config.gan.score_examples=0',
)


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str], list[int]]:
    """(options, claims, seeds) of a command line.

    Raises:
      UserError: a mistake of the user, in one line.
    """
    values = flags.FlagValues()
    flags.DEFINE_list('claims', list(CLAIMS), f'some of {", ".join(CLAIMS)}', flag_values=values)
    flags.DEFINE_enum('scale', 'small', SCALES, 'for two cores, or the published nets', flag_values=values)
    flags.DEFINE_list('seeds', ['0', '1', '2'], 'whole numbers', flag_values=values)
    flags.DEFINE_integer('jobs', 1, 'runs at a time', lower_bound=1, flag_values=values)
    flags.DEFINE_string('data_dir', '', 'config.data.data_dir of the runs on CIFAR-10', flag_values=values)
    flags.DEFINE_string('workdir', os.path.join('runs', 'paper'), 'folder of the runs', flag_values=values)
    flags.DEFINE_string('output', 'results', 'folder of the results', flag_values=values)
    flags.DEFINE_enum(
        'mode', 'train', ['train', 'trial', 'plan', 'report'], 'run, or only say what is left', flag_values=values
    )
    command_line.parse_own(values, argv, ', '.join(f'--{name}' for name in sorted(values) if len(name) > 1))
    for claim in values.claims:
        if claim not in CLAIMS:
            raise UserError(
                f'--claims={",".join(values.claims)}: no claim {claim!r}; expected some of {", ".join(CLAIMS)}'
            )
    if not values.claims or len(set(values.claims)) < len(values.claims):
        raise UserError(f'--claims={",".join(values.claims)}: expected some of {", ".join(CLAIMS)}, each once')
    try:
        seeds = [int(seed) for seed in values.seeds]
    except ValueError as error:
        raise UserError(f'--seeds={",".join(values.seeds)}: expected whole numbers, e.g. --seeds=0,1,2') from error
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f'--seeds={",".join(values.seeds)}: expected whole numbers, each once')
    return values, values.claims, seeds


def run(argv: Sequence[str]) -> int:
    """One command; returns the exit code. A user's mistake is raised as `UserError`."""
    options, claims, seeds = parse(argv)
    from convnorm_jax.paper.record import Record
    from convnorm_jax.runs.interrupt import Stopped

    output = os.path.expanduser(options.output)
    records = {claim: Record(os.path.join(output, f'{_name(claim, options.scale)}.json')) for claim in claims}
    print(_plan(records, options, seeds), flush=True)
    if options.mode == 'plan':
        return 0
    failed = 0
    try:
        if options.mode == 'trial':
            return _try(claims, options, seeds[0])
        if options.mode == 'train':
            os.makedirs(output, exist_ok=True)
            for claim in claims:
                failed += _run_claim(claim, records[claim], options, seeds)
    except Stopped as stop:
        command_line.say(stop)
        return 128 + stop.signal  # what a shell says of a process that a signal ended
    _report(records, options, seeds, output, argv)
    if failed:
        command_line.say(f'{failed} runs failed; rerun the same command to try them again')
    return 1 if failed else 0


def _name(claim, scale):
    return claim if scale == 'small' else f'{claim}_{scale}'


def _run_claim(claim, record, options, seeds):
    """Runs what is missing of a claim: the learning rates first, then the seeds; returns the number of failures."""
    from convnorm_jax.paper.study import cells, tuning_cells
    from convnorm_jax.paper.summary import rates_of

    wanted = studies(claim, options.scale)
    tuning = [cell for study in wanted for cell in tuning_cells(study)]
    failed = _run_cells(claim, 'learning rates', tuning, record, options)
    for seed in seeds:
        of_seed = [cell for study in wanted for cell in cells(study, rates_of(study, record), [seed])]
        failed += _run_cells(claim, f'seed {seed}', of_seed, record, options)
    return failed


def _run_cells(claim, part, wanted, record, options):
    from convnorm_jax.data.sources import check_available
    from convnorm_jax.runs.sweep import run_all
    from convnorm_jax.training.loop import NON_FINITE

    runs = {}
    for cell in wanted:
        if record.find(cell) is None:
            planned = _as_run(cell, os.path.join(options.workdir, options.scale, claim, cell.folder), options.data_dir)
            runs[planned.folder] = planned, cell

    def ended(run, result, seconds, problem):
        if result is not None or NON_FINITE in problem:
            record.add(runs[run.folder][1], result, seconds, __version__)
            record.write({'claim': claim, 'scale': options.scale})

    if not runs:
        return 0
    for name, place in {(run.config.data.name, run.config.data.data_dir) for run, _ in runs.values()}:
        check_available(name, place or None)
    command_line.say(f'{claim}, {part}: {len(runs)} of {len(wanted)} runs to do')
    failed = run_all([planned for planned, _ in runs.values()], options.jobs, command_line.say, ended)
    return sum(record.find(runs[run.folder][1]) is None for run in failed)


def _try(claims, options, seed):
    """The first arm of each study for ten steps; returns the exit code."""
    from convnorm_jax.paper.study import cells
    from convnorm_jax.runs.sweep import run_all

    runs = []
    for claim in claims:
        for study in studies(claim, options.scale):
            arm = next(iter(study.arms))
            cell = next(cells(study, {arm: study.rates[0] if study.rates else None}, [seed]))
            folder = os.path.join(options.workdir, 'trial', options.scale, claim, cell.folder)
            runs.append(_as_run(cell, folder, options.data_dir, _TRIAL))
    failed = run_all(runs, options.jobs, command_line.say)
    command_line.say(f'{len(runs) - len(failed)} of {len(runs)} trials ended well')
    return 1 if failed else 0


def _as_run(cell, folder, data_dir, more=()):
    from convnorm_jax.runs.sweep import Run

    folder = os.path.expanduser(folder)
    place = [f'--config.data.data_dir={data_dir}'] if data_dir and 'digits' not in cell.study.config else []
    arguments = (*cell.arguments, *place, *more)
    config = command_line.read_config(arguments)
    return Run(dict(cell.settings), cell.seed, folder, arguments, config)


def _plan(records, options, seeds):
    """A table of what is done and left, and about how long it takes."""
    from convnorm_jax.paper.summary import summarize
    from convnorm_jax.reports.tables import markdown_table

    rows, hours = [], 0.0
    for claim, record in records.items():
        for study in studies(claim, options.scale):
            summary = summarize(study, record, seeds)
            left = len(summary.missing) + summary.waiting
            done = len(record.seconds(study, True)) + len(record.seconds(study, False))
            needed = summary.seconds_left / options.jobs / 3600
            rows.append([claim, study.name, f'{done}', f'{left}', f'{needed:.1f}'])
            hours += needed
    rows.append(['all', '', '', '', f'{hours:.1f}'])
    return markdown_table(['claim', 'study', 'done', 'left', 'hours left'], rows, 2)


def _report(records, options, seeds, output, argv):
    from convnorm_jax.paper.summary import summarize
    from convnorm_jax.reports.paper import report_claim, write_report

    sections = []
    for claim, record in records.items():
        summaries = [summarize(study, record, seeds) for study in studies(claim, options.scale)]
        if not any(any(summary.figures.values()) for summary in summaries):
            command_line.say(f'{claim}: no run yet')
            continue
        facts = {'scale': options.scale, 'command': _command(argv), 'hours': record.hours()}
        sections.append(report_claim(claim, title(claim), summaries, record, output, facts))
    if not sections:
        raise UserError(f'--output={options.output}: no finished run there of these claims, scale and seeds')
    path = os.path.join(output, f'{_name("report", options.scale)}.md')
    write_report(sections, path, f'The claims of the paper, {options.scale} scale')
    print('\n\n'.join(['', *sections, f'wrote {path}']), flush=True)


def _command(argv):
    """The command for someone else: without the places on this machine."""
    left_out = ('--mode=', '--data_dir=', '--workdir=', '--output=', '--jobs=')
    return shlex.join(['convnorm', 'paper', *(argument for argument in argv[1:] if not argument.startswith(left_out))])


def main() -> int:
    """The command, see `command_line.run_command`."""
    return command_line.run_command(lambda: run(sys.argv), __doc__)


if __name__ == '__main__':
    sys.exit(main())
