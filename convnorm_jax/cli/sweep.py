"""Runs an experiment over a grid of settings and several seeds, and makes tables of mean +- standard deviation.

convnorm sweep --config=cifar10_label_noise --workdir=runs/label_noise
    --grid=model.layer=convnorm,batchnorm --grid=data.label_noise.rate=0.0,0.2,0.4 --seeds=0,1
    [--rows=KEY,...] [--columns=KEY,...] [--jobs=N] [--mode=train|report] [--config.KEY=VALUE ...]

Every run has a folder of its own in --workdir. Rerun the same command to resume: finished runs are kept. With other
attacks (--config.attack.KEY=VALUE) the trained nets are evaluated again, without training.
Writes sweep.md, sweep.csv, sweep.json and, if a key of the grid is numeric, plots/sweep.png.
With --mode=report it only makes the tables.
"""

import itertools
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from convnorm_jax.cli import command_line
from convnorm_jax.configs.keys import flatten, value_text
from convnorm_jax.errors import UserError

if TYPE_CHECKING:
    from convnorm_jax.runs.sweep import Run


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, dict[str, list[str]], list[int], list[str]]:
    """(options, grid {key: values as typed}, seeds, arguments for the configs) of a command line.

    Raises:
      UserError: a mistake in the sweep's own options, in one line.
    """
    options = _options()
    try:
        arguments = options(argv, known_only=True)[1:]
    except flags.IllegalFlagValueError as error:
        raise UserError(str(error).removeprefix('flag ')) from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    given = [argument.lstrip('-').split('=', 1)[0] for argument in arguments if argument.startswith('-')]
    for name in given:
        if name.split('.')[0] not in ('config', 'noconfig', ''):
            raise UserError(f'--{name}: no such option; there are --config.KEY, {_names(options)}')
    if not options.workdir:
        raise UserError("--workdir is missing: give the sweep's folder, e.g. --workdir=runs/label_noise")
    grid = _grid(options.grid)
    for key in ('seed', *grid):
        if f'config.{key}' in given or f'noconfig.{key}' in given:
            where = '--seeds' if key == 'seed' else '--grid'
            raise UserError(f'--config.{key}: give it by {where} alone')
    return options, grid, _seeds(options.seeds), arguments


def run(argv: Sequence[str]) -> int:
    """One command; returns the exit code. A user's mistake is raised as `UserError`."""
    options, grid, seeds, arguments = parse(argv)
    workdir = os.path.expanduser(options.workdir)
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise UserError(f'--workdir={workdir}: cannot write there (it is a file); give another folder')
    # JAX is imported only now: a mistake in the options is answered without it.
    from convnorm_jax.reports import sweep as sweep_report
    from convnorm_jax.runs import sweep as sweep_lib
    from convnorm_jax.runs.interrupt import Stopped

    rows, columns = sweep_report.layout(list(grid), options.rows, options.columns)
    runs = plan(arguments, grid, seeds, workdir)
    failed = []
    if options.mode == 'train':
        todo = [run for run in runs if sweep_lib.finished_result(run) is None]
        command_line.say(
            f'{len(runs)} runs in {workdir}, {len(runs) - len(todo)} of them done before; each has its log.txt'
        )
        try:
            failed = sweep_lib.run_all(todo, options.jobs, command_line.say)
        except Stopped as stop:
            command_line.say(stop)
            return 128 + stop.signal  # what a shell says of a process that a signal ended
    results = [sweep_lib.finished_result(run) for run in runs]
    if any(results):
        sweep_report.report(runs, results, rows, columns, workdir, _command(argv))
    elif not failed:
        raise UserError(f'--workdir={workdir}: no finished run there of this config, grid and seeds')
    if failed:
        command_line.say(f'{len(failed)} of {len(runs)} runs failed; rerun the same command to try them again')
    elif None in results:
        command_line.say(f'{results.count(None)} of {len(runs)} runs are not finished')
    return 1 if failed else 0


