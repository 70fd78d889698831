"""The words and tables of `report.md`."""

import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from convnorm_jax.data.corruptions import SEVERITIES
from convnorm_jax.reports.tables import markdown_table
from convnorm_jax.training.classification import Classification

ATTACK_NAMES = {'apgd-ce': 'APGD-CE', 'apgd-dlr': 'APGD-DLR', 'apgd-t': 'APGD-T', 'fab-t': 'FAB-T', 'square': 'Square'}


def attack_label(name: str, config: ConfigDict) -> str:
    """An attack's name as papers write it."""
    return f'PGD-{config.attack.pgd_steps}' if name == 'pgd' else ATTACK_NAMES.get(name, name.upper())


def attack_rows(
    config: ConfigDict, result: Mapping, attacked: Mapping[str, Mapping], found: Mapping[str, Any]
) -> list[tuple[str, float, int, float | None]]:
    """[(attack, accuracy in [0, 1], examples, seconds or None)]: clean, each attack alone, AutoAttack's in turn.

    Args:
      config: of the run.
      result: as `result.json`; attacked, found: see `robustness.write_report`.
    """
    rows: list[tuple[str, float, int, float | None]] = [
        ('clean', result['test_accuracy'], result['test_examples'], None)
    ]
    rows += [(attack_label(n, config), row['accuracy'], row['examples'], row['seconds']) for n, row in attacked.items()]
    ensemble = found.get('autoattack')
    if ensemble:
        examples = len(ensemble.robust)
        rows += [
            (
                f'+ {ATTACK_NAMES[a["name"]]}' if i else ATTACK_NAMES[a['name']],
                a['robust_accuracy'],
                examples,
                a['seconds'],
            )
            for i, a in enumerate(ensemble.attacks)
        ]
    return rows


def render(
    experiment: Classification,
    result: Mapping,
    attacked: Mapping[str, Mapping],
    found: Mapping[str, Any],
    plots: Mapping[str, str],
    workdir: str,
) -> str:
    """The report, Markdown text.

    Args:
      experiment, result, attacked, found: see `robustness.write_report`.
      plots: {part of the suite: path of its plot}; written relative to `workdir`.
      workdir: of the run.
    """
    shown = {name: f'![{name}]({os.path.relpath(path, workdir)})' for name, path in plots.items()}
    config = experiment.config
    parts = [_head(config, result, workdir), _attacks(config, result, attacked, found, shown)]
    if 'curve' in found:
        parts.append(_curve(config, found['curve'], shown))
    if 'simba' in found:
        parts.append(_simba(config, found['simba'], shown))
    if 'corruptions' in found:
        parts.append(_corruptions(found['corruptions'], shown))
    if 'operators' in found:
        parts.append(_operators(found['operators']))
    return '\n\n'.join(parts) + '\n'


def _with_plot(lines, plot):
    return '\n'.join([*lines, '', plot] if plot else lines)


def _percent(accuracy):
    return f'{100 * accuracy:.2f}'


def _head(config, result, workdir):
    norm = {'linf': 'l-infinity', 'l2': 'Euclidean'}[config.attack.norm]
    lines = [
        f'# Robustness of {config.model.name} with {config.model.layer}, {config.train.algorithm} training',
        '',
        f'Data: {result["data"]}. Seed {config.seed}, {result["checkpoint"]} checkpoint '
        f'(step {result["checkpoint_step"]} of {result["total_steps"]}), {result["parameters"]:,} parameters. '
        f'Radius {config.attack.epsilon:g}/255 in the {norm} norm. Device: {result["device"]}, jax {result["jax"]}.',
        '',
        'Written by',
        '',
        f'    python -m experiments.main --mode=eval --workdir={workdir} --config.eval.suite=standard',
        '',
        'with the settings that `report.json` holds. Every figure is measured on test images; none is a certificate.',
        *(['', f'**Not complete**: {result["incomplete"]}'] if 'incomplete' in result else []),
    ]
    return '\n'.join(lines)


