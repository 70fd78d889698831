"""The end of a run: accuracy clean and attacked, plots, `result.json` and a table."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from convnorm_jax import plots
from convnorm_jax.evaluation.layers import layer_spectra
from convnorm_jax.mesh import is_leader
from convnorm_jax.reports import robustness
from convnorm_jax.reports.facts import count_parameters, run_facts
from convnorm_jax.reports.robustness_text import attack_label, attack_rows
from convnorm_jax.reports.tables import markdown_table
from convnorm_jax.runs.disk import check_writable
from convnorm_jax.runs.metrics import read_rows
from convnorm_jax.runs.workdir import write_result
from convnorm_jax.training import classification
from convnorm_jax.training.classification import Classification
from convnorm_jax.training.loop import restore_variables

_COLUMNS = 8  # of the grid of attacked images


def report(experiment: Classification, workdir: str) -> dict[str, Any]:
    """Evaluates a run's checkpoint on the test set and writes what it finds.

    Writes `result.json` and, unless config.plots is off, `plots/*.png`; prints the table. If an attack or a part of the
    suite fails or is interrupted, what was measured before is written and printed, `result.json` has the key
    `incomplete`, and the error is raised again.

    Returns:
      The flat dict of `result.json`.
    """
    config, evaluator = experiment.config, experiment.evaluator
    if is_leader():
        check_writable(workdir)
    variables, chosen, final = restore_variables(experiment, workdir, config.eval.checkpoint)
    clean = evaluator.evaluate(variables, experiment.data['test'])
    attacks = classification.attack_settings(config)
    attacked: dict[str, dict] = {}
    found: dict[str, Any] = {}
    paths: list[str] = []

    def write(**more):
        result = {
            'test_accuracy': clean['accuracy'],
            'test_loss': clean['loss'],
            **{f'{name}_accuracy': row['accuracy'] for name, row in attacked.items()},
            **robustness.headline_figures(found),
            **_facts(experiment, variables, chosen, final),
            'attacked_examples': max((row['examples'] for row in attacked.values()), default=0),
            **more,
        }
        paths.append(write_result(workdir, result))
        print(_table(experiment, result, attacked, found), flush=True)
        if config.eval.suite:
            name = os.path.basename(paths[0]).replace('result', 'report').removesuffix('.json')
            paths.extend(robustness.write_report(experiment, result, attacked, found, workdir, name))
        return result

    with written_on_failure(write):
        for name, attack in attacks.items():
            attacked[name] = _attack(experiment, variables, name, attack)
        _suite(experiment, variables, workdir, found)
    result = write()
    if config.plots:
        paths += _draw(experiment, variables, attacks, found, workdir)
    for path in paths:
        print(f'wrote {path}')
    return result


@contextlib.contextmanager
def written_on_failure(write: Callable[..., Any]) -> Iterator[None]:
    """Within `with`, an error or Ctrl-C calls `write(incomplete=WHY)` before it is raised; see `workdir.write_result`.

    An error of `write` itself is dropped: the first error is the one to report.
    """
    try:
        yield
    except BaseException as error:
        why = ' '.join(f'{type(error).__name__}: {error}'.split())
        with contextlib.suppress(Exception):
            write(incomplete=why[:500])
        raise


def _suite(experiment, variables, workdir, found):
    """Adds to `found` what the suite of the config finds; logs to the standard error."""
    if experiment.config.eval.suite:
        log = lambda line: tqdm.write(line, file=sys.stderr)
        robustness.run_suite(experiment, variables, workdir, log, found)


def _attack(experiment, variables, name, attack):
    with tqdm(desc=f'attacking: {name}', unit='example', mininterval=1, leave=False, disable=None) as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        return experiment.evaluator.robust_accuracy(
            variables,
            experiment.attacked_data,
            attack,
            seed=experiment.config.seed,
            examples=experiment.config.eval.examples,
            progress=progress,
        )


def _facts(experiment, variables, chosen, final):
    config = experiment.config
    return {
        **run_facts(experiment, chosen, final),
        'parameters': count_parameters(variables['params']),
        **_validation(experiment, chosen, final),
        'epsilon': config.attack.epsilon,
        'step_size': config.attack.step_size,
        'pgd_steps': config.attack.pgd_steps,
        'restarts': config.attack.restarts,
        'attack_loss': config.attack.loss,
    }


def _validation(experiment, chosen, final):
    """What the best checkpoint was chosen by, and of adversarial training also the last epoch's."""
    best = None if chosen.best_rating is None else final.best_rating
    if not experiment.probed:
        return {'best_validation_accuracy': best}
    return {f'best_{classification.PROBE}': best, f'last_{classification.PROBE}': final.rating}


