"""The standard suite of a run: measurements, `report.md`, `report.json` and their plots."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convnorm_jax import plots
from convnorm_jax.configs.default import KEYS
from convnorm_jax.configs.keys import flatten
from convnorm_jax.evaluation import suite as suite_lib
from convnorm_jax.files import write_json, write_text
from convnorm_jax.reports import robustness_text
from convnorm_jax.training import classification
from convnorm_jax.training.classification import Classification

# What result.json holds of the part 'operators'.
OPERATOR_FIGURES = ('largest_conv_norm', 'median_condition', 'product_bound', 'lipschitz_lower_bound')


def run_suite(
    experiment: Classification, variables: Any, workdir: str, log: Callable[[str], None], found: dict[str, Any]
) -> None:
    """Runs the parts of the suite that the config names, on the first `eval.examples` test images.

    Args:
      experiment: the run; variables: of its net.
      workdir: results go to `workdir/evaluation/`, from which an interrupted evaluation resumes.
      log: takes a line of text.
      found: each part is added to it as soon as it ends: {'autoattack': `EnsembleResult`, 'curve': ..., 'simba': ...,
        'corruptions': ..., 'operators': ...}.
    """
    config = experiment.config
    subject = _subject(experiment, variables, workdir, log)
    for part in config.eval.parts:
        log(f'{part} on {len(subject.labels)} examples')
        found[part] = _measure(part, subject, experiment)


def _subject(experiment, variables, workdir, log):
    config, attacked = experiment.config, experiment.attacked
    settings = {k: v for k, v in flatten(config).items() if KEYS[k].decides_suite}
    settings['examples'] = len(attacked.labels)
    if experiment.streamed:  # the name of these data sets does not identify them
        settings['data'] = experiment.source.description
    folder = suite_lib.open_folder(os.path.join(workdir, 'evaluation'), variables, settings)
    return suite_lib.Subject(
        experiment.evaluator,
        variables,
        attacked.images,
        attacked.labels,
        config.seed,
        folder,
        log,
    )


def _measure(part, subject, experiment):
    config = experiment.config
    section, attack = config.eval, config.attack
    if part == 'autoattack':
        return suite_lib.run_autoattack(
            subject, epsilon=attack.epsilon / 255, norm=attack.norm, **section.autoattack.to_dict()
        )
    if part == 'curve':
        return suite_lib.run_curve(subject, classification.make_attack(config, 'pgd'), section.curve)
    if part == 'simba':
        return suite_lib.run_simba(subject, **section.simba.to_dict())
    if part == 'operators':
        return suite_lib.run_operators(subject, experiment.model)
    return suite_lib.run_corruptions(subject)


def headline_figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `result.json` holds of the suite: flat, accuracies in [0, 1]."""
    figures = {}
    if 'autoattack' in found:
        figures['autoattack_accuracy'] = found['autoattack'].robust_accuracy
        figures['autoattack_examples'] = len(found['autoattack'].robust)
    if 'corruptions' in found:
        figures['corruption_accuracy'] = found['corruptions']['mean']
    if 'operators' in found:
        figures |= {name: found['operators'][name] for name in OPERATOR_FIGURES}
    return figures


def write_report(
    experiment: Classification,
    result: Mapping,
    attacked: Mapping[str, Mapping],
    found: Mapping[str, Any],
    workdir: str,
    name: str = 'report',
) -> list[str]:
    """Writes `report.md`, `report.json` and, of a complete result, the plots of the suite.

    Args:
      experiment: the run.
      result: the flat dict of `result.json`.
      attacked: {name: what `Evaluator.robust_accuracy` returned}.
      found: from `run_suite`.
      workdir: of the run.
      name: of the two files.

    Returns:
      The paths written.
    """
    report = robust_bench_fields(experiment, result, found)
    report['settings'] = {k: v for k, v in flatten(experiment.config).items() if k.startswith(('attack.', 'eval.'))}
    report['figures'] = {**result, 'attacks': {name: dict(row) for name, row in attacked.items()}, **_plain(found)}
    json_path, text_path = (os.path.join(workdir, f'{name}.{kind}') for kind in ('json', 'md'))
    write_json(json_path, report)
    drawn: dict[str, str] = {}
    try:
        if 'incomplete' not in result:
            _draw(experiment, result, attacked, found, os.path.join(workdir, 'plots'), drawn)
    finally:  # a plot that cannot be drawn does not cost the tables
        text = robustness_text.render(experiment, result, attacked, found, drawn, workdir)
        write_text(text_path, text)
    return [json_path, text_path, *drawn.values()]


def robust_bench_fields(experiment: Classification, result: Mapping, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RobustBench's model cards: strings, accuracies in %, epsilon as a fraction.

    'autoattack_acc' is None without AutoAttack. The leaderboard uses the whole test set; here 'examples' says how many
    examples the figures are of.
    """
    config = experiment.config
    ensemble = found.get('autoattack')
    clean = ensemble.clean_accuracy if ensemble else result['test_accuracy']
    return {
        'name': f'{config.model.name}, {config.model.layer}, {config.train.algorithm} training',
        'dataset': config.data.name,
        'architecture': config.model.name,
        'layer': config.model.layer,
        'norm': {'linf': 'Linf', 'l2': 'L2'}[config.attack.norm],
        'eps': f'{config.attack.epsilon:g}/255',
        'clean_acc': f'{100 * clean:.2f}',
        'autoattack_acc': f'{100 * ensemble.robust_accuracy:.2f}' if ensemble else None,
        'examples': len(ensemble.robust) if ensemble else result['test_examples'],
        'additional_data': False,
        'number_forward_passes': 1,
        'unreliable': bool(ensemble.warnings) if ensemble else None,
    }


def _plain(found):
    """The suite's figures without its images."""
    plain = dict(found)
    if 'autoattack' in plain:
        fields = dataclasses.asdict(dataclasses.replace(plain['autoattack'], images=None, robust=None))
        plain['autoattack'] = {k: v for k, v in fields.items() if v is not None}
    return json.loads(json.dumps(plain))


def _draw(experiment, result, attacked, found, folder, paths):
    """Draws the plots of the suite; adds {part: path} of each to `paths`."""
    config = experiment.config
    if not config.plots:
        return
    title = f'{config.model.name}, {config.model.layer}, {config.train.algorithm} training, seed {config.seed}'
    if 'curve' in found:
        curves = {f'PGD-{config.attack.pgd_steps}': [(255 * radius, accuracy) for radius, accuracy in found['curve']]}
        path = os.path.join(folder, 'accuracy_against_epsilon.png')
        paths['curve'] = plots.epsilon_curve(curves, path, title=title, epsilon=config.attack.epsilon)
    if 'autoattack' in found:
        rows = robustness_text.attack_rows(config, result, attacked, found)
        path = os.path.join(folder, 'robust_accuracy.png')
        paths['attacks'] = plots.attack_bars([row[:3] for row in rows], path, title=title)
    if 'corruptions' in found:
        path = os.path.join(folder, 'corruptions.png')
        paths['corruptions'] = plots.corruption_table(found['corruptions']['table'], path, title=title)
    if 'simba' in found:
        results = {
            f'SimBA {basis}': (np.array(row['queries']), np.array(row['success']))
            for basis, row in found['simba'].items()
        }
        paths['simba'] = plots.query_curve(results, os.path.join(folder, 'simba_queries.png'), title=title)
