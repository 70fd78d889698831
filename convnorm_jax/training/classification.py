"""Training a classifier: its net, step, optimizer and evaluation, from a config."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.data.augment import augment
from convnorm_jax.evaluation.classifier import AttackSettings, Evaluator
from convnorm_jax.runs.progress import Progress
from convnorm_jax.steps import adversarial, classify
from convnorm_jax.steps.state import create_state
from convnorm_jax.training.build import build_ocnn_penalty, build_optimizer, common_fields, round_up
from convnorm_jax.training.evaluation_checks import check_data
from convnorm_jax.training.experiment import Experiment
from convnorm_jax.training.nets import build_model

# Step sizes of the training attacks, in 1/255, if the config has none: the published ones.
DEFAULT_STEP_SIZES = {'free': 8.0, 'fast': 10.0, 'pgd': 2.0, 'trades': 2.0}

# Training batches that estimate the statistics of averaged parameters which have none: BatchNorm's initial values then
# have a weight below 1e-4.
STATISTICS_BATCHES = 100

# Of metrics.csv.
COLUMNS = (
    'epoch',
    'step',
    'learning_rate',
    'train_loss',
    'train_accuracy',
    'gradient_norm',
    'validation_loss',
    'validation_accuracy',
    'examples_per_second',
)
# Adversarial training's accuracy on validation examples under PGD of so many steps, and its column.
PROBE, PROBE_STEPS = 'validation_pgd_accuracy', 10
# Catastrophic overfitting: that accuracy is below a share of the best epoch's, or of the training's under its own
# attack, which was above chance by a factor.
COLLAPSE, MASKED, ABOVE_CHANCE = 0.5, 0.3, 1.5
# Algorithms whose training accuracy is that of attacked images, by an attack of few steps.
ATTACKED_ACCURACY = ('free', 'fast')


@dataclasses.dataclass(frozen=True)
class Classification(Experiment):
    """Training a classifier.

    Attributes:
      model, tx: net and optimizer.
      evaluator: of the same net.
    """

    model: nn.Module
    tx: optax.GradientTransformation
    evaluator: Evaluator

    metric_names = ('loss', 'accuracy', 'gradient_norm')

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Experiment`."""
        return (*COLUMNS, PROBE) if self.probed else COLUMNS

    def create_state(self) -> Any:
        """The state before the first step; jittable."""
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

    def abstract_states(self) -> Sequence[Any]:
        """See `Experiment`: in an earlier version averaged parameters had no statistics of their own."""
        state = self.abstract_state()
        return [state] if state.ema is None else [state, state.replace(ema_state=None)]

    def completed(self, state: Any) -> Any:
        """See `Experiment`: missing statistics of averaged parameters are estimated from training batches."""
        if state.ema is None or state.ema_state is not None:
            return state
        step = classify.make_statistics_step(
            self.model, mean=self.source.mean, std=self.source.std, augment_fn=_augment_fn(self.config)
        )
        feed, rng = self.feed(), jax.random.fold_in(jax.random.PRNGKey(self.config.seed), STATISTICS_BATCHES)

        def estimate(params, model_state, number, *arrays):
            images = mesh_lib.shard_batch(self.mesh, feed.take(*arrays))['images']
            with mesh_lib.in_use(self.mesh):
                return step(params, model_state, jax.random.fold_in(rng, number), images)

        estimate = jax.jit(estimate, out_shardings=mesh_lib.replicated(self.mesh))
        statistics = state.model_state
        with contextlib.closing(feed.batches(0)) as batches:
            for number, arrays in zip(range(STATISTICS_BATCHES), batches):
                statistics = estimate(state.ema, statistics, number, *arrays)
        return state.replace(ema_state=statistics)

    def training_row(self, values: dict[str, float]) -> dict[str, float]:
        """See `Experiment`."""
        return {
            'train_loss': values['loss'],
            'train_accuracy': values['accuracy'],
            'gradient_norm': values['gradient_norm'],
        }

    def validate(self, state: Any, step: int, workdir: str) -> dict[str, float]:
        """Loss and accuracy on the validation set, and that under PGD of adversarial training; {} without one."""
        clean = self.evaluator.evaluate(state.eval_variables, self.data['validation'])
        found = {f'validation_{name}': value for name, value in clean.items()}
        if self.probed:
            attack, seed = probe_attack(self.config), self.config.seed
            robust = self.evaluator.robust_accuracy(state.eval_variables, self.probed, attack, seed=seed)
            found[PROBE] = robust['accuracy']
        return found

    def rating(self, found: dict[str, float]) -> float | None:
        """The validation accuracy; of adversarial training that under PGD."""
        return found.get(PROBE, found.get('validation_accuracy'))

    def warning(self, row: dict[str, float], progress: Progress) -> str:
        """Of catastrophic overfitting: the attack of the training no longer finds what PGD finds."""
        if PROBE not in row:
            return ''
        found, best, classes = row[PROBE], progress.best_rating, self.source.num_classes
        if best is not None and collapsed(found, best, classes):
            words = f'fell from {100 * best:.1f} % (step {progress.best_step}) to {100 * found:.1f} %'
            kept = (
                f'The checkpoint of step {progress.best_step} is kept, and evaluated with --config.eval.checkpoint=best'
            )
        elif self.config.train.algorithm in ATTACKED_ACCURACY and masked(found, row['train_accuracy'], classes):
            words = f'is {100 * found:.1f} %, under the attack of the training {100 * row["train_accuracy"]:.1f} %'
            kept = 'The net is not robust'
        else:
            return ''
        return (
            f'validation accuracy under PGD-{PROBE_STEPS} {words}: catastrophic overfitting. {kept}; a smaller '
            'config.train.adversarial.step_size or optimizer.learning_rate, or train.algorithm=pgd, prevents it'
        )

    def describe(self, values: dict[str, float]) -> str:
        """See `Experiment`."""
        return f'loss {values["loss"]:.4f}  accuracy {values["accuracy"]:.4f}'

    def describe_validation(self, found: dict[str, float]) -> str:
        """See `Experiment`."""
        if not found:
            return ''
        robust = f'  PGD-{PROBE_STEPS} {found[PROBE]:.4f}' if PROBE in found else ''
        return f'validation loss {found["validation_loss"]:.4f}  accuracy {found["validation_accuracy"]:.4f}{robust}'


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Classification:
    """A `Classification` from a checked config.

    Raises:
      UserError: the data is not there, or numbers do not fit it.
    """
    common = common_fields(config, devices, config.data.batch_size)
    source, mesh = common['source'], common['mesh']
    check_data(config, source.num_classes, source.train.images.shape[1:])
    model = build_model(config, source.num_classes)
    tx = build_optimizer(config, common['schedule'], _updates_per_batch(config))
    logits_fn = classify.make_logits_fn(model, source.mean, source.std)
    penalty_fn = build_ocnn_penalty(config, model, source.train.images.shape[1:])
    return Classification(
        **common,
        model=model,
        tx=tx,
        train_step=_train_step(config, model, tx, source, penalty_fn),
        evaluator=Evaluator(logits_fn, mesh, round_up(config.eval.batch_size, mesh.size)),
    )


