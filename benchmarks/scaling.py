"""Measures time, memory and communication of a training step as devices are added.

    python -m benchmarks.scaling [--devices=1,2,4,8] [--config=configs/cifar10_convnorm.py] [--size=32]
        [--batch_size=16] [--microbatches=1] [--repeats=5] [--output=FILE.json]

`batch_size` examples a device, random images of `size` x `size` x 3. Each number of devices runs in a process of its
own. On a CPU these are fake devices, which share the cores: the time is then that of their work together, not the
speed of a pod. Collectives are read from the compiled program: their number, and the bytes of their results on
one device in one step. Memory is the compiler's estimate for one device: arguments and temporaries.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}
_INSTRUCTION = re.compile(rf'= (.*?) ({"|".join(COLLECTIVES)})(?:-start)?\(')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')


def collectives(program):
    """{kind: (number, bytes of the results)} of a compiled program's text."""
    found = {}
    for shapes, kind in _INSTRUCTION.findall(program):
        size = 0
        for dtype, dimensions in _ARRAY.findall(shapes):
            count = 1
            for dimension in filter(None, dimensions.split(',')):
                count *= int(dimension)
            size += count * _BYTES.get(dtype, 0)
        number, total = found.get(kind, (0, 0))
        found[kind] = number + 1, total + size
    return found


def main():
    """Prints one table, and writes it to --output."""
    options = _options()
    if options.child:
        print(json.dumps(_measure(options)))
        return
    rows = [_in_a_process(options, int(number)) for number in options.devices.split(',')]
    _print(rows, options)
    if options.output:
        with open(options.output, 'w') as file:
            json.dump({'options': vars(options), 'rows': rows}, file, indent=2)


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--devices', default='1,2,4,8')
    parser.add_argument('--config', default=os.path.join('configs', 'cifar10_convnorm.py'))
    for name, value in (('size', 32), ('batch_size', 16), ('microbatches', 1), ('repeats', 5)):
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--output')
    parser.add_argument('--child', type=int, default=0, help=argparse.SUPPRESS)
    options, options.overrides = parser.parse_known_args()
    return options


def _in_a_process(options, number):
    command = [sys.executable, '-m', 'benchmarks.scaling', *sys.argv[1:], f'--child={number}']
    environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(number)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(options):
    """One row: the step on `options.child` devices."""
    from convnorm_jax import mesh as mesh_lib

    mesh_lib.reserve_host_threads()
    import jax
    import numpy as np

    from benchmarks import machine
    from convnorm_jax.cli.command_line import read_config
    from convnorm_jax.steps import classify
    from convnorm_jax.steps.state import create_state, make_optimizer
    from convnorm_jax.training.nets import build_model

    config = read_config([f'--config={options.config}', *options.overrides])
    mesh = mesh_lib.create_mesh(jax.devices()[: options.child])
    shape, batch_size = (options.size, options.size, 3), options.batch_size * mesh.size
    model = build_model(config, num_classes=10)
    tx = make_optimizer('sgd', 0.1, momentum=0.9, weight_decay=1e-4)
    step = classify.make_train_step(
        model,
        tx,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment_fn=lambda key, images: images,
        microbatches=options.microbatches,
    )
    state = jax.jit(lambda: create_state(model, tx, shape, 0), out_shardings=mesh_lib.replicated(mesh))()
    random = np.random.default_rng(0)
    batch = {'images': random.integers(0, 256, (batch_size, *shape), np.uint8)}
    batch['labels'] = random.integers(0, 10, batch_size).astype(np.int32)
    batch = mesh_lib.cut_batch(mesh, batch)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile(mesh_lib.compiler_options())
    compile_seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    seconds = []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return {
        'devices': mesh.size,
        'batch_size': batch_size,
        'step_ms': 1e3 * statistics.median(seconds[1:]),
        'compile_seconds': compile_seconds,
        'parameter_bytes': parameters,
        'argument_bytes': memory.argument_size_in_bytes,
        'temporary_bytes': memory.temp_size_in_bytes,
        'collectives': collectives(compiled.as_text()),
        'machine': machine.description(),
    }


def _print(rows, options):
    print(
        f'{options.config} {" ".join(options.overrides)}, {options.size}x{options.size}, {options.batch_size} a device'
    )
    print(f'parameters: {rows[0]["parameter_bytes"] / 1e6:.2f} MB; {rows[0]["machine"]}')
    print('| devices | batch | step ms | all-reduces | their MB | other collectives | arguments MB | temporary MB |')
    print('|---:|---:|---:|---:|---:|---|---:|---:|')
    for row in rows:
        found = dict(row['collectives'])
        number, size = found.pop('all-reduce', (0, 0))
        others = ', '.join(f'{n} {kind} ({b / 1e6:.2f} MB)' for kind, (n, b) in found.items()) or 'none'
        print(
            f'| {row["devices"]} | {row["batch_size"]} | {row["step_ms"]:.0f} | {number} | {size / 1e6:.2f} | {others} '
            f'| {row["argument_bytes"] / 1e6:.1f} | {row["temporary_bytes"] / 1e6:.1f} |'
        )


if __name__ == '__main__':
    main()
