"""Compiles the package's programs for an H100 or for TPU v5e chips on a machine that has neither.

A compiler of XLA needs a description of the device, not the device. The packages are those of pyproject's extra `aot`.
One process compiles for one of the two, because their libraries cannot be loaded together and a compiler that aborts
ends its process. `benchmarks.accelerator` starts one process for each program.
"""

import collections
import functools
import importlib.metadata
import os
import time

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks import hlo
from convnorm_jax import mesh as mesh_lib
from convnorm_jax.cli.command_line import read_config
from convnorm_jax.data.augment import augment, to_float
from convnorm_jax.evaluation.classifier import AttackSettings
from convnorm_jax.layers.factory import LAYER_OPTIONS
from convnorm_jax.models import create_model
from convnorm_jax.steps import classify, gan
from convnorm_jax.steps.state import create_state, make_optimizer
from convnorm_jax.training.nets import build_gan

# The package that compiles for each target.
PACKAGES = {'h100': ('jax-cuda13-plugin', 'jax-cuda13-pjrt'), 'v5e': ('libtpu',)}
TARGETS = tuple(PACKAGES)
# Slices of v5e: number of chips -> topology. One chip is a part of the smallest slice.
V5E = {1: '2x2', 4: '2x2', 16: '4x4', 64: '8x8', 256: '16x16'}
CLASSIFIER_PROGRAMS = ('step', 'attack', 'inference')
GAN_PROGRAMS = ('gan', 'discriminator')
PROGRAMS = (*CLASSIFIER_PROGRAMS, *GAN_PROGRAMS)
ATTACK = AttackSettings('pgd', 8 / 255, 2 / 255, steps=10, restarts=1, loss='cross_entropy')
PIXELS = {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2023, 0.1994, 0.2010)}
LARGEST = 20

# The properties of an H100 SXM that XLA asks for.
_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3" """

# A program. The batch size is that of one chip; width and method are None for the net's own.
Case = collections.namedtuple('Case', 'target chips net layer what dtype batch_size size width method')


def missing(target):
    """The package for a target that is not installed, or None."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return next((name for name in PACKAGES[target] if name not in installed), None)


def devices(target, chips=1):
    """Devices of `TARGETS` to compile for, and for nothing else. A process may ask for one target only."""
    jax.config.update('jax_platforms', 'cpu')  # otherwise JAX looks for devices, and CUDA's plugin for its libraries
    if target == 'h100':
        return topologies.get_topology_desc('h100', 'cuda', target_config=_H100, topology='1x1x1').devices
    # Without them libtpu waits for an answer of other TPU machines.
    os.environ.update(TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
    return topologies.get_topology_desc(platform='tpu', topology_name=f'v5e:{V5E[chips]}').devices[:chips]


def compile_case(case, text_file=None):
    """Compiles the program of a `Case` and counts what it does.

    Args:
      text_file: for the compiled program's text, or None.

    Returns:
      A dict of JSON data: 'kernels', 'bytes' (of one chip), 'temporary_bytes', 'argument_bytes', 'collectives',
      'unknown_loops', 'compile_seconds', 'largest' [[bytes, times, operation, name, type]]. On a TPU 'bytes' is its
      compiler's estimate, which counts a loop's body once. It is therefore multiplied by the ratio of our counts
      with and without the loops. 'main_memory_bytes' is our count without what stays on the chip.
    """
    mesh = mesh_lib.create_mesh(devices(case.target, case.chips))
    function, donated, arguments = _gan(case, mesh) if case.what in GAN_PROGRAMS else _classifier(case, mesh)
    start = time.perf_counter()
    # `mesh.compiler_options()` are for the CPU only.
    compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    seconds, text, memory = time.perf_counter() - start, compiled.as_text(), compiled.memory_analysis()
    if text_file:
        with open(text_file, 'w') as file:
            file.write(text)
    program = hlo.Program(text)
    found = {'bytes': program.bytes}
    if case.target == 'v5e':
        estimate = compiled.cost_analysis()['bytes accessed'] * program.bytes / program.bytes_once
        found = {'bytes': int(estimate), 'main_memory_bytes': hlo.Program(text, on_chip=False).bytes}
    return {
        'kernels': program.kernels,
        **found,
        'temporary_bytes': memory.temp_size_in_bytes,
        'argument_bytes': memory.argument_size_in_bytes,
        'collectives': program.collectives,
        'unknown_loops': program.unknown_loops,
        'compile_seconds': seconds,
        'largest': [list(m) for m in program.largest(LARGEST)],
    }


def _on(sharding, tree):
    """Abstract arrays like those of a tree, with a sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _batch(case, mesh, factor=1):
    """An abstract batch of the data, divided over the chips."""
    examples = case.batch_size * case.chips * factor
    pixels = jax.ShapeDtypeStruct((examples, case.size, case.size, 3), np.uint8)
    labels = jax.ShapeDtypeStruct((examples,), np.int32)
    return _on(mesh_lib.batch_sharded(mesh), {'images': pixels, 'labels': labels})


