"""The report on the claims of the paper: tables, differences, plots, and a sentence for each."""

import math
import os
from collections.abc import Sequence
from typing import Any

from convnorm_jax.configs.keys import value_text
from convnorm_jax.files import write_text
from convnorm_jax.paper.record import Record
from convnorm_jax.paper.statistics import CONFIDENCE
from convnorm_jax.paper.study import RATE, TUNING_SEED
from convnorm_jax.paper.summary import AT_CHOSEN, OVER_RATES, Summary, as_dict
from convnorm_jax.plots.comparison import accuracy_against
from convnorm_jax.plots.intervals import interval_plot
from convnorm_jax.plots.relations import relation_plot
from convnorm_jax.reports.tables import markdown_table

_FIGURES = {
    'test_accuracy': 'accuracy',
    'fgsm_accuracy': 'FGSM',
    'pgd_accuracy': 'PGD-20',
    'autoattack_accuracy': 'AutoAttack',
    'largest_conv_norm': 'largest norm of a convolution',
    'median_condition': 'median condition number',
    'product_bound': 'product of the norms',
    'lipschitz_lower_bound': 'steepest secant',
    'fid': 'FID',
    'fid_classifier': 'FID by a classifier',
}
_SETTINGS = {
    RATE: 'learning rate',
    'model.name': 'net',
    'data.label_noise.rate': 'label noise',
    'data.subset_fraction': 'share of the data',
}


def report_claim(
    claim: str, title: str, summaries: Sequence[Summary], record: Record, output: str, facts: dict[str, Any]
) -> str:
    """The report on a claim; writes its JSON file and plots.

    Args:
      claim, title: its name, and the claim in words.
      summaries: of its studies.
      record: of its runs.
      output: the folder.
      facts: of the whole grid: 'scale', 'command', 'hours'.

    Returns:
      Markdown.
    """
    name = os.path.splitext(os.path.basename(record.path))[0]
    done = [summary for summary in summaries if any(summary.figures.values())]
    paths = [path for summary in done for path in _draw(summary, os.path.join(output, f'{name}_{summary.study.name}'))]
    record.write(
        {
            'claim': claim,
            'title': title,
            **facts,
            'studies': [as_dict(summary) for summary in summaries],
            'tables': [table for summary in done for table in site_tables(summary)],
        }
    )
    parts = [f'## {title}', *(_study(summary, record) for summary in done)]
    parts += [_not_run(summaries)] if any(summary.missing or summary.waiting for summary in summaries) else []
    parts += [f'{facts["hours"]:.1f} hours of one core. `{facts["command"]}`']
    parts += [f'![{title}]({os.path.relpath(path, output)})' for path in paths]
    return '\n\n'.join(parts)


def write_report(sections: Sequence[str], path: str, heading: str) -> None:
    """Writes the sections of `report_claim` as one page."""
    write_text(path, '\n\n'.join([f'# {heading}', *sections]) + '\n')


def _study(summary, record):
    study = summary.study
    parts = [f'### {study.title[0].upper()}{study.title[1:]}', _facts(summary, record)]
    if study.rates:
        parts.append(_rates(summary))
    for figure, table in _means(summary):
        parts.append(f'{figure}:\n\n{table}' if figure else table)
    parts.append(_differences(summary))
    parts += [' '.join(_sentences(summary, figure)) for figure in study.figures[:1]]
    parts += [_why(summary)] if any(summary.figures[measure] for measure in study.measures) else []
    return '\n\n'.join(parts)


def _facts(summary, record):
    study = summary.study
    named = [
        f'{key}={value_text(value)}'
        for key, value in study.options.items()
        if key in ('model.name', 'model.width', 'train.steps', 'train.epochs', 'schedule.kind', RATE)
    ]
    seeds = ', '.join(map(str, summary.seeds))
    words = [record.fact(study, 'data'), f'config {study.config}', ', '.join(named), f'seeds {seeds}']
    return '; '.join(word for word in words if word) + '.'


