"""Stages of the GPU plan that time something: training steps, inference, layers, an attack, a GAN's step.

`first` compiles one program, times it, and goes on to the next: its seconds to compile are those of a user, and what
it found is there whatever comes after. The other stages compile all their programs at once, in threads, and only then
measure, one program after the other in turn: a lent machine has many cores. Their seconds to compile are those of a
busy machine.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import os
import traceback

import jax
import numpy as np

from benchmarks import attack, gan_step, layer, machine, timing
from benchmarks.gpu.methods import METHODS
from benchmarks.step import PICTURE, Case, Step
from convnorm_jax import mesh
from convnorm_jax.steps.classify import make_logits_fn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
MOST_THREADS = 16


def in_threads(functions):
    """{name: what its function of nothing returns}, and {name: reason} of those that raised."""
    found, failed = {}, {}
    with concurrent.futures.ThreadPoolExecutor(min(machine.cores(), MOST_THREADS)) as pool:
        futures = {name: pool.submit(function) for name, function in functions.items()}
        for name, future in futures.items():
            try:
                found[name] = future.result()
            except Exception as error:
                traceback.print_exception(error)
                failed[name] = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
    return found, failed


def machine_facts(report):
    """What the device is, and its rates."""
    report.say(machine.description())
    rates = {dtype: timing.machine_rates(dtype) for dtype in ('float32', 'bfloat16')}
    with jax.default_matmul_precision('highest'):
        rates['float32, highest precision'] = timing.machine_rates('float32')
    versions = machine.versions('jax', 'jaxlib', 'flax', 'optax', 'numpy')
    report.row(machine=machine.description(), versions=versions, rates=rates)
    for dtype, rate in rates.items():
        report.show({'dtype': dtype, 'product TFLOP/s': rate['product'] / 1e12, 'copy GB/s': rate['copy'] / 1e9})


# --- training steps and inference ----------------------------------------------------------------


def first(report, net, dtype, batch_size, layers=('batchnorm', 'convnorm'), repeats=15):
    """The training step with each layer, compiled alone and timed at once."""
    found = {'training': {}}
    for name in layers:
        report.say(f'compiling the step with {name}')
        case = Case(net, name, batch_size, dtype, 'clean')
        step = Step(case).compile().start()
        found['training'].update(timing.medians_ms(timing.interleaved({name: step}, repeats)))
        _report_step(report, case, found, step)


class _Programs:
    """The step of a net, and the net at inference: traced, not compiled."""

    def __init__(self, case, options, precision):
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
            self.step = Step(case, **options)
            logits_fn = make_logits_fn(self.step.model, MEAN, STD)
            self._pixels = np.random.default_rng(1).random((case.batch_size, *PICTURE), np.float32)
            self._lowered = jax.jit(logits_fn).lower(self.step.abstract_variables, self._pixels)
        self.text = self.step.lowered.as_text(), self._lowered.as_text()
        self._inference = None

    def compile_inference(self):
        """Compiles the net at inference."""
        self._inference = self._lowered.compile(mesh.compiler_options())

    def inference(self):
        """That, as a function of nothing."""
        return functools.partial(self._inference, self.step.eval_variables, jax.device_put(self._pixels))


def steps(report, net, dtype, batch_size, methods=False, algorithm='clean', precision=None, repeats=9):
    """Training steps and inference of a net with ConvNorm, convolution and BatchNorm, and spectral norm, in turn.

    Args:
      methods: ConvNorm by each of its methods too.
      precision: of the products (`jax_default_matmul_precision`), None for JAX's default.
    """
    forced = [('convnorm', {'method': method}) for method in METHODS if methods]
    layers = [('convnorm', {}), *forced, ('batchnorm', {}), ('spectralnorm', {})]
    build = lambda name, options: _Programs(Case(net, name, batch_size, dtype, algorithm), options, precision)
    found, failed = in_threads({_title(*one): functools.partial(build, *one) for one in layers})
    found, same = _without_copies(found)
    jobs = {}
    for name, programs in found.items():
        jobs[name, 'training'], jobs[name, 'state'] = programs.step.compile, programs.step.start
        jobs[name, 'inference'] = programs.compile_inference
    done, not_done = in_threads(jobs)
    failed.update({' '.join(name): reason for name, reason in not_done.items()})
    compiled = lambda part: [name for name in found if {(name, part), (name, 'state')} <= set(done)]
    parts = {
        'training': {name: found[name].step for name in compiled('training')},
        'inference': {name: found[name].inference() for name in compiled('inference')},
    }
    seconds = {part: timing.medians_ms(timing.interleaved(programs, repeats)) for part, programs in parts.items()}
    for name in found:
        step = found[name].step if name in seconds['training'] else None
        _report_step(report, Case(net, name, batch_size, dtype, algorithm), seconds, step, precision, same[name])
    _say_failed(report, failed)
    report.row(peak_bytes=(jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'), of='the process so far')


def _report_step(report, case, milliseconds, step, precision=None, same=()):
    """A row for a layer; `case.layer` is its title, and `step` None where it did not compile."""
    row = {**case._asdict(), 'precision': precision, 'same_program_as': list(same)}
    row.update(_figures(case.layer, case.batch_size, milliseconds))
    if step is not None:
        row['finite'] = bool(np.isfinite(np.divide(*step()['loss'])))
        row['memory_mb'], row['compile_seconds'] = step.memory_bytes / 1e6, step.compile_seconds
    report.row(**row)
    report.show(_cells(row))


def _title(name, options):
    return ' '.join([name, *map(str, options.values())])


def _without_copies(found):
    """The programs without those that are the same as one before, and {name: names of such copies}."""
    first, same = {}, {}
    for name, programs in found.items():
        first.setdefault(programs.text, name)
        same.setdefault(first[programs.text], []).append(name)
    return {name: found[name] for name in same}, {name: names[1:] for name, names in same.items()}


def _figures(name, batch_size, milliseconds):
    found = {}
    for part, ms in milliseconds.items():
        if name in ms:
            found[f'{part}_ms'], found[f'{part}_images_per_second'] = ms[name], 1e3 * batch_size / ms[name]
            found[f'{part}_ratio'] = timing.ratio(ms[name], ms.get('batchnorm'))
    return found


def _cells(row):
    copies = f' (= {", ".join(row["same_program_as"])})' if row['same_program_as'] else ''
    return {
        f'{row["net"]}, {row["algorithm"]}': row['layer'] + copies + ('' if row.get('finite', True) else ' NOT FINITE'),
        'dtype': row['dtype'] + (f' {row["precision"]}' if row['precision'] else ''),
        'batch': row['batch_size'],
        'step ms': row.get('training_ms'),
        'images/s': row.get('training_images_per_second'),
        'ratio': row.get('training_ratio'),
        'memory MB': row.get('memory_mb'),
        'compile s': row.get('compile_seconds'),
        'inference ms': row.get('inference_ms'),
        'inference images/s': row.get('inference_images_per_second'),
        'ratio of it': row.get('inference_ratio'),
    }


# --- layers, attack, GAN -------------------------------------------------------------------------


def layer_table(report, dtype, batch_size, shapes=None, repeats=7):
    """Every convolution shape of ResNet-18, forward and backward, and at inference."""
    shapes = [layer.Shape(*shape) for shape in shapes or layer.RESNET18]
    found, failed = in_threads({shape: functools.partial(_layers, shape, batch_size, dtype) for shape in shapes})
    sums = collections.Counter()
    for shape, (layers, chosen) in found.items():
        ms = {
            part: timing.medians_ms(timing.interleaved({n: getattr(one, part) for n, one in layers.items()}, repeats))
            for part in ('training', 'inference')
        }
        row = {'training_ms': ms['training'], 'inference_ms': ms['inference'], 'chosen': chosen}
        report.row(shape=shape._asdict(), batch_size=batch_size, dtype=dtype, **row)
        cells = _layer_cells(shape, ms, chosen)
        report.show(cells)
        sums.update({key: layer.RESNET18.get(shape, 1) * v for key, v in cells.items() if isinstance(v, float)})
    if found:
        ratios = {f'ratio{of}': sums[f'chosen{of}'] / sums[f'conv + BN{of}'] for of in ('', ', inference')}
        report.show({**dict.fromkeys(cells), 'shape': 'the net', **sums, **ratios})
    _say_failed(report, failed)


def _layers(shape, batch_size, dtype):
    layers, chosen = layer.build_layers(METHODS, shape, batch_size, dtype)
    for one in layers.values():
        jax.block_until_ready(one.inference())
    return layers, chosen


def _layer_cells(shape, ms, chosen):
    training, inference = ms['training'], ms['inference']
    return {
        'shape': '-'.join(map(str, shape)),
        'times': layer.RESNET18.get(shape, 1),
        'conv': training['conv'],
        'conv + BN': training['batchnorm'],
        **{method: training.get(method) for method in METHODS},
        'chosen': training[chosen],
        'by': chosen,
        'ratio': training[chosen] / training['batchnorm'],
        'conv + BN, inference': inference['batchnorm'],
        'chosen, inference': inference[chosen],
        'ratio, inference': inference[chosen] / inference['batchnorm'],
    }


def pgd(report, net, dtype, batch_size, steps, layers=('batchnorm', 'convnorm'), repeats=3):
    """An attack by PGD on a batch, and the clean prediction of it."""
    options = argparse.Namespace(net=net, dtype=dtype, batch_size=batch_size, steps=steps)
    build = lambda name: _called(attack.make_programs(options, name))
    found, failed = in_threads({name: functools.partial(build, name) for name in layers})
    programs = {(name, part): run for name, parts in found.items() for part, run in parts.items()}
    ms = timing.medians_ms(timing.interleaved(programs, repeats))
    for name in found:
        row = {'net': net, 'layer': name, 'batch_size': batch_size, 'dtype': dtype, 'steps': steps}
        for part in attack.PROGRAMS:
            row[f'{part}_ms'], row[f'{part}_images_per_second'] = ms[name, part], 1e3 * batch_size / ms[name, part]
            row[f'{part}_ratio'] = timing.ratio(ms[name, part], ms.get(('batchnorm', part)))
        report.row(**row)
        report.show(
            {f'{net}, PGD-{steps}': name, **{k: v for k, v in row.items() if k not in ('net', 'layer', 'steps')}}
        )
    _say_failed(report, failed)


def _called(programs):
    for run in programs.values():
        run()
    return programs


def gan(report, dtype, batch_size, layers=('spectralnorm', 'convnorm'), width=0, repeats=7):
    """Steps of a GAN with one update of the discriminator each, and that update alone."""
    config = os.path.join('configs', 'cifar10_gan_convnorm.py')
    options = argparse.Namespace(config=config, dtype=dtype, size=32, batch_size=batch_size, width=width)
    jobs = {(name, n): functools.partial(gan_step.Program, options, name, n) for name in layers for n in (1, 2)}
    found, failed = in_threads(jobs)
    seconds = {key: [] for key in found}
    for _ in range(repeats):
        for key, run in found.items():
            seconds[key].append(run())
    ms = timing.medians_ms(seconds)
    for name in layers:
        if {(name, 1), (name, 2)} <= set(ms):
            row = {'step_ms': ms[name, 1], 'discriminator_update_ms': ms[name, 2] - ms[name, 1]}
            report.row(gan='sngan', layer=name, batch_size=batch_size, dtype=dtype, **row)
            report.show({'GAN, discriminator of': name, 'dtype': dtype, 'batch': batch_size, **row})
    _say_failed(report, failed)


def _say_failed(report, failed):
    for name, reason in failed.items():
        report.row(failed=str(name), reason=reason)
        report.say(f'FAILED: {name}: {reason}')