def _classifier(case, mesh):
    """(function, donated arguments, abstract arguments) of a classifier's program."""
    large = case.size > 64
    options = {'width': case.width, 'stem': 'imagenet' if large and case.net.startswith('resnet') else None}
    if case.method and 'method' in LAYER_OPTIONS.get(case.layer, ()):
        options['method'] = case.method
    model = create_model(case.net, num_classes=1000 if large else 10, layer=case.layer, dtype=case.dtype, **options)
    tx = make_optimizer('sgd', 0.1, momentum=0.9, weight_decay=1e-4)
    shape, batch = (case.size, case.size, 3), _batch(case, mesh)
    state = jax.eval_shape(functools.partial(create_state, model, tx, shape, seed=0))
    state = _on(mesh_lib.replicated(mesh), state)
    if case.what == 'step':
        crop_flip = functools.partial(augment, kind='crop_flip', padding=4)
        return _training(classify.make_train_step(model, tx, augment_fn=crop_flip, **PIXELS), mesh), 0, (state, batch)
    logits_fn = classify.make_logits_fn(model, **PIXELS)

    def inference(variables, batch):
        return logits_fn(variables, to_float(mesh_lib.shard_batch(mesh, batch['images'])))

    def attack(variables, batch, key):
        batch, net = mesh_lib.shard_batch(mesh, batch), functools.partial(logits_fn, variables)
        attacked = ATTACK.run(net, to_float(batch['images']), batch['labels'], key)
        return (net(attacked).argmax(-1) == batch['labels']).sum()

    if case.what == 'inference':
        return inference, (), (state.eval_variables, batch)
    key = _on(mesh_lib.replicated(mesh), jax.eval_shape(jax.random.key, 0))
    return attack, (), (state.eval_variables, batch, key)


def _training(step, mesh):
    """A step with the arguments and donation of the training loop."""

    def train_step(state, batch):
        batch = mesh_lib.shard_batch(mesh, batch)
        with mesh_lib.in_use(mesh):
            return step(state, batch)

    return train_step


def _gan(case, mesh):
    """`_classifier` for a GAN by configs/cifar10_gan_convnorm.py, with one update of the discriminator a step."""
    widths = [f'--config.{key}={case.width}' for key in ('model.width', 'gan.generator_width') if case.width]
    names = {'model.name': case.net, 'model.layer': case.layer, 'model.dtype': case.dtype}
    names.update({'model.convnorm.method': case.method} if case.method else {})
    path = os.path.join(os.path.dirname(__file__), os.pardir, 'configs', 'cifar10_gan_convnorm.py')
    config = read_config([f'--config={path}', *(f'--config.{k}={v}' for k, v in names.items()), *widths])
    shape, section, latent = (case.size, case.size, 3), config.optimizer, config.gan.latent
    nets = build_gan(config, shape, num_classes=10)
    tx = [make_optimizer(section.name, section.learning_rate, momentum=section.momentum, beta2=section.beta2)] * 2
    shard_fn = functools.partial(mesh_lib.shard_batch, mesh)
    decay = config.train.ema_decay
    step = gan.make_gan_step(
        *nets, *tx, loss=config.gan.loss, n_dis=1, latent=latent, ema_decay=decay, shard_fn=shard_fn
    )
    state = jax.eval_shape(
        lambda: gan.create_gan_state(*nets, *tx, input_shape=shape, latent=latent, seed=0, use_ema=True)
    )
    step, state, batch = _training(step, mesh), _on(mesh_lib.replicated(mesh), state), _batch(case, mesh)
    if case.what == 'gan':
        return step, 0, (state, batch)

    def discriminator_update(discriminator, state, batch):
        # The generator's update is not returned, so XLA removes it.
        state, metrics = step(state.replace(discriminator=discriminator), batch)
        return state.discriminator, metrics['discriminator_loss']

    return discriminator_update, 0, (state.discriminator, state.replace(discriminator=None), batch)
