"""From a config to all that a run needs: data on the device, net, optimizer, mesh."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data import pipeline, sources, splits
from convnorm_jax.data.augment import augment
from convnorm_jax.evaluation.classifier import AttackSettings, Evaluator
from convnorm_jax.steps import classify
from convnorm_jax.steps.state import create_state, make_optimizer
from convnorm_jax.training.config import build_model
from convnorm_jax.training.schedule import make_schedule, to_steps


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run, ready to start.

    Attributes:
      config: as given.
      source, prepared: the data set, and its splits with what label noise changed.
      data: {'train' | 'validation' | 'test': {'images', 'labels'}} on every device.
      mesh, model, schedule, tx: devices, net, learning rate, optimizer.
      train_step: (state, batch) -> (state, metrics).
      evaluator: of the same net.
      steps_per_epoch, total_steps: int.
    """

    config: Any
    source: sources.Source
    prepared: splits.Prepared
    data: dict
    mesh: Any
    model: Any
    schedule: Any
    tx: Any
    train_step: Any
    evaluator: Evaluator
    steps_per_epoch: int
    total_steps: int

    @property
    def input_shape(self):
        """[H, W, C] of a picture."""
        return self.source.train.images.shape[1:]

    def initial_state(self):
        """The state before the first step, on every device."""
        return jax.jit(self._create, out_shardings=mesh_lib.replicated(self.mesh))()

    def abstract_state(self):
        """Shapes, dtypes and shardings of the state, without computing it.

        Raises:
          ValueError: the net can not take pictures of this size.
        """
        sharding = mesh_lib.replicated(self.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(self._create)
        )

    def _create(self):
        return create_state(
            self.model, self.tx, self.input_shape, self.config.seed, use_ema=self.config.train.ema_decay > 0
        )


def build(config, devices=None):
    """An `Experiment` from a checked config.

    Raises:
      ValueError: data that is not there, or numbers that do not fit it.
    """
    sources.check_available(config.data.name, config.data.data_dir or None)
    mesh = mesh_lib.create_mesh(devices)
    mesh_lib.check_batch_size(config.data.batch_size, mesh)
    source = sources.load_source(config.data.name, config.data.data_dir or None)
    prepared = _prepare(config, source)
    model = build_model(config, source.num_classes)
    batch_size, examples = config.data.batch_size, len(prepared.train.labels)
    steps_per_epoch = pipeline.steps_per_epoch(examples, batch_size)
    total_steps = to_steps(config.train, steps_per_epoch=steps_per_epoch, batch_size=batch_size)
    schedule = make_schedule(
        config.schedule.kind,
        config.optimizer.learning_rate,
        total_steps,
        milestones=config.schedule.milestones,
        factor=config.schedule.factor,
        warmup_steps=to_steps(
            config.schedule, steps_per_epoch=steps_per_epoch, batch_size=batch_size, prefix='warmup_'
        ),
    )
    tx = make_optimizer(
        config.optimizer.name, schedule, momentum=config.optimizer.momentum, weight_decay=config.optimizer.weight_decay
    )
    logits_fn = classify.make_logits_fn(model, source.mean, source.std)
    return Experiment(
        config=config,
        source=source,
        prepared=prepared,
        data=_to_device(prepared, mesh),
        mesh=mesh,
        model=model,
        schedule=schedule,
        tx=tx,
        train_step=_train_step(config, model, tx, source),
        evaluator=Evaluator(logits_fn, mesh, _round_up(config.eval.batch_size, mesh.size)),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def attack_settings(config):
    """{name: AttackSettings} of a config, whose epsilon and step_size are in 1/255."""
    section = config.attack
    return {
        name: AttackSettings(
            name, section.epsilon / 255, section.step_size / 255, section.pgd_steps, section.restarts, section.loss
        )
        for name in section.names
    }


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


def _train_step(config, model, tx, source):
    augment_fn = functools.partial(augment, kind=config.data.augmentation, padding=config.data.crop_padding)
    return classify.make_train_step(
        model,
        tx,
        mean=source.mean,
        std=source.std,
        augment_fn=augment_fn,
        label_smoothing=config.train.label_smoothing,
        ema_decay=config.train.ema_decay,
    )


def _to_device(prepared, mesh):
    parts = {name: getattr(prepared, name) for name in ('train', 'validation', 'test')}
    return mesh_lib.replicate(
        mesh, {name: {'images': part.images, 'labels': part.labels.astype(np.int32)} for name, part in parts.items()}
    )


def _round_up(number, multiple):
    return -(-number // multiple) * multiple