def _collapse(result, num_classes):
    """[a line of warning] where catastrophic overfitting was the end of a run."""
    best, last = (result.get(f'{which}_{classification.PROBE}') for which in ('best', 'last'))
    if best is None or last is None or not classification.collapsed(last, best, num_classes):
        return []
    advice = '' if result['checkpoint'] == 'best' else ': evaluate it by --config.eval.checkpoint=best'
    return [
        f'warning: catastrophic overfitting. Validation accuracy under PGD was {100 * best:.1f} % at best, and '
        f'{100 * last:.1f} % in the last epoch. The best checkpoint is kept{advice}'
    ]


def _draw(experiment, variables, attacks, found, workdir):
    """Draws the plots of a run; returns their paths."""
    config, folder = experiment.config, os.path.join(workdir, 'plots')
    title = f'{config.model.name}, {config.model.layer}, {experiment.source.description}, seed {config.seed}'
    paths = []
    rows = read_rows(os.path.join(workdir, 'metrics.csv'))
    if rows:
        paths.append(plots.learning_curves(rows, os.path.join(folder, 'learning_curves.png'), title=title))
    if attacks or 'autoattack' in found:
        path = os.path.join(folder, 'attacks.png')
        paths.append(_draw_attacks(experiment, variables, attacks, found, path, title))
    spectra = layer_spectra(experiment.model, variables, experiment.input_shape)
    if spectra:
        paths.append(plots.layer_spectra(spectra, os.path.join(folder, 'layer_spectra.png'), title=title))
    return paths


def _draw_attacks(experiment, variables, attacks, found, path, title):
    evaluator, test = experiment.evaluator, experiment.prepared.test
    _, first = np.unique(test.labels, return_index=True)  # the first example of each class: not chosen by hand
    chosen = first[:_COLUMNS]
    pixels, labels = np.asarray(test.images[chosen]).astype(np.float32) / 255, test.labels[chosen]
    predict = functools.partial(evaluator.predict, variables)
    attacked = {
        attack_label(name, experiment.config): evaluator.attack_images(
            variables, pixels, labels, attack, experiment.config.seed
        )
        for name, attack in attacks.items()
    }
    if 'autoattack' in found and chosen.max() < len(found['autoattack'].images):
        attacked['AutoAttack'] = found['autoattack'].images[chosen]
    return plots.attack_grid(
        pixels,
        attacked,
        labels,
        predict(pixels),
        {name: predict(images) for name, images in attacked.items()},
        experiment.source.class_names,
        path,
        epsilon=experiment.config.attack.epsilon / 255,
        title=title,
    )


def _table(experiment, result, attacked, found):
    config = experiment.config
    rows = [
        (
            name,
            '' if name == 'clean' else f'eps {config.attack.epsilon:g}/255',
            f'{100 * accuracy:.2f} %',
            f'{examples}',
        )
        for name, accuracy, examples, _ in attack_rows(config, result, attacked, found)
    ]
    return '\n'.join(
        [
            '',
            f'{config.model.name} with {config.model.layer} ({result["parameters"]:,} parameters) on {result["data"]}, '
            f'seed {config.seed}, {result["checkpoint"]} checkpoint '
            f'(step {result["checkpoint_step"]} of {result["total_steps"]})',
            '',
            markdown_table(('attack', 'size', 'accuracy', 'examples'), rows, 2),
            '',
            f'trained at {result["examples_per_second"]:,.0f} examples/s on {result["device"]}',
            *_collapse(result, experiment.source.num_classes),
        ]
    )
