"""What classifiers and GANs build alike: data on the devices, mesh, durations, optimizer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data import pipeline, sources, splits
from convnorm_jax.data.streaming import StreamedImages
from convnorm_jax.layers import ocnn
from convnorm_jax.steps.state import make_optimizer
from convnorm_jax.training.schedule import make_schedule, to_steps


def common_fields(
    config: ConfigDict, devices: Sequence[jax.Device] | None, batch_examples: int, passes: int = 1
) -> dict[str, Any]:
    """The fields of an `Experiment` that classifiers and GANs have in common.

    Args:
      config: checked.
      devices: None for all.
      batch_examples: in the batch of a step.
      passes: over the data in an epoch of the loop.

    Raises:
      UserError: the data is not there, or numbers do not fit it.
    """
    sources.check_available(config.data.name, config.data.data_dir or None)
    mesh = mesh_lib.create_mesh(devices)
    mesh_lib.check_batch_size(config.data.batch_size, mesh)
    if config.train.microbatches > 1:
        part = config.data.batch_size // config.train.microbatches
        mesh_lib.check_batch_size(part, mesh, 'config.data.batch_size / config.train.microbatches')
    source = sources.load_source(
        config.data.name, config.data.data_dir or None, image_size=config.data.image_size, workers=config.data.workers
    )
    prepared = _prepare(config, source)
    a_pass = pipeline.steps_per_epoch(len(prepared.train.labels), batch_examples)
    in_steps = functools.partial(to_steps, steps_per_epoch=a_pass, batch_size=batch_examples)
    total_steps = in_steps(config.train)
    schedule = make_schedule(
        config.schedule.kind,
        config.optimizer.learning_rate,
        total_steps,
        milestones=config.schedule.milestones,
        factor=config.schedule.factor,
        warmup_steps=in_steps(config.schedule, prefix='warmup_'),
    )
    return {
        'config': config,
        'source': source,
        'prepared': prepared,
        'data': _to_device(prepared, mesh),
        'mesh': mesh,
        'schedule': schedule,
        'batch_examples': batch_examples,
        'passes': passes,
        'steps_per_epoch': a_pass * passes,
        'total_steps': total_steps,
    }


def build_optimizer(config: ConfigDict, schedule: optax.Schedule, updates: int = 1) -> optax.GradientTransformation:
    """The optimizer of a config; it is updated `updates` times a step, while the schedule counts steps."""
    section = config.optimizer
    return make_optimizer(
        section.name,
        schedule if updates == 1 else lambda count: schedule(count // updates),
        momentum=section.momentum,
        beta2=section.beta2,
        weight_decay=section.weight_decay,
    )


def build_ocnn_penalty(
    config: ConfigDict, model: Any, input_shape: Sequence[int], *inputs: Any, pattern: str | None = None
) -> Callable[[Any], jax.Array] | None:
    """OCNN's regularizer times its weight, params -> scalar; None if the weight is 0.

    Args:
      config: checked.
      model, input_shape, inputs: see `ocnn.convolution_geometry`.
      pattern: of the kernels if the config has none; None for the published one.

    Raises:
      UserError: config.train.ocnn.pattern matches no kernel of the net.
    """
    section = config.train.ocnn
    weight = section.weight
    if not weight:
        return None
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    init = lambda *arrays: model.init(jax.random.key(0), *arrays, train=False)
    params = jax.eval_shape(init, images, *inputs)['params']
    found = ocnn.convolution_geometry(model, input_shape, *inputs)
    strides = {path: strides for path, (strides, _) in found.items()}
    groups = {path: groups for path, (_, groups) in found.items()}
    pattern = section.pattern or pattern
    penalty = ocnn.make_ocnn_penalty(params, strides=strides, pattern=pattern, lags=section.lags, groups=groups)
    return lambda params: weight * penalty(params)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple


def _prepare(config, source):
    data = config.data
    return splits.prepare(
        source,
        validation_fraction=data.validation_fraction,
        validation=data.validation,
        subset_fraction=data.subset_fraction,
        noise_kind=data.label_noise.kind,
        noise_rate=data.label_noise.rate,
        seed=config.seed,
    )


def _to_device(prepared, mesh):
    parts = {name: getattr(prepared, name) for name in ('train', 'validation', 'test')}
    data = {name: {'images': part.images, 'labels': part.labels.astype(np.int32)} for name, part in parts.items()}
    # Streamed images are transferred batch by batch.
    return data if isinstance(prepared.train.images, StreamedImages) else mesh_lib.replicate(mesh, data)
