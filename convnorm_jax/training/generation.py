"""Training a GAN: its nets, step, optimizers, and what is measured on the way, from a config."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.evaluation.sampler import Sampler
from convnorm_jax.files import write_atomically, written
from convnorm_jax.mesh import is_leader, shard_batch
from convnorm_jax.steps import gan
from convnorm_jax.training.build import build_frame, build_ocnn_penalty, build_optimizer, round_up
from convnorm_jax.training.experiment import Experiment
from convnorm_jax.training.nets import build_gan, resolve_setting

# The pictures that are kept of every row of metrics.csv: a class a column.
GRID_COLUMNS, GRID_ROWS = 10, 5

# Of the latents of the grid and of the scores, apart from those of the training.
GRID_SEED, SCORE_SEED = 1_000_003, 2_000_003


@dataclasses.dataclass(frozen=True)
class Generation(Experiment):
    """Training a GAN.

    Attributes:
      generator, discriminator, generator_tx, discriminator_tx: nets and optimizers.
      sampler: pictures of the generator.
      scorer: uint8 pictures -> {column: score}, 'fid_classifier' among them; None for no scores.
    """

    generator: Any
    discriminator: Any
    generator_tx: Any
    discriminator_tx: Any
    sampler: Sampler
    scorer: Any

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

    def create_state(self):
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

    def scored(self, scorer):
        """The same with a scorer."""
        return dataclasses.replace(self, scorer=scorer)

    def training_row(self, values):
        """See `Experiment`."""
        return values

    def validate(self, state, step, workdir):
        """Keeps the pictures of a fixed grid, `samples/<step>.npz`, and scores others."""
        variables, seed = state.eval_variables, self.config.seed
        z, labels = self.sampler.grid(GRID_SEED + seed, GRID_COLUMNS, GRID_ROWS)
        pictures = self.sampler.images(variables, z, labels)
        if is_leader():
            folder = os.path.join(workdir, 'samples')
            with written(folder):
                os.makedirs(folder, exist_ok=True)
            content = {'images': pictures, 'step': step}
            write_atomically(os.path.join(folder, f'{step:08d}.npz'), lambda f: np.savez_compressed(f, **content))
        if self.scorer is None or not self.config.gan.score_examples:
            return {}
        return self.scorer(self.sampler.draw(variables, self.config.gan.score_examples, SCORE_SEED + seed)[0])

    def rating(self, found):
        """Minus the Frechet distance."""
        return -found['fid_classifier'] if 'fid_classifier' in found else None

    def describe(self, values):
        """See `Experiment`."""
        return (
            f'discriminator {values["discriminator_loss"]:.4f}  generator {values["generator_loss"]:.4f}  '
            f'logits {values["real_logit"]:+.2f} real {values["fake_logit"]:+.2f} fake'
        )

    def describe_validation(self, found):
        """See `Experiment`."""
        return '  '.join(f'{name} {value:.4f}' for name, value in found.items() if not name.endswith('_std'))


def build(config, devices=None):
    """A `Generation` from a checked config, without a scorer.

    Raises:
      ValueError: data that is not there, or numbers and nets that do not fit it.
    """
    resolved = resolve_setting(config)
    section = resolved.gan
    frame = build_frame(resolved, devices, section.n_dis * resolved.data.batch_size, section.passes)
    source, mesh = frame['source'], frame['mesh']
    input_shape = source.train.images.shape[1:]
    generator, discriminator = build_gan(resolved, input_shape, source.num_classes)
    num_classes = source.num_classes if section.conditional else 0
    generator_tx = build_optimizer(resolved, frame['schedule'])
    discriminator_tx = build_optimizer(resolved, frame['schedule'], section.n_dis)
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
        # As it was given: a resumed run compares it with the next command's.
        **{**frame, 'config': config},
        train_step=step,
        generator=generator,
        discriminator=discriminator,
        generator_tx=generator_tx,
        discriminator_tx=discriminator_tx,
        sampler=sampler,
        scorer=None,
    )
