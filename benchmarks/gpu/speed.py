"""Stages of the GPU plan that time something: training steps, inference, layers, an attack, a GAN's step.

A stage compiles all its programs at once, in threads, and only then measures, one program after the other in turn: XLA
compiles a program on one core, and a lent machine has many. The seconds to compile are therefore those of a busy machine.
"""

import argparse
import concurrent.futures
import contextlib
import functools
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


class _Programs:
    """The step of a net, and the net at inference."""

    def __init__(self, case, options, precision):
        self._precision = precision
        with self._with_precision():
            self.step = Step(case, **options)
            self.variables, logits_fn = self.step.eval_variables(), make_logits_fn(self.step.model, MEAN, STD)
            pixels = np.random.default_rng(1).random((case.batch_size, *PICTURE), np.float32)
            self.pixels = jax.device_put(pixels)
            self.lowered = jax.jit(logits_fn).lower(self.variables, self.pixels)
        self.text = self.step.lowered.as_text(), self.lowered.as_text()

    def _with_precision(self):
        return jax.default_matmul_precision(self._precision) if self._precision else contextlib.nullcontext()

    def compile_training(self):
        """Compiles the step."""
        return self.step.compile()

    def compile_inference(self):
        """The compiled inference, a function of nothing."""
        return functools.partial(self.lowered.compile(mesh.compiler_options()), self.variables, self.pixels)


def steps(report, net, dtype, batch_size, algorithm='clean', precision=None, layers=None, repeats=9):
    """Training steps and inference of a net with each layer and each method, in turn.

    Args:
      precision: of the products (`jax_default_matmul_precision`), None for JAX's default.
      layers: [[name, options], ...]; None for convolution with BatchNorm, ConvNorm by each method, and spectral norm.
    """
    layers = layers or [
        ['batchnorm', {}],
        ['convnorm', {}],
        *(['convnorm', {'method': method}] for method in METHODS),
        ['spectralnorm', {}],
    ]
    build = lambda name, options: _Programs(Case(net, name, batch_size, dtype, algorithm), options, precision)
    found, failed = in_threads({_title(*one): functools.partial(build, *one) for one in layers})
    found, same = _without_copies(found)
    jobs = {(name, 'training'): programs.compile_training for name, programs in found.items()}
    jobs.update({(name, 'inference'): programs.compile_inference for name, programs in found.items()})
    compiled, not_compiled = in_threads(jobs)
    failed.update({' '.join(name): reason for name, reason in not_compiled.items()})
    seconds = {}
    for part in ('training', 'inference'):
        programs = {name: program for (name, what), program in compiled.items() if what == part}
        seconds[part] = timing.medians_ms(timing.interleaved(programs, repeats))
    for name in found:
        row = {'net': net, 'layer': name, 'batch_size': batch_size, 'dtype': dtype, 'algorithm': algorithm}
        row.update(precision=precision, same_program_as=same[name], **_figures(name, batch_size, seconds))
        if name in seconds['training']:
            step = found[name].step
            row['finite'] = bool(np.isfinite(np.divide(*step()['loss'])))
            row['memory_mb'], row['compile_seconds'] = step.memory_bytes / 1e6, step.compile_seconds
        report.row(**row)
        report.show(_cells(row))
    _say_failed(report, failed)
    report.row(peak_bytes=(jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'), of='the process so far')


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


def _say_failed(report, failed):
    for name, reason in failed.items():
        report.row(failed=str(name), reason=reason)
        report.say(f'FAILED: {name}: {reason}')
