"""What a sweep found: tables of mean +- standard deviation over the seeds as Markdown, CSV and JSON, and a plot."""

import csv
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from convnorm_jax import plots
from convnorm_jax.configs.keys import value_text
from convnorm_jax.errors import UserError
from convnorm_jax.evaluation.features import SCORE_NAMES
from convnorm_jax.files import write_json, write_text
from convnorm_jax.reports.tables import markdown_table
from convnorm_jax.runs.sweep import Run, short_keys

# Scores of generators, by their names in result.json.
_SCORES = (*(name for names in SCORE_NAMES.values() for name in names), 'label_agreement')

# How words of the names in result.json are written.
_WORDS = {
    'apgd': 'APGD',
    'autoattack': 'AutoAttack',
    'ce': 'CE',
    'dlr': 'DLR',
    'fab': 'FAB',
    'fgsm': 'FGSM',
    'fid': 'FID',
    'kid': 'KID',
    'pgd': 'PGD',
    'simba': 'SimBA',
    'square': 'Square',
    't': 'T',
}
# Written once above the tables where all runs have the same.
_FACTS = (
    'model',
    'layer',
    'data',
    'algorithm',
    'total_steps',
    'checkpoint',
    'test_examples',
    'samples',
    'device',
    'jax',
)
_ATTACK_FACTS = {'epsilon': '/255', 'step_size': '/255', 'pgd_steps': '', 'restarts': '', 'attacked_examples': ''}


def layout(keys: Sequence[str], rows: str | None, columns: str | None) -> tuple[list[str], list[str]]:
    """(keys of the rows, keys of the columns) of the tables.

    Args:
      keys: of the grid.
      rows, columns: some of them as 'KEY,KEY', or None. By default the last of several keys is the column, and a key
        that one of the two names is not in the other.

    Raises:
      UserError: a key that the grid does not have; a key in neither or in both.
    """
    keys = list(keys)
    if rows is None and columns is None:
        row_keys, column_keys = keys[:-1] or keys, keys[1:][-1:]
    else:
        given = _named(keys, rows, '--rows'), _named(keys, columns, '--columns')
        row_keys = [key for key in keys if key not in (given[1] or ())] if given[0] is None else given[0]
        column_keys = [key for key in keys if key not in row_keys] if given[1] is None else given[1]
    if sorted([*row_keys, *column_keys]) != sorted(keys):
        raise UserError(
            f'--rows={",".join(row_keys)} --columns={",".join(column_keys)}: expected each key of the grid once, '
            f'in one of the two: {", ".join(keys)}'
        )
    return row_keys, column_keys


def _named(keys, text, option):
    if text is None:
        return None
    names = [name.strip().removeprefix('config.') for name in text.split(',') if name.strip()]
    for name in names:
        if name not in keys:
            raise UserError(f'{option}={text}: {name} is no key of the grid, which has {", ".join(keys) or "none"}')
    return names


def summarize(runs: Sequence[Run], results: Sequence[dict | None]) -> list[dict[str, Any]]:
    """One dict for each combination of the grid, in order, over its finished runs.

    Args:
      runs: of the sweep.
      results: for each run its flat result, or None if it is not finished.

    Returns:
      List of {'values': {grid key: value}, 'seeds': [...], 'figures': {metric: {'mean', 'standard_deviation',
      'all'}}}. Metrics are the names of the results that end in `_accuracy`, in %, and the scores of generators. The
      standard deviation is that of a sample (n-1), None for a single seed.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for run, result in zip(runs, results, strict=True):
        group = groups.setdefault(
            tuple(map(str, run.values.values())), {'values': run.values, 'seeds': [], 'found': []}
        )
        if result is not None:
            group['seeds'].append(run.seed)
            group['found'].append(result)
    metrics = _metrics(results)
    return [
        {
            'values': group['values'],
            'seeds': group['seeds'],
            'figures': {
                metric: _statistics(numbers) for metric in metrics if (numbers := _numbers(group['found'], metric))
            },
        }
        for group in groups.values()
    ]


def _metrics(results):
    """Names of accuracies and scores in any result: the test's first, that of the validation last."""
    names = {name for result in results if result for name in result if _is_accuracy(name) or name in _SCORES}
    ordered = dict.fromkeys(name for result in results if result for name in result if name in names)
    return sorted(ordered, key=lambda name: (name != 'test_accuracy', 'validation' in name))