def probe_attack(config: ConfigDict) -> AttackSettings:
    """The PGD that validates adversarial training: of its radius, with steps of a quarter of it."""
    epsilon = config.train.adversarial.epsilon / 255
    return AttackSettings('pgd', epsilon, epsilon / 4, PROBE_STEPS, restarts=1, loss='cross_entropy')


def collapsed(accuracy: float, best: float, num_classes: int) -> bool:
    """Whether an accuracy under PGD is lost, against that of the best epoch."""
    return accuracy < COLLAPSE * best and best > ABOVE_CHANCE / num_classes


def masked(accuracy: float, trained: float, num_classes: int) -> bool:
    """Whether an accuracy under PGD is far below that of the training under its own attack."""
    return accuracy < MASKED * trained and trained > ABOVE_CHANCE / num_classes


def attack_settings(config: ConfigDict) -> dict[str, AttackSettings]:
    """{name: AttackSettings} of a config's attacks."""
    return {name: make_attack(config, name) for name in config.attack.names}


def make_attack(config: ConfigDict, name: str) -> AttackSettings:
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


def _train_step(config, model, tx, source, penalty_fn):
    """The step of the config's algorithm; its numbers in units of pixels in [0, 1]."""
    options = {
        'mean': source.mean,
        'std': source.std,
        'augment_fn': _augment_fn(config),
        'label_smoothing': config.train.label_smoothing,
        'ema_decay': config.train.ema_decay,
        'penalty_fn': penalty_fn,
    }
    algorithm, section = config.train.algorithm, config.train.adversarial
    if algorithm == 'clean':
        return classify.make_train_step(model, tx, microbatches=config.train.microbatches, **options)
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


def _augment_fn(config):
    return functools.partial(augment, kind=config.data.augmentation, padding=config.data.crop_padding)


def _updates_per_batch(config):
    return config.train.adversarial.replays if config.train.algorithm == 'free' else 1
