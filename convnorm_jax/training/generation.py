"""Training a GAN: its nets, step, optimizers and scores during training, from a config."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from convnorm_jax.evaluation.sampler import Sampler
from convnorm_jax.files import write_atomically, written
from convnorm_jax.mesh import is_leader, shard_batch
from convnorm_jax.steps import gan
from convnorm_jax.training.build import build_ocnn_penalty, build_optimizer, common_fields, round_up
from convnorm_jax.training.experiment import Experiment
from convnorm_jax.training.nets import build_gan, resolve_setting

# The grid of images that is saved with every row of metrics.csv: a class for each column.
GRID_COLUMNS, GRID_ROWS = 10, 5

# Seeds of the latents of the grid and of the scores, different from those of the training.
GRID_SEED, SCORE_SEED = 1_000_003, 2_000_003


@dataclasses.dataclass(frozen=True)
class Generation(Experiment):
    """Training a GAN.

    Attributes:
      generator, discriminator, generator_tx, discriminator_tx: nets and optimizers.
      sampler: draws images of the generator.
      scorer: uint8 images -> {column: score}, with 'fid_classifier'; None for no scores.
    """

    generator: nn.Module
    discriminator: nn.Module
    generator_tx: optax.GradientTransformation
    discriminator_tx: optax.GradientTransformation
    sampler: Sampler
    scorer: Callable[..., dict[str, float]] | None

    metric_names = gan.METRICS
    columns = (
        'epoch',
        'step',
        'learning_rate',
        *gan.METRICS,
        'examples_per_second',
        'fid_classifier',
        'kid_classifier',
        'kid_classifier_std',
        'classifier_score',
        'classifier_score_std',
    )

    def create_state(self) -> Any:
        """The state before the first step; jittable."""
        return gan.create_gan_state(
            self.generator,
            self.discriminator,
            self.generator_tx,
            self.discriminator_tx,
            input_shape=self.input_shape,
            latent=self.config.gan.latent,
            seed=self.config.seed,
            use_ema=self.config.train.ema_decay > 0,
        )

    def scored(self, scorer: Callable[..., dict[str, float]]) -> 'Generation':
        """The same run with a scorer."""
        return dataclasses.replace(self, scorer=scorer)

    def training_row(self, values: dict[str, float]) -> dict[str, float]:
        """See `Experiment`."""
        return values

    def validate(self, state: Any, step: int, workdir: str) -> dict[str, float]:
        """Saves the images of a fixed grid to `samples/<step>.npz`, and scores others."""
        variables, seed = state.eval_variables, self.config.seed
        z, labels = self.sampler.grid(GRID_SEED + seed, GRID_COLUMNS, GRID_ROWS)
        images = self.sampler.images(variables, z, labels)
        if is_leader():
            folder = os.path.join(workdir, 'samples')
            with written(folder):
                os.makedirs(folder, exist_ok=True)
            save = functools.partial(np.savez_compressed, images=images, step=step)
            write_atomically(os.path.join(folder, f'{step:08d}.npz'), save)
        if self.scorer is None or not self.config.gan.score_examples:
            return {}
        return self.scorer(self.sampler.draw(variables, self.config.gan.score_examples, SCORE_SEED + seed)[0])

    def rating(self, found: dict[str, float]) -> float | None:
        """Minus the Frechet distance."""
        return -found['fid_classifier'] if 'fid_classifier' in found else None

    def describe(self, values: dict[str, float]) -> str:
        """See `Experiment`."""
        return (
            f'discriminator {values["discriminator_loss"]:.4f}  generator {values["generator_loss"]:.4f}  '
            f'logits {values["real_logit"]:+.2f} real {values["fake_logit"]:+.2f} fake'
        )

    def describe_validation(self, found: dict[str, float]) -> str:
        """See `Experiment`."""
        return '  '.join(f'{name} {value:.4f}' for name, value in found.items() if not name.endswith('_std'))


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Generation:
    """A `Generation` from a checked config, without a scorer.

    Raises:
      UserError: the data is not there, or numbers and nets do not fit it.
    """
    resolved = resolve_setting(config)
    section = resolved.gan
    common = common_fields(resolved, devices, section.n_dis * resolved.data.batch_size, section.passes)
    source, mesh = common['source'], common['mesh']
    input_shape = source.train.images.shape[1:]
    generator, discriminator = build_gan(resolved, input_shape, source.num_classes)
    num_classes = source.num_classes if section.conditional else 0
    generator_tx = build_optimizer(resolved, common['schedule'])
    discriminator_tx = build_optimizer(resolved, common['schedule'], section.n_dis)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    step = gan.make_gan_step(
        generator,
        discriminator,
        generator_tx,
        discriminator_tx,
        loss=section.loss,
        n_dis=section.n_dis,
        latent=section.latent,
        num_classes=num_classes,
        gradient_penalty=section.gradient_penalty,
        policy=tuple(section.augmentation),
        ema_decay=resolved.train.ema_decay,
        penalty_fn=build_ocnn_penalty(resolved, discriminator, input_shape, labels, pattern='.*'),
        shard_fn=functools.partial(shard_batch, mesh),
    )
    sampler = Sampler(
        gan.make_sampler(generator), mesh, round_up(config.eval.batch_size, mesh.size), section.latent, num_classes
    )
    return Generation(
        # The config as given, not as resolved: a resumed run compares it with that of the next command.
        **{**common, 'config': config},
        train_step=step,
        generator=generator,
        discriminator=discriminator,
        generator_tx=generator_tx,
        discriminator_tx=discriminator_tx,
        sampler=sampler,
        scorer=None,
    )