def _is_accuracy(metric):
    return metric.endswith('_accuracy')


def _numbers(results, metric):
    factor = 100 if _is_accuracy(metric) else 1
    return [factor * result[metric] for result in results if result.get(metric) is not None]


def _unit(cells):
    return '%' if any(map(_is_accuracy, _found_metrics(cells))) else ''


def _statistics(numbers):
    deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return {'mean': float(np.mean(numbers)), 'standard_deviation': deviation, 'all': numbers}


def report(
    runs: Sequence[Run],
    results: Sequence[dict | None],
    rows: Sequence[str],
    columns: Sequence[str],
    workdir: str,
    command: str,
) -> None:
    """Writes `sweep.md`, `sweep.csv`, `sweep.json` and `plots/sweep.png`; prints the tables.

    Args:
      runs, results: as for `summarize`.
      rows, columns: see `layout`.
      workdir: of the sweep.
      command: that gives the same tables.
    """
    cells = summarize(runs, results)
    text = '\n\n'.join(
        [*_heading(runs, results, _unit(cells)), *_tables(cells, rows, columns, runs), *_missing(runs, results)]
    )
    print(f'\n{text}\n')
    paths = [os.path.join(workdir, f'sweep.{kind}') for kind in ('md', 'csv', 'json')]
    name = os.path.basename(os.path.abspath(workdir))
    write_text(paths[0], f'# {name}\n\n{text}\n\n```bash\n{command}\n```\n')
    write_text(paths[1], _csv(cells))
    write_json(paths[2], _record(runs, results, cells, command))
    paths += _draw(cells, rows, columns, os.path.join(workdir, 'plots', 'sweep.png'), f'{name}: {_over_seeds(runs)}')
    print(*(f'wrote {path}' for path in paths), sep='\n', flush=True)


def _heading(runs, results, unit):
    found = [result for result in results if result]
    units = dict.fromkeys(_FACTS, '') | (_ATTACK_FACTS if found[0].get('attacked_examples') else {})
    facts = [
        f'{name.replace("_", " ")} {value_text(found[0][name])}{unit}'
        for name, unit in units.items()
        if name in found[0] and all(result.get(name) == found[0][name] for result in found)
    ]
    return [f'{"Accuracy in %" if unit else "Scores"}, {_over_seeds(runs)}.', f'In all runs: {"; ".join(facts)}.']


def _over_seeds(runs):
    seeds = list(dict.fromkeys(run.seed for run in runs))
    listed = ', '.join(map(str, seeds))
    return f'mean +- standard deviation (n-1) over seeds {listed}' if len(seeds) > 1 else f'seed {listed}'


def _missing(runs, results):
    names = [run.name for run, result in zip(runs, results, strict=True) if result is None]
    return [f'Not finished, and not in the figures: {"; ".join(names)}.'] if names else []


