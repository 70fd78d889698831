"""Measures time, memory, compilation and the compiled program of training steps with ConvNorm and with other layers.

    python -m benchmarks.step [--nets=resnet18,simple_cnn] [--layers=convnorm,batchnorm,spectralnorm,oni,own]
        [--batch_sizes=32,128] [--dtypes=float32] [--repeats=5] [--algorithm=clean|free] [--output=FILE.json]
        [--torch=CHECKOUT]

A step is that of the training loop: uint8 images of 32x32 on the device, crop and flip, one SGD update (Free: four,
each with one gradient for weights and perturbation), the state donated. Figures are medians over the repeats, with the
layers of a net, batch size and dtype in turn within each. Ratios are to 'batchnorm' (convolution and BatchNorm) in the
same run.

Compilation is tracing and compiling in a process of its own, first with an empty persistent cache and then, as the
median of three other processes, with the cache that the first one filled. Memory is the compiler's: arguments,
temporaries and output, less the output that reuses donated arguments. On a GPU the table also shows the peak that the
device reports for that process, which has made the state and taken one step.

Instructions of the compiled program are counted everywhere, in fusions too, and once in a loop; products
include those left to a library. The lower bound is the longer of two times: operations, which XLA counts in the
program as written, divided by the rate of a large dense product, and bytes, which it counts in the compiled program,
divided by the rate of a copy. Both rates are measured here. It is the lower bound of this program, not of the layer.

--torch times the published nets of a checkout of https://github.com/shengliu66/ConvNorm in turn with ours (float32,
clean, images augmented beforehand), each in a process of its own.
"""

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, published, timing
from convnorm_jax import mesh
from convnorm_jax.data.augment import augment
from convnorm_jax.models.classifiers import create_model
from convnorm_jax.steps import adversarial, classify
from convnorm_jax.steps.state import create_state, make_optimizer

PICTURE = (32, 32, 3)
ALGORITHMS = ('clean', 'free')
# For CIFAR: number of training images, and {protocol: (algorithm, epochs)}.
EXAMPLES = 45_000
PROTOCOLS = {
    'CIFAR-10, clean, 120 epochs': ('clean', 120),
    'CIFAR-100, clean, 150 epochs': ('clean', 150),
    'CIFAR-10, Free, 30 epochs x 4': ('free', 30),
}
REPLAYS = 4
WARM_STARTS = 3
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(', re.MULTILINE)
_TARGET = re.compile(r'custom_call_target="([^"]+)"')

Case = collections.namedtuple('Case', 'net layer batch_size dtype algorithm')


def main():
    """Prints the tables, and writes their content to --output."""
    options = _options()
    if options.child:
        print(json.dumps(_compile(Case(*json.loads(options.child)))))
        return
    if options.torch:  # now, not after the measurements
        published.check(options.torch)
    groups = [
        [Case(net, layer, batch_size, dtype, options.algorithm) for layer in options.layers]
        for net in options.nets
        for dtype in options.dtypes
        for batch_size in options.batch_sizes
    ]
    with tempfile.TemporaryDirectory() as cache:
        # Before this process uses the device: on a GPU it would take the memory that the others need.
        programs = {case: _in_processes(case, cache) for group in groups for case in group}
        jax.config.update('jax_compilation_cache_dir', cache)
        rates = {dtype: timing.machine_rates(dtype) for dtype in options.dtypes}
        print(machine.description())
        timing.say_rates(rates)
        rows = [row for group in groups for row in _measure(options, group, programs, rates)]
    _print(rows, options)
    timing.save(options, rates, rows, 'optax', *(['torch'] if options.torch else []))


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--nets', type=timing.names, default='resnet18,simple_cnn')
    parser.add_argument('--layers', type=timing.names, default='convnorm,batchnorm,spectralnorm,oni,own')
    parser.add_argument('--batch_sizes', type=timing.numbers, default='32,128')
    parser.add_argument('--dtypes', type=timing.names, default='float32')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--algorithm', choices=ALGORITHMS, default='clean')
    parser.add_argument('--torch', metavar='CHECKOUT', help='of the published code')
    parser.add_argument('--output', help='a JSON file')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    return parser.parse_args()


class Step:
    """A training step with its state and batch; once compiled, a call makes a step and returns its metrics.

    Attributes:
      model: the net.
      lowered: the program, traced.
      compiled: the program, compiled (see `compile`).
      compile_seconds: of both.
    """

    def __init__(self, case, **layer_options):
        """`layer_options`: see `layers.factory.LAYER_OPTIONS`."""
        model = create_model(case.net, num_classes=10, layer=case.layer, dtype=case.dtype, **layer_options)
        self.model, tx = model, make_optimizer('sgd', 0.1, momentum=0.9, weight_decay=1e-4)
        settings = {
            'mean': (0.4914, 0.4822, 0.4465),
            'std': (0.2023, 0.1994, 0.2010),
            'augment_fn': functools.partial(augment, kind='crop_flip', padding=4),
        }
        if case.algorithm == 'clean':
            step = classify.make_train_step(model, tx, **settings)
        else:
            ball = {'epsilon': 8 / 255, 'step_size': 8 / 255}
            step = adversarial.make_free_step(model, tx, replays=REPLAYS, **ball, **settings)
        self._create, self._state = lambda: create_state(model, tx, PICTURE, seed=0), None
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (case.batch_size, *PICTURE), np.uint8)
        labels = random.integers(0, 10, case.batch_size).astype(np.int32)
        self._batch = jax.device_put({'images': images, 'labels': labels})
        start = time.perf_counter()
        self.lowered = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(self._create), self._batch)
        self.compile_seconds = time.perf_counter() - start
        self.compiled = None

    def compile(self):
        """Compiles the program; returns the step."""
        start = time.perf_counter()
        self.compiled = self.lowered.compile(mesh.compiler_options())
        self.compile_seconds += time.perf_counter() - start
        return self

    def start(self):
        """Makes the state and returns the step; without it the first call does."""
        self._state = jax.block_until_ready(jax.jit(self._create)())
        return self

    @property
    def memory_bytes(self):
        """The compiler's estimate: arguments, temporaries and output, less the output that reuses donated arguments."""
        memory = self.compiled.memory_analysis()
        size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        return size - memory.alias_size_in_bytes

    @property
    def eval_variables(self):
        """A copy of the variables to evaluate the net with; the next call does not change it."""
        return jax.tree.map(jnp.copy, self._state.eval_variables)

    @property
    def abstract_variables(self):
        """Shapes and dtypes of `eval_variables`, without a state."""
        return jax.eval_shape(self._create).eval_variables

    def __call__(self):
        if self._state is None:
            self.start()
        self._state, metrics = self.compiled(self._state, self._batch)
        return metrics