def _rates(summary):
    study = summary.study
    chosen = ', '.join(f'{arm} {value_text(rate)}' for arm, rate in summary.rates.items())
    return (
        f'Learning rates, chosen among {", ".join(map(value_text, study.rates))} by {study.chosen_by} of one run with '
        f'seed {TUNING_SEED}: {chosen}.'
    )


def _means(summary):
    """[(figure or '', Markdown table)]: a table for each figure, or one where the figures can be the columns."""
    study = summary.study
    named = [(figure, _name(figure)) for figure in study.figures]
    if not study.settings:
        head = ['layer', *(name for _, name in named)]
        column = summary.columns[0]
        rows = [[arm, *(_cell(summary, figure, arm, column) for figure, _ in named)] for arm in study.arms]
        for arm, published in study.published.items():
            cells = [published.get(figure) for figure, _ in named]
            rows.append([f'{arm}, published', *('-' if cell is None else f'{cell[0]} ± {cell[1]}' for cell in cells)])
        return [('', markdown_table(head, rows))]
    head = [f'layer / {_SETTINGS[next(iter(study.settings))]}', *(column.name for column in summary.columns)]
    return [
        (
            name if len(named) > 1 else '',
            markdown_table(
                head,
                [[arm, *(_cell(summary, figure, arm, column) for column in summary.columns)] for arm in study.arms],
            ),
        )
        for figure, name in named
    ]


def _cell(summary, figure, arm, column):
    found, lost = summary.mean(figure, arm, column), summary.diverged.get((arm, column.name), 0)
    if found is None:
        return 'diverged' if lost else '-'
    text = f'{found.mean:.2f}' if math.isnan(found.deviation) else f'{found.mean:.2f} ± {found.deviation:.2f}'
    missing = len(summary.seeds) - found.count
    return f'{text} (n={found.count}{", the rest diverged" if lost == missing else ""})' if missing else text


def _differences(summary):
    study = summary.study
    others = list(study.arms)[1:]
    figures = study.figures if not study.settings else study.figures[:1]
    places = [(figure, column) for figure in figures for column in summary.columns]
    names = [_name(figure) if not study.settings else column.name for figure, column in places]
    head = [f'{summary.first} minus', *names]
    rows = [[arm, *(_interval(summary.difference(figure, arm, column)) for figure, column in places)] for arm in others]
    unit = 'points' if study.figures[0].endswith('_accuracy') else _name(study.figures[0])
    return (
        f'Paired differences in {unit}, with their {100 * CONFIDENCE:.0f} % intervals (Student, each on its own):\n\n'
        + markdown_table(head, rows)
    )


def _interval(difference):
    if difference is None:
        return '-'
    if math.isnan(difference.low):
        return f'{difference.mean:+.2f}'
    return f'{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]'


def _sentences(summary, figure):
    others = list(summary.study.arms)[1:]
    return [f'By {_name(figure)}:', *(summary.sentence(figure, arm) for arm in others)]


def _why(summary):
    """The measures of each arm, and their relation to the first figure."""
    study, column = summary.study, summary.columns[0]
    head = ['layer', *map(_name, study.measures), _name(study.figures[0])]
    rows = []
    for arm in study.arms:
        found = [summary.mean(measure, arm, column) for measure in study.measures]
        cells = ['-' if one is None else f'{one.mean:.3g}' for one in found]
        rows.append([arm, *cells, _cell(summary, study.figures[0], arm, column)])
    words = []
    for measure in study.measures:
        relation = summary.relation(measure)
        if relation is not None:
            words.append(f'{_name(measure)} {relation.correlation:+.2f} (p = {relation.p_value:.2f})')
    counted = max((one.count for one in map(summary.relation, study.measures) if one is not None), default=0)
    return (
        f'Norms of the trained nets, means over the seeds:\n\n{markdown_table(head, rows)}\n\n'
        f"Spearman's rank correlation with {_name(study.figures[0])} over {counted} layers: {'; '.join(words) or '-'}."
    )


def _not_run(summaries):
    words = []
    for summary in summaries:
        if summary.missing or summary.waiting:
            runs = len(summary.missing) + summary.waiting
            words.append(f'{summary.study.name}: {runs} runs, about {summary.seconds_left / 3600:.1f} h of a core')
    return f'Planned, and not run: {"; ".join(words)}.'


