"""Times steps of a GAN with several discriminator layers, in turn.

    python -m benchmarks.gan_step [--layers=convnorm,spectralnorm,batchnorm,none]
        [--config=configs/cifar10_gan_convnorm.py] [--dtype=float32] [--size=32] [--batch_size=16] [--width=0]
        [--n_dis=1] [--repeats=5] [--output=FILE.json]

Random images of `size` x `size` x 3; nets and optimizers of the config, with `width` in place of both
widths (0: the config's). A step is n_dis updates of the discriminator and one of the generator, as in the
training loop. The time of a discriminator update alone is the difference between n_dis + 1 and
n_dis updates. Figures are medians over the repeats, with the layers in turn within each; the seconds to compile are
those of the first call.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np

from benchmarks import machine
from convnorm_jax import mesh
from convnorm_jax.cli.command_line import read_config
from convnorm_jax.files import write_json
from convnorm_jax.steps import gan
from convnorm_jax.steps.state import make_optimizer
from convnorm_jax.training.nets import build_gan


def main():
    """Prints one table, and writes it to --output."""
    options = _options()
    layers = options.layers.split(',')
    programs = {(layer, n): Program(options, layer, n) for layer in layers for n in (options.n_dis, options.n_dis + 1)}
    seconds = {key: [] for key in programs}
    for _ in range(options.repeats):
        for key, run in programs.items():
            seconds[key].append(run())
    rows = []
    for layer in layers:
        step, longer = (statistics.median(seconds[layer, n]) for n in (options.n_dis, options.n_dis + 1))
        rows.append(
            {
                'layer': layer,
                'compile_seconds': programs[layer, options.n_dis].compile_seconds,
                'step_ms': 1e3 * step,
                'steps_per_second': 1 / step,
                'discriminator_update_ms': 1e3 * (longer - step),
            }
        )
    _print(rows, options)
    if options.output:
        write_json(options.output, {'machine': machine.description(), 'options': vars(options), 'rows': rows})


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--layers', default='convnorm,spectralnorm,batchnorm,none')
    parser.add_argument('--config', default=os.path.join('configs', 'cifar10_gan_convnorm.py'))
    parser.add_argument('--dtype', default='float32')
    for name, value in (('size', 32), ('batch_size', 16), ('width', 0), ('n_dis', 1), ('repeats', 5)):
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--output')
    return parser.parse_args()


class Program:
    """A compiled step and its state; a call takes one step and returns its seconds."""

    def __init__(self, options, layer, n_dis):
        widths = [f'--config.{key}={options.width}' for key in ('model.width', 'gan.generator_width') if options.width]
        given = [f'--config.model.layer={layer}', f'--config.model.dtype={options.dtype}', *widths]
        config = read_config([f'--config={options.config}', *given])
        shape, section = (options.size, options.size, 3), config.optimizer
        nets = build_gan(config, shape, num_classes=10)
        tx = [make_optimizer(section.name, section.learning_rate, momentum=section.momentum, beta2=section.beta2)] * 2
        latent = config.gan.latent
        step = gan.make_gan_step(
            *nets, *tx, loss=config.gan.loss, n_dis=n_dis, latent=latent, ema_decay=config.train.ema_decay
        )
        self._state = jax.jit(
            lambda: gan.create_gan_state(*nets, *tx, input_shape=shape, latent=latent, seed=0, use_ema=True)
        )()
        images = np.random.default_rng(0).integers(0, 256, (n_dis * options.batch_size, *shape))
        labels = np.zeros(len(images), np.int32)
        self._batch = jax.device_put({'images': images.astype(np.uint8), 'labels': labels})
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self._state, self._batch)
        self._step = lowered.compile(mesh.compiler_options())
        self.compile_seconds = time.perf_counter() - start
        self()

    def __call__(self):
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start


def _print(rows, options):
    sizes = f'{options.size}x{options.size}, batch {options.batch_size}, {options.dtype}, n_dis {options.n_dis}'
    print(f'{sizes}; {machine.description()}')
    first = rows[0]
    print('| layer | step ms | steps/s | discriminator update ms | ratio of the updates | compile s |')
    print('|---|---:|---:|---:|---:|---:|')
    for row in rows:
        ratio = row['discriminator_update_ms'] / first['discriminator_update_ms']
        print(
            f'| {row["layer"]} | {row["step_ms"]:.1f} | {row["steps_per_second"]:.2f} '
            f'| {row["discriminator_update_ms"]:.1f} | {ratio:.2f} | {row["compile_seconds"]:.1f} |'
        )


if __name__ == '__main__':
    main()
