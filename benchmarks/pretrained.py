"""Makes the nets of `convnorm_jax.pretrained` from runs: weights, measurements, model cards.

    convnorm train --config=digits_convnorm --workdir=RUNS/digits_convnorm
    convnorm train --config=digits_trades --workdir=RUNS/digits_robust
    convnorm train --config=digits_gan --workdir=RUNS/digits_gan
    python -m benchmarks.pretrained --runs=RUNS [--names=digits_convnorm,digits_robust,digits_gan]

The figures of a classifier's card are measured on the written file, as `load_pretrained` reads it; a generator's are
those of its run's result.json.
"""

import argparse
import hashlib
import io
import os
import pathlib

import jax
import numpy as np
from flax import traverse_util

import convnorm_jax
from convnorm_jax import attacks, pretrained
from convnorm_jax.data.sources import load_source
from convnorm_jax.files import write_atomically, write_json
from convnorm_jax.reports.facts import count_parameters
from convnorm_jax.runs.workdir import read_result
from convnorm_jax.training import loop, setup
from convnorm_jax.training.config import run_config

FOLDER = pathlib.Path(convnorm_jax.__file__).parent / 'pretrained'
LEVELS = (8, 32)  # of the attacks, in 1/255
ATTACKED = 100  # test images
# Name: (its config, what it is, its limits).
ABOUT = {
    'digits_convnorm': (
        'digits_convnorm',
        'SimpleCNN with ConvNorm, trained without attacks.',
        ['Not robust at 32/255: it is the net to compare digits_robust with.'],
    ),
    'digits_robust': (
        'digits_trades',
        'SimpleCNN with ConvNorm, trained by TRADES (Zhang et al. 2019, arXiv 1901.08573) at 32/255.',
        ['Robustness is measured by attacks, not certified.'],
    ),
    'digits_gan': (
        'digits_gan',
        'Generator of a conditional SNGAN whose discriminator has ConvNorm; an average of the parameters over the run.',
        ['The scores are by the features of a small classifier of the same digits. They are not FIDs.'],
    ),
}
COMMON_LIMITS = ['Digits of 8x8 pixels by one seed: an example of the library, not a net for reading digits.']
GAN_FIGURES = ('fid_classifier', 'kid_classifier', 'classifier_score', 'label_agreement')


def make(name, workdir):
    """Writes NAME.npz and NAME.json of the run in `workdir`."""
    config_name, description, limits = ABOUT[name]
    config = run_config(workdir)
    experiment = setup.build(config)
    variables, _, progress = loop.restore_variables(experiment, workdir, config.eval.checkpoint)
    card = {
        'name': name,
        'description': description,
        'data': experiment.source.description,
        'parameters': count_parameters(variables['params']),
        'commands': [f'convnorm train --config={config_name}', f'python -m benchmarks.pretrained --names={name}'],
        'training': f'{progress.step} steps of batch {config.data.batch_size}, seed {config.seed}, 2-core CPU',
        'licence': 'MIT',
        'limits': [*limits, *COMMON_LIMITS],
        **(_generator(config, experiment) if config.train.algorithm == 'gan' else _classifier(config, experiment)),
    }
    arrays = {key: np.asarray(value) for key, value in traverse_util.flatten_dict(variables, sep='/').items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    content = file.getvalue()
    card['sha256'] = hashlib.sha256(content).hexdigest()
    write_atomically(FOLDER / f'{name}.npz', lambda out: out.write(content))
    write_json(FOLDER / f'{name}.json', {**card, 'figures': {}, 'measured_by': ''})
    if card['kind'] == 'classifier':
        figures, by = measure(name), f'in %; attacks on the first {ATTACKED} test images, seed 0, 2-core CPU'
    else:
        result = read_result(workdir)
        figures = {key: round(result[key], 4) for key in GAN_FIGURES if key in result}
        by = f'by the report of the run, on {config.eval.samples} generated images, 2-core CPU'
    write_json(FOLDER / f'{name}.json', {**card, 'figures': figures, 'measured_by': by})


def _classifier(config, experiment):
    model = config.model
    return {
        'kind': 'classifier',
        'model': {
            'name': model.name,
            'num_classes': experiment.source.num_classes,
            'layer': model.layer,
            'width': model.width,
        },
        'mean': list(experiment.source.mean),
        'std': list(experiment.source.std),
    }


def _generator(config, experiment):
    return {
        'kind': 'generator',
        'model': {
            'name': config.model.name,
            'picture_shape': list(experiment.input_shape),
            'latent': config.gan.latent,
            'num_classes': experiment.source.num_classes,
            'generator_width': config.gan.generator_width,
            'discriminator_layer': config.model.layer,
            'discriminator_width': config.model.width,
        },
    }


def measure(name):
    """{figure: accuracy in %} of a pretrained classifier on scikit-learn's test digits."""
    net, test = pretrained.load_pretrained(name), load_source('digits').test
    images = np.asarray(test.images, np.float32) / 255
    labels = np.asarray(test.labels, np.int32)
    accuracy = lambda x: round(100 * float((jax.jit(net)(x).argmax(-1) == labels[: len(x)]).mean()), 2)
    figures = {'clean': accuracy(images), f'clean, first {ATTACKED}': accuracy(images[:ATTACKED])}
    images, labels = images[:ATTACKED], labels[:ATTACKED]
    for level in LEVELS:
        epsilon, key = level / 255, jax.random.key(0)
        options = {'epsilon': epsilon, 'step_size': epsilon / 4, 'steps': 20, 'restarts': 5, 'rng': key}
        figures[f'PGD-20, 5 restarts, {level}/255'] = accuracy(attacks.pgd(net, images, labels, **options))
        found = attacks.run_ensemble(net, images, labels, epsilon=epsilon, rng=key)
        figures[f'AutoAttack, {level}/255'] = round(100 * found.robust_accuracy, 2)
    return figures


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--runs', default='runs', help='folder of the runs, one of each name')
    parser.add_argument('--names', default=','.join(pretrained.NAMES))
    options = parser.parse_args()
    for name in options.names.split(','):
        make(name, os.path.join(options.runs, name))
        print(pretrained.load_pretrained(name).card)


if __name__ == '__main__':
    main()
