"""From a config to all that a run needs: data on the device, net, optimizer, mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data import pipeline, sources, splits
from convnorm_jax.data.augment import augment
from convnorm_jax.evaluation.classifier import AttackSettings, Evaluator
from convnorm_jax.layers import ocnn
from convnorm_jax.steps import adversarial, classify
from convnorm_jax.steps.state import create_state, make_optimizer
from convnorm_jax.training.config import build_model
from convnorm_jax.training.schedule import make_schedule, to_steps

# Of the training attacks, in 1/255, where the config gives none: the published ones.
DEFAULT_STEP_SIZES = {'free': 8.0, 'fast': 10.0, 'pgd': 2.0, 'trades': 2.0}


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
        train = self.config.train
        carries = train.algorithm == 'free' and train.adversarial.carry_over
        return create_state(
            self.model,
            self.tx,
            self.input_shape,
            self.config.seed,
            use_ema=train.ema_decay > 0,
            carried_batch=self.config.data.batch_size if carries else 0,
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
    updates = _updates_per_batch(config)  # the optimizer counts these; the schedule, batches
    tx = make_optimizer(
        config.optimizer.name,
        schedule if updates == 1 else lambda count: schedule(count // updates),
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
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
        train_step=_train_step(config, model, tx, source, _penalty(config, model, source)),
        evaluator=Evaluator(logits_fn, mesh, _round_up(config.eval.batch_size, mesh.size)),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def attack_settings(config):
    """{name: AttackSettings} of a config's attacks."""
    return {name: make_attack(config, name) for name in config.attack.names}


def make_attack(config, name):
    """AttackSettings of a config, whose epsilon and step_size are in 1/255."""
    section = config.attack
    return AttackSettings(
        name,
        section.epsilon / 255,
        section.step_size / 255,
        section.pgd_steps,
        section.restarts,
        section.loss,
        section.norm,
    )


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


def _penalty(config, model, source):
    """The regularizer, params -> scalar, or None.

    Raises:
      ValueError: config.train.ocnn.pattern matches no kernel of the net.
    """
    weight, section = config.train.ocnn.weight, config.train.ocnn
    if not weight:
        return None
    shape = source.train.images.shape[1:]
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)['params']
    strides = ocnn.convolution_strides(model, shape)
    penalty = ocnn.make_ocnn_penalty(params, strides=strides, pattern=section.pattern or None, lags=section.lags)
    return lambda params: weight * penalty(params)


def _train_step(config, model, tx, source, penalty_fn):
    """The step of the config's algorithm; its numbers in units of pixels in [0, 1]."""
    options = {
        'mean': source.mean,
        'std': source.std,
        'augment_fn': functools.partial(augment, kind=config.data.augmentation, padding=config.data.crop_padding),
        'label_smoothing': config.train.label_smoothing,
        'ema_decay': config.train.ema_decay,
        'penalty_fn': penalty_fn,
    }
    algorithm, section = config.train.algorithm, config.train.adversarial
    if algorithm == 'clean':
        return classify.make_train_step(model, tx, **options)
    step_size = DEFAULT_STEP_SIZES[algorithm] if section.step_size is None else section.step_size
    options.update(epsilon=section.epsilon / 255, step_size=step_size / 255)
    if algorithm == 'free':
        return adversarial.make_free_step(model, tx, replays=section.replays, carry_over=section.carry_over, **options)
    options.update({'batch_statistics': section.batch_statistics} if section.batch_statistics else {})
    if algorithm == 'fast':
        return adversarial.make_fast_step(model, tx, **options)
    if algorithm == 'pgd':
        return adversarial.make_pgd_step(model, tx, steps=section.steps, **options)
    return adversarial.make_trades_step(model, tx, steps=section.steps, beta=section.beta, **options)


def _updates_per_batch(config):
    return config.train.adversarial.replays if config.train.algorithm == 'free' else 1


def _to_device(prepared, mesh):
    parts = {name: getattr(prepared, name) for name in ('train', 'validation', 'test')}
    return mesh_lib.replicate(
        mesh, {name: {'images': part.images, 'labels': part.labels.astype(np.int32)} for name, part in parts.items()}
    )


def _round_up(number, multiple):
    return -(-number // multiple) * multiple