def plan(
    arguments: Sequence[str], grid: Mapping[str, Sequence[str]], seeds: Sequence[int], workdir: str
) -> 'list[Run]':
    """The runs of a sweep, every config and folder checked; the first seed of all combinations comes first.

    Args:
      arguments: `--config=FILE` and the overrides that all runs share.
      grid: {key: values as typed}.
      seeds: of the runs.
      workdir: the sweep's folder.

    Raises:
      UserError: an impossible combination, a value given twice, a folder with another run.
    """
    from convnorm_jax.runs.workdir import check_workdir

    runs = [
        _make_run(arguments, dict(zip(grid, texts, strict=True)), seed, workdir)
        for seed in seeds
        for texts in itertools.product(*grid.values())
    ]
    folders = set()
    for run in runs:
        if run.folder in folders:
            raise UserError(f'--grid: {run.name} comes up twice; give every value once')
        folders.add(run.folder)
        check_workdir(run.folder, run.config)
    return runs


def _options():
    # Not absl's global flags: those belong to convnorm_jax.cli.run, whose --workdir is another.
    values = flags.FlagValues()
    flags.DEFINE_multi_string('grid', [], 'KEY=VALUE,VALUE,...; several: all combinations', flag_values=values)
    flags.DEFINE_string('seeds', '0', 'whole numbers', flag_values=values)
    flags.DEFINE_string('workdir', None, "the sweep's folder", flag_values=values)
    flags.DEFINE_string('rows', None, 'keys of the grid (default: all but the last)', flag_values=values)
    flags.DEFINE_string('columns', None, 'keys of the grid (default: the last of several)', flag_values=values)
    flags.DEFINE_integer('jobs', 1, 'runs at a time', lower_bound=1, flag_values=values)
    flags.DEFINE_enum('mode', 'train', ['train', 'report'], 'run and report, or only report', flag_values=values)
    values.set_gnu_getopt()
    return values


def _names(options):
    return ', '.join(f'--{name}' for name in sorted(options) if len(name) > 1)


def _grid(texts):
    grid = {}
    for text in texts:
        key, _, values = text.partition('=')
        key = key.strip().removeprefix('config.')
        # A comma within brackets belongs to the value: (1,1,1).
        values = [value.strip() for value in re.findall(r'(?:\([^)]*\)|\[[^\]]*\]|[^,])+', values)]
        if not key or not values or not all(values):
            raise UserError(f'--grid={text}: expected KEY=VALUE,VALUE,..., e.g. --grid=model.layer=convnorm,batchnorm')
        if key in grid:
            raise UserError(f'--grid={text}: {key} is given twice; give all its values in one --grid')
        if key == 'seed':
            raise UserError(f'--grid={text}: seeds are given by --seeds, over which the mean is taken')
        grid[key] = values
    return grid


def _seeds(text):
    try:
        seeds = [int(seed) for seed in text.split(',')]
    except ValueError as error:
        raise UserError(f'--seeds={text}: expected whole numbers, e.g. --seeds=0,1,2') from error
    if len(set(seeds)) < len(seeds):
        raise UserError(f'--seeds={text}: expected each seed once')
    return seeds


def _make_run(arguments, texts, seed, workdir):
    arguments = (*arguments, *(f'--config.{key}={text}' for key, text in texts.items()), f'--config.seed={seed}')
    from convnorm_jax.runs.sweep import Run, short_keys

    config = command_line.read_config(arguments)
    flat = flatten(config)
    values = {key: flat[key] for key in texts}
    names = short_keys(values)
    parts = [f'{names[key]}={_file_text(value_text(value))}' for key, value in values.items()]
    return Run(values, seed, os.path.join(workdir, ','.join([*parts, f'seed={seed}'])), arguments, config)


def _file_text(text):
    return re.sub(r'[^\w.+-]+', '-', text).strip('-')


def _command(argv):
    kept = [argument for argument in argv[1:] if argument not in ('--mode=report', '--mode=train')]
    return shlex.join(['convnorm', 'sweep', *kept])


def main() -> int:
    """The command, see `command_line.run_command`."""
    return command_line.run_command(lambda: run(sys.argv), __doc__, command_line.ABOUT_CONFIGS)


if __name__ == '__main__':
    sys.exit(main())
