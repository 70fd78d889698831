"""The end of a GAN's run: scores, plots, `result.json` and a table."""

import os
from typing import Any

import numpy as np

from convnorm_jax import plots
from convnorm_jax.evaluation.layers import layer_spectra
from convnorm_jax.mesh import is_leader
from convnorm_jax.reports.classifier import written_on_failure
from convnorm_jax.reports.facts import count_parameters, run_facts
from convnorm_jax.reports.gan_scores import make_scorer
from convnorm_jax.reports.tables import markdown_table
from convnorm_jax.runs.disk import check_writable
from convnorm_jax.runs.metrics import read_rows
from convnorm_jax.runs.workdir import write_result
from convnorm_jax.training.generation import GRID_COLUMNS, GRID_ROWS, GRID_SEED, SCORE_SEED, Generation
from convnorm_jax.training.loop import restore_state

_SHOWN = 48  # real images next to generated ones
_STEPS_SHOWN, _IMAGES_SHOWN = 6, 10  # of the progress of the training
SCORES_SHOWN = ('fid_classifier', 'classifier_score')


def report(experiment: Generation, workdir: str) -> dict[str, Any]:
    """Scores a run's generator and writes what it finds.

    Writes `result.json` and, unless config.plots is off, `plots/*.png`; prints the table. If some features fail, the
    scores by the features before them are written as in `reports.classifier.report`.

    Returns:
      The flat dict of `result.json`.
    """
    config, sampler = experiment.config, experiment.sampler
    if is_leader():
        check_writable(workdir)
    state, chosen, final = restore_state(experiment, workdir, config.eval.checkpoint)
    images, labels = sampler.draw(state.eval_variables, config.eval.samples, SCORE_SEED + config.seed + 1)
    test = experiment.prepared.test
    scores: dict[str, float] = {}
    real: dict[str, float] = {}
    paths: list[str] = []

    def write(**more):
        result = {
            **scores,
            **{f'real_{name}': value for name, value in real.items()},
            'samples': len(images),
            **_facts(experiment, state, chosen, final),
            **more,
        }
        paths.append(write_result(workdir, result))
        print(_table(result, scores, real), flush=True)
        return result

    with written_on_failure(write):
        for features in config.eval.features:
            scorer = make_scorer(experiment, workdir, features)
            found = scorer(images, labels)
            real.update(scorer(test.images, None if labels is None else test.labels))
            scores.update(found)
    result = write()
    if config.plots:
        paths += _draw(experiment, state, images, workdir)
    for path in paths:
        print(f'wrote {path}')
    return result


def _facts(experiment, state, chosen, final):
    section = experiment.config.gan
    return {
        **run_facts(experiment, chosen, final),
        'generator_layer': section.generator_layer,
        'generator_parameters': count_parameters(state.generator.params),
        'discriminator_parameters': count_parameters(state.discriminator.params),
        'loss': section.loss,
        'best_rating': final.best_rating,
        'steps_per_second': final.examples_per_second / experiment.batch_examples,
    }


def _draw(experiment, state, images, workdir):
    """Draws the plots of a run; returns their paths."""
    config, folder, sampler = experiment.config, os.path.join(workdir, 'plots'), experiment.sampler
    net = f'{config.model.name}, discriminator with {config.model.layer}'
    title = f'{net}, {experiment.source.description}, seed {config.seed}'
    variables = state.eval_variables
    place = lambda name: os.path.join(folder, f'{name}.png')
    z, labels = sampler.grid(GRID_SEED + config.seed, GRID_COLUMNS, GRID_ROWS)
    grid = sampler.images(variables, z, labels)
    real = experiment.prepared.test.images[:_SHOWN]
    paths = [
        plots.sample_grid(grid, place('samples'), columns=GRID_COLUMNS, title=title),
        plots.real_and_fake(real, images[: len(real)], place('real_and_fake'), title=title),
        plots.interpolation_grid(_interpolations(sampler, variables, z, labels), place('interpolation'), title=title),
    ]
    progress = _progress(workdir, state)
    if len(progress) > 1:
        paths.append(plots.sample_progress(progress, place('progress'), title=title))
    rows = read_rows(os.path.join(workdir, 'metrics.csv'))
    if rows:
        paths.append(plots.gan_curves(rows, place('learning_curves'), title=title, score_names=SCORES_SHOWN))
    spectra = layer_spectra(
        experiment.discriminator, state.discriminator.variables, experiment.input_shape, np.zeros(1, np.int32)
    )
    if spectra:
        paths.append(plots.layer_spectra(spectra, place('layer_spectra'), title=title))
    return paths


def _interpolations(sampler, variables, z, labels, rows=GRID_ROWS, columns=GRID_COLUMNS):
    """Images [rows, columns, H, W, C] between pairs of latents of the grid, along great circles."""
    start, end = z[:rows], z[rows : 2 * rows]
    share = np.linspace(0, 1, columns)[:, None]
    between = np.concatenate([_great_circle(a, b, share) for a, b in zip(start, end)]).astype(np.float32)
    classes = None if labels is None else np.repeat(labels[:rows], columns)
    images = sampler.images(variables, between, classes)
    return images.reshape(rows, columns, *images.shape[1:])


def _great_circle(a, b, share):
    # Normal vectors lie near a sphere: a straight line would leave the region that the generator was trained on.
    angle = np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
    return (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)


def _progress(workdir, state):
    """[(step, images of the same latents)] of a few steps of the training, evenly spaced."""
    folder = os.path.join(workdir, 'samples')
    names = sorted(n for n in os.listdir(folder) if n.endswith('.npz')) if os.path.isdir(folder) else []
    names = [n for n in names if int(n.removesuffix('.npz')) <= int(state.step)]
    chosen = sorted({round(i) for i in np.linspace(0, len(names) - 1, min(_STEPS_SHOWN, len(names)))})
    progress = []
    for name in (names[i] for i in chosen):
        with np.load(os.path.join(folder, name)) as data:
            progress.append((int(data['step']), data['images'][:_IMAGES_SHOWN]))
    return progress


def _table(result, scores, real):
    rows = [(name, _number(scores, name), _number(real, name)) for name in scores if not name.endswith('_std')]
    return '\n'.join(
        [
            '',
            f'{result["model"]} with a {result["layer"]} discriminator '
            f'({result["discriminator_parameters"]:,} parameters, generator {result["generator_parameters"]:,}) '
            f'on {result["data"]}, seed {result["seed"]}, '
            f'{result["checkpoint"]} checkpoint (step {result["checkpoint_step"]} of {result["total_steps"]}), '
            f'{result["samples"]} generated and {result["test_examples"]} test images',
            '',
            markdown_table(('score', 'generated', 'real test images'), rows),
            '',
            f'trained at {result["steps_per_second"]:.2f} steps/s on {result["device"]}',
        ]
    )


def _number(scores, name):
    spread = scores.get(f'{name}_std')
    return f'{scores[name]:.4f}' + ('' if spread is None else f' +- {spread:.4f}')