def _in_processes(case, cache):
    """The result of `_compile` for a case, with 'compile_again_seconds', the time with a filled cache."""
    environment = {
        **os.environ,
        'JAX_COMPILATION_CACHE_DIR': cache,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    command = [sys.executable, '-m', 'benchmarks.step', f'--child={json.dumps(case)}']
    found, stored = [], []
    for _ in range(1 + WARM_STARTS):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        stored.append({name for name in os.listdir(cache) if 'train_step' in name and name.endswith('-cache')})
    if not stored[0] or stored[0] != stored[-1]:  # e.g. because a file of the program was edited in between
        print(f'{case}: the other processes did not find the program of the first one', file=sys.stderr)
    return {**found[0], 'compile_again_seconds': np.median([f['compile_seconds'] for f in found[1:]])}


def _compile(case):
    """Compiles a case's program: seconds, bytes, instructions, operations."""
    step = Step(case).compile()
    memory, text = step.compiled.memory_analysis(), step.compiled.as_text()
    found = {
        'compile_seconds': step.compile_seconds,
        'memory_bytes': step.memory_bytes,
        'argument_bytes': memory.argument_size_in_bytes,
        'temporary_bytes': memory.temp_size_in_bytes,
        # Of the program as written: a GPU's compiled program calls libraries, whose operations XLA may not count.
        'operations': _cost(step.lowered, 'flops'),
        'compiled_operations': _cost(step.compiled, 'flops'),
        'compiled_bytes': _cost(step.compiled, 'bytes accessed'),
        'instructions': instructions(text),
        'peak_bytes': None,
    }
    if jax.default_backend() != 'cpu':
        jax.block_until_ready(step())
        found['peak_bytes'] = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
    return found


def _cost(program, name):
    """XLA's cost analysis; 0 for what a backend does not report."""
    return (program.cost_analysis() or {}).get(name, 0.0)


def instructions(text):
    """{kind: number} of a compiled program's text: convolutions, products, FFTs, transposes, copies, fusions."""
    counts, targets = collections.Counter(_INSTRUCTION.findall(text)), _TARGET.findall(text)
    convolving = [target for target in targets if 'conv' in target.lower()]
    multiplying = [target for target in targets if re.search('gemm|matmul', target.lower())]
    return {
        'convolutions': counts['convolution'] + len(convolving),
        'products': counts['dot'] + len(multiplying),
        'ffts': counts['fft'],
        'transposes': counts['transpose'],
        'copies': counts['copy'] + counts['copy-start'],
        'fusions': counts['fusion'],
        'all': sum(counts.values()),
    }


def _measure(options, group, programs, rates):
    """Rows of the cases that differ in their layers only."""
    first = group[0]
    steps = {case.layer: Step(case).compile() for case in group}
    others = {}
    if options.torch and (first.dtype, first.algorithm) == ('float32', 'clean') and first.net in published.NETS:
        others = {
            name: published.StepInProcess(options.torch, first.net, layer, first.batch_size)
            for layer, name in published.NAMES.items()
        }
    ms = timing.medians_ms(timing.interleaved({**steps, **others}, options.repeats))
    for other in others.values():
        other.close()
    for case in group:
        loss, count = steps[case.layer]()['loss']
        if not jnp.isfinite(loss / count):
            raise SystemExit(f'FAILED: {case.net} with {case.layer}: the loss is {loss / count} in the end')
    memory = {case.layer: programs[case]['memory_bytes'] for case in group}
    rows = []
    for layer, milliseconds in ms.items():
        row = {
            **first._replace(layer=layer)._asdict(),
            'step_ms': milliseconds,
            'examples_per_second': 1e3 * first.batch_size / milliseconds,
            'ratio': timing.ratio(milliseconds, ms.get('batchnorm')),
        }
        case = Case(**{name: row[name] for name in Case._fields})
        if case in programs:
            found = programs[case]
            floor = timing.floor_ms(found['operations'], found['compiled_bytes'], rates[case.dtype])
            row['memory_ratio'] = timing.ratio(memory[layer], memory.get('batchnorm'))
            row.update(found, floor_ms=floor)
        rows.append(row)
    return rows


def _print(rows, options):
    print(f'\n{options.algorithm}, medians of {options.repeats}')
    timing.print_table([{**_of_case(row), **_times(row)} for row in rows])
    print('\nThe compiled programs')
    timing.print_table([{**_of_case(row), **_program(row)} for row in rows if 'instructions' in row])
    hours = [{**_of_case(row), **_hours(row)} for row in rows if row['batch_size'] == 128]
    if hours:
        print('\nHours of training, without evaluation, from the examples/s above' + _caution(options))
        timing.print_table(hours)


def _of_case(row):
    return {'net': row['net'], 'layer': row['layer'], 'batch': row['batch_size'], 'dtype': row['dtype']}


def _times(row):
    mega = lambda name: row[name] / 1e6 if row.get(name) is not None else None
    found = {
        'step ms': row['step_ms'],
        'ratio': row['ratio'],
        'floor ms': row.get('floor_ms'),
        'examples/s': row['examples_per_second'],
        'compile s': row.get('compile_seconds'),
        'second time': row.get('compile_again_seconds'),
        'memory MB': mega('memory_bytes'),
        'ratio of memory': row.get('memory_ratio'),
    }
    return {**found, 'peak MB': mega('peak_bytes')} if jax.default_backend() != 'cpu' else found


def _program(row):
    found = {'GFLOP': row['operations'] / 1e9, 'compiled GFLOP': row['compiled_operations'] / 1e9}
    return {**found, 'compiled GB': row['compiled_bytes'] / 1e9, **row['instructions']}


def _hours(row):
    """{protocol: hours}; a clean step is used for each of Free's updates."""
    found = {}
    for protocol, (algorithm, epochs) in PROTOCOLS.items():
        if row['algorithm'] in (algorithm, 'clean'):
            updates = REPLAYS if row['algorithm'] != algorithm else 1
            found[protocol] = updates * epochs * EXAMPLES / row['examples_per_second'] / 3600
    return found


def _caution(options):
    return '; Free as clean steps, without the gradient with respect to the image' * (options.algorithm == 'clean')


if __name__ == '__main__':
    main()