def _name(figure):
    return _FIGURES.get(figure, figure.replace('_', ' '))


def _draw(summary, stem):
    """Draws a study; returns the paths."""
    title = f'{summary.study.title}, seeds {", ".join(map(str, summary.seeds))}'
    drawn = (draw(summary, stem, title) for draw in (_draw_figures, _draw_norms, _draw_differences))
    return [str(path) for path in drawn if path is not None]


def _draw_figures(summary, stem, title):
    """The first figure against the setting, if that is a number."""
    study, figure, numbers = summary.study, summary.study.figures[0], _numbers(summary.study)
    if not numbers or not figure.endswith('_accuracy'):
        return None
    lines: dict[str, list] = {}
    for arm in study.arms:
        for column, x in zip(summary.columns, numbers):  # the columns over all rates have no number
            found = summary.mean(figure, arm, column)
            if found is not None:
                deviation = None if math.isnan(found.deviation) else found.deviation
                lines.setdefault(arm, []).append((x, found.mean, deviation))
    x_name = _SETTINGS[next(iter(study.settings))]
    return accuracy_against({f'test {_name(figure)}': lines}, f'{stem}.png', x_name=x_name, title=title)


def _draw_norms(summary, stem, title):
    """The first figure against each measure, a point for each arm."""
    study, column = summary.study, summary.columns[0]
    accuracy = {arm: summary.mean(study.figures[0], arm, column) for arm in study.arms}
    panels: dict[str, dict] = {}
    for measure in study.measures:
        for arm in study.arms:
            found = summary.mean(measure, arm, column)
            if found is not None and accuracy[arm] is not None:
                panels.setdefault(_name(measure), {})[arm] = found.mean, accuracy[arm].mean
    if not panels:
        return None
    y_name = f'{_name(study.figures[0])} accuracy (%)'
    return relation_plot(panels, f'{stem}_norms.png', y_name=y_name, title=title)


def _draw_differences(summary, stem, title):
    """The first arm minus each of the others, with intervals."""
    study = summary.study
    figures = study.figures if not study.settings else study.figures[:1]
    panels: dict[str, list] = {}
    for arm in list(study.arms)[1:]:
        for figure in figures:
            for column in summary.columns:
                found = summary.difference(figure, arm, column)
                if found is not None:
                    row = column.name or _name(figure), found.mean, found.low, found.high
                    panels.setdefault(f'{summary.first} - {arm}', []).append(row)
    if not panels:
        return None
    unit = 'points' if study.figures[0].endswith('_accuracy') else _name(study.figures[0])
    return interval_plot(
        panels,
        f'{stem}_differences.png',
        x_name=f'difference ({unit})',
        lower_is_better=study.lower_is_better,
        title=title,
    )


def _numbers(study):
    """The setting of each column as a number; [] where it has none."""
    if not study.settings:
        return []
    values = next(iter(study.settings.values()))
    if all(isinstance(value, (int, float)) for value in values):
        return [float(value) for value in values]
    digits = [''.join(filter(str.isdigit, str(value))) for value in values]
    return [float(digit) for digit in digits] if all(digits) else []


def site_tables(summary: Summary) -> list[dict[str, Any]]:
    """A study's means as the site's tables: see docs/_ext/tables.py."""
    study = summary.study
    tables = []
    for figure in study.figures:
        columns = [column for column in summary.columns if column.name not in (AT_CHOSEN, OVER_RATES)]
        setting = _SETTINGS[next(iter(study.settings))] if study.settings else ''
        rows = []
        for arm in study.arms:
            found = [summary.mean(figure, arm, column) for column in columns]
            rows.append(
                [arm, *(one and [one.mean, None if math.isnan(one.deviation) else one.deviation] for one in found)]
            )
        heads = [column.name or f'{_name(figure)}' for column in columns]
        tables.append(
            {
                'columns': [f'layer / {setting}' if setting else 'layer', *heads],
                'decimals': [None, *[2] * len(columns)],
                'rows': rows,
                'before': f'{study.title}: {_name(figure)}',
            }
        )
    return tables