def _attacks(config, result, attacked, found, shown):
    rows = attack_rows(config, result, attacked, found)
    cells = [
        (name, _percent(accuracy), f'{examples:,}', '' if seconds is None else f'{seconds:.1f}')
        for name, accuracy, examples, seconds in rows
    ]
    text = ['## Attacks', '', markdown_table(('attack', 'accuracy %', 'examples', 'seconds'), cells)]
    ensemble = found.get('autoattack')
    if ensemble:
        text += [
            '',
            f'AutoAttack: **{_percent(ensemble.robust_accuracy)} %** of {len(ensemble.robust):,} examples '
            f'({_percent(ensemble.clean_accuracy)} % clean on the same). Its attacks run in turn, each on the examples '
            'that are still robust: a row gives the accuracy after it and all before. Seconds include compilation.',
            '',
            markdown_table(
                ('attack', 'attacked', 'broken'),
                [(ATTACK_NAMES[a['name']], str(a['attacked']), str(a['broken'])) for a in ensemble.attacks],
            ),
        ]
        for warning in ensemble.warnings:
            text += ['', f'**Warning:** {warning}.']
    return _with_plot(text, shown.get('attacks'))


def _curve(config, curve, shown):
    rows = [(f'{255 * radius:g}', _percent(accuracy)) for radius, accuracy in curve]
    text = [
        '## Accuracy against epsilon',
        '',
        f'PGD-{config.attack.pgd_steps}, {config.attack.restarts} start(s), steps in proportion to the radius. '
        'Accuracy must reach zero as the radius grows; where it does not, the attack fails, and the net is not robust.',
        '',
        markdown_table(('epsilon x 255', 'accuracy %'), rows, labels=0),
    ]
    return _with_plot(text, shown.get('curve'))


def _simba(config, simba, shown):
    rows = [
        (
            basis,
            str(row['examples']),
            *(
                '' if row[key] is None else f'{factor * row[key]:{form}}'
                for key, factor, form in (
                    ('success_rate', 100, '.2f'),
                    ('average_queries', 1, '.0f'),
                    ('average_queries_success', 1, '.0f'),
                    ('mean_l2_success', 1, '.2f'),
                )
            ),
        )
        for basis, row in simba.items()
    ]
    head = ('basis', 'examples', 'fooled %', 'queries (all)', 'queries (fooled)', 'l2 (fooled)')
    text = [
        '## SimBA',
        '',
        f'Steps of {config.eval.simba.step_size:g}, at most {config.eval.simba.queries:,} queries, no ball: the '
        'measure is how many queries and how large a change it takes. Examples are those classified correctly.',
        '',
        markdown_table(head, rows),
    ]
    return _with_plot(text, shown.get('simba'))


def _corruptions(corruptions, shown):
    rows = [
        (name.replace('_', ' '), *(_percent(row[s]) for s in SEVERITIES), _percent(corruptions['corruptions'][name]))
        for name, row in corruptions['table'].items()
    ]
    text = [
        '## Common corruptions',
        '',
        f'Mean accuracy **{_percent(corruptions["mean"])} %** over fifteen corruptions at five severities, computed on '
        "the fly with CIFAR-10-C's constants (frost is procedural: not comparable).",
        '',
        markdown_table(('corruption', *map(str, SEVERITIES), 'mean'), rows),
    ]
    return _with_plot(text, shown.get('corruptions'))


def _operators(found):
    number = lambda value: '-' if value is None else f'{value:.4g}'
    rows = [
        (layer['name'], *(number(layer[key]) for key in ('conv_norm', 'layer_norm', 'condition')))
        for layer in found['layers']
    ]
    return '\n'.join(
        [
            '## Layers',
            '',
            markdown_table(('layer', 'norm of the convolution', 'norm of the layer', 'condition number'), rows),
            '',
            f'Product of the norms, for normalized images: {number(found["product_bound"])}. Steepest secant of the '
            f'logits that was found, for pixels in [0, 1]: {number(found["lipschitz_lower_bound"])}, a lower bound on '
            'the Lipschitz constant. Measured, not certified.',
        ]
    )