def _tables(cells, rows, columns, runs):
    """Markdown tables: one for each metric; a single one where the rows or the columns can be the metrics."""
    names = {key: _words(name) for key, name in short_keys([*rows, *columns]).items()}
    metrics = _found_metrics(cells)
    seeds = len({run.seed for run in runs})
    places = {_place(cell, [*rows, *columns]): cell for cell in cells}
    row_places, column_places = (list(dict.fromkeys(_place(cell, keys) for cell in cells)) for keys in (rows, columns))

    def text(row, column, metric):
        return _cell_text(places[*row, *column], metric, seeds)

    row_names = [names[key] for key in rows]
    column_name = ', '.join(names[key] for key in columns)
    column_heads = [', '.join(place) for place in column_places]
    if not columns:
        body = [[*row, *(text(row, (), metric) for metric in metrics)] for row in row_places]
        return [markdown_table([*row_names, *map(_words, metrics)], body, len(rows))]
    if not rows:
        body = [[_words(metric), *(text((), column, metric) for column in column_places)] for metric in metrics]
        return [markdown_table([column_name, *column_heads], body, 1)]
    head = [*row_names[:-1], f'{row_names[-1]} / {column_name}', *column_heads]
    return [
        f'{_words(metric)}:\n\n'
        + markdown_table(
            head, [[*row, *(text(row, column, metric) for column in column_places)] for row in row_places], len(rows)
        )
        for metric in metrics
    ]


def _place(cell, keys):
    return tuple(value_text(cell['values'][key]) for key in keys)


def _found_metrics(cells):
    return list(dict.fromkeys(metric for cell in cells for metric in cell['figures']))


def _cell_text(cell, metric, seeds):
    found = cell['figures'].get(metric)
    if not found:
        return '-'
    text = f'{found["mean"]:.2f}'
    if found['standard_deviation'] is not None:
        text += f' +- {found["standard_deviation"]:.2f}'
    return text if len(found['all']) == seeds else f'{text} ({len(found["all"])} of {seeds} seeds)'


def _words(name):
    """A dotted name of a config or of result.json in words."""
    return ' '.join(_WORDS.get(word, word) for word in name.replace('.', '_').split('_'))


def _csv(cells):
    """A row for each combination and metric, accuracies in %."""
    keys, unit = list(cells[0]['values']), '_percent' if _unit(cells) else ''
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow([*keys, 'metric', f'mean{unit}', f'standard_deviation{unit}', 'seeds'])
    for cell in cells:
        for metric, found in cell['figures'].items():
            deviation = '' if found['standard_deviation'] is None else found['standard_deviation']
            values = [value_text(value) for value in cell['values'].values()]
            writer.writerow([*values, metric, found['mean'], deviation, len(found['all'])])
    return file.getvalue()


def _record(runs, results, cells, command):
    return {
        'command': command,
        'unit': _unit(cells),
        'combinations': cells,
        'runs': [
            {'values': run.values, 'seed': run.seed, 'folder': run.name, 'result': result}
            for run, result in zip(runs, results, strict=True)
        ],
    }


def _draw(cells, rows, columns, path, title):
    """[the path of the plot], or [] where no key of the grid is numeric."""
    numeric = [key for key in (*columns, *rows) if _is_numeric([cell['values'][key] for cell in cells])]
    if not numeric:
        return []
    setting = max(numeric, key=lambda key: len({cell['values'][key] for cell in cells}))
    names = short_keys([*rows, *columns])
    panels = {}
    for metric in _found_metrics(cells):
        if 'validation' in metric or not _is_accuracy(metric):
            continue  # checkpoints were selected on the validation set, and scores have no common scale
        panel = panels.setdefault(_words(metric), {})
        for cell in cells:
            if found := cell['figures'].get(metric):
                point = (cell['values'][setting], found['mean'], found['standard_deviation'])
                panel.setdefault(_method(cell['values'], setting, names), []).append(point)
    if not panels:
        return []
    return [plots.accuracy_against(panels, path, x_name=_words(names[setting]), title=title)]


def _is_numeric(values):
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return numbers and len(set(values)) > 1


def _method(values, setting, names):
    """The name of a line of the plot: the other settings; a single text needs no key."""
    others = {key: value_text(value) for key, value in values.items() if key != setting}
    if len(others) == 1 and isinstance(values[next(iter(others))], str):
        return next(iter(others.values()))
    return ', '.join(f'{_words(names[key])} {text}' for key, text in others.items())
