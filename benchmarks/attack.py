"""Times PGD on a net with ConvNorm and on nets with other layers, in turn.

    python -m benchmarks.attack [--net=resnet18] [--layers=convnorm,batchnorm] [--batch_size=100] [--steps=10]
        [--repeats=3] [--dtype=float32] [--output=FILE.json]

One batch of random images of 32x32, random weights, running statistics: the cost depends on neither images nor
weights. The attack is that of the evaluation (`evaluation.classifier.Evaluator`): PGD with steps of 2/255 in the ball
of 8/255 from a random start, with the final prediction. The prediction of the clean images is timed as well. Figures
are medians over the repeats, with the layers in turn within each. The seconds to compile are the extra time of the
first call.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np

from benchmarks import machine, timing
from convnorm_jax import mesh
from convnorm_jax.evaluation.classifier import AttackSettings, Evaluator
from convnorm_jax.models.classifiers import create_model
from convnorm_jax.steps.classify import make_logits_fn

PICTURE = (32, 32, 3)
PROGRAMS = ('pgd', 'forward')


def main():
    """Prints one table, and writes it to --output."""
    options = _options()
    programs, first = {}, {}
    for layer in options.layers:
        for name, run in make_programs(options, layer).items():
            start = time.perf_counter()
            run()
            programs[layer, name], first[layer, name] = run, time.perf_counter() - start
    seconds = timing.interleaved(programs, options.repeats)
    seconds = {key: statistics.median(values) for key, values in seconds.items()}
    rows = [_row(options, layer, seconds, first) for layer in options.layers]
    print(f'{options.net}, batch {options.batch_size}, {options.dtype}, medians of {options.repeats}')
    print(machine.description())
    timing.print_table([_cells(options, row) for row in rows])
    timing.save(options, None, rows)


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--net', default='resnet18')
    parser.add_argument('--layers', type=timing.names, default='convnorm,batchnorm')
    parser.add_argument('--dtype', default='float32')
    for name, value in (('batch_size', 100), ('steps', 10), ('repeats', 3)):
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--output', help='a JSON file')
    return parser.parse_args()


def make_programs(options, layer):
    """{name: function without arguments} of `PROGRAMS`, which wait for their results.

    Args:
      options: `net`, `dtype`, `batch_size`, `steps`.
      layer: of the net.
    """
    model = create_model(options.net, num_classes=10, layer=layer, dtype=options.dtype)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (options.batch_size, *PICTURE), np.uint8)
    labels = random.integers(0, 10, options.batch_size).astype(np.int32)
    split = jax.device_put({'images': images, 'labels': labels})
    logits_fn = make_logits_fn(model, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    evaluator = Evaluator(logits_fn, mesh.create_mesh(jax.devices()[:1]), options.batch_size)
    init = functools.partial(model.init, train=False)
    variables = jax.jit(init)(jax.random.key(0), np.zeros((1, *PICTURE), np.float32))
    attack = AttackSettings('pgd', 8 / 255, 2 / 255, options.steps, restarts=1, loss='cross_entropy')
    return {
        'pgd': lambda: evaluator.robust_accuracy(variables, split, attack, seed=0)['accuracy'],
        'forward': lambda: evaluator.evaluate(variables, split)['loss'],
    }


def _row(options, layer, seconds, first):
    """The figures of a layer."""
    row = {'layer': layer}
    for name in PROGRAMS:
        taken = seconds[layer, name]
        row[f'{name}_ms'] = 1e3 * taken
        row[f'{name}_images_per_second'] = options.batch_size / taken
        row[f'{name}_ratio'] = timing.ratio(taken, seconds.get(('batchnorm', name)))
        row[f'{name}_compile_seconds'] = first[layer, name] - taken
    return row


def _cells(options, row):
    """{column: cell}"""
    found = {'layer': row['layer']}
    for name, title in zip(PROGRAMS, (f'PGD-{options.steps}', 'forward')):
        found[f'{title} ms'] = row[f'{name}_ms']
        found[f'{title} images/s'] = row[f'{name}_images_per_second']
        found[f'{title} ratio'] = row[f'{name}_ratio']
        found[f'{title} compile s'] = row[f'{name}_compile_seconds']
    return found


if __name__ == '__main__':
    main()
