"""GAN training: some updates of the discriminator, then one of the generator, as one pure step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from convnorm_jax.attacks import loops
from convnorm_jax.data.augment import to_float
from convnorm_jax.data.diffaugment import diffaugment
from convnorm_jax.steps import gan_losses
from convnorm_jax.steps.state import average, global_norm, unshared, without_counts

METRICS = (
    'discriminator_loss',
    'generator_loss',
    'real_logit',
    'fake_logit',
    'discriminator_gradient_norm',
    'generator_gradient_norm',
)

# Those of every update of the discriminator.
_DISCRIMINATOR_METRICS = ('discriminator_loss', 'real_logit', 'fake_logit', 'discriminator_gradient_norm')


@struct.dataclass
class NetState:
    """One of the two nets.

    Attributes:
      params, opt_state: its parameters, and optax's state.
      model_state: every other collection.
    """

    params: Any
    opt_state: Any
    model_state: Any

    @property
    def variables(self):
        """What `apply` takes."""
        return {'params': self.params, **self.model_state}

    def updated(self, grads, model_state, tx):
        """The net after one update of its optimizer."""
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        return NetState(optax.apply_updates(self.params, updates), opt_state, model_state)


@struct.dataclass
class GANState:
    """All that a step reads and writes; a frozen pytree.

    Attributes:
      step: int32 scalar, generator updates done.
      generator, discriminator: each a `NetState`.
      rng: key data of the run; randomness is `fold_in(rng, step)`, so it never changes.
      ema: the generator's variables with the exponential moving average of its parameters, see `state.average`, and
        the statistics that these make (not an average of the generator's), or None.
    """

    step: jax.Array
    generator: NetState
    discriminator: NetState
    rng: jax.Array
    ema: Any = None

    @property
    def params(self):
        """The parameters of both nets."""
        return {'generator': self.generator.params, 'discriminator': self.discriminator.params}

    @property
    def eval_variables(self):
        """The generator's variables to draw pictures with: the averaged ones where there are any."""
        return self.generator.variables if self.ema is None else self.ema


def create_gan_state(generator, discriminator, generator_tx, discriminator_tx, *, input_shape, latent, seed, use_ema):
    """A fresh state; jittable.

    Args:
      generator, discriminator: Linen modules, see `models.create_gan`.
      generator_tx, discriminator_tx: optax transformations.
      input_shape: [H, W, C] of a picture.
      latent: size of z.
      seed: int.
      use_ema: keep an average of the generator.
    """
    generator_key, discriminator_key, rng = jax.random.split(jax.random.PRNGKey(seed), 3)
    # A net without classes takes no notice of the labels.
    labels = jnp.zeros((1,), jnp.int32)
    made = generator.init(generator_key, jnp.zeros((1, latent)), labels, train=False)
    judged = discriminator.init(discriminator_key, jnp.zeros((1, *input_shape)), labels, train=False)
    generator_state, discriminator_state = _net_state(made, generator_tx), _net_state(judged, discriminator_tx)
    state = GANState(
        step=jnp.zeros((), jnp.int32),
        generator=generator_state,
        discriminator=discriminator_state,
        rng=rng,
        ema=generator_state.variables if use_ema else None,
    )
    return unshared(state)


def _net_state(variables, tx):
    model_state = dict(variables)
    params = model_state.pop('params')
    return NetState(params, tx.init(params), model_state)


def make_gan_step(
    generator,
    discriminator,
    generator_tx,
    discriminator_tx,
    *,
    loss,
    n_dis,
    latent,
    num_classes=0,
    gradient_penalty=0.0,
    policy=(),
    ema_decay=0.0,
    penalty_fn=None,
    shard_fn=lambda tree: tree,
):
    """The step of a GAN: `n_dis` updates of the discriminator, each on new pictures, then one of the generator.

    Pictures are in [-1, 1]. Both nets use batch statistics; real and generated pictures pass
    the discriminator apart from each other. Its statistics move in its own updates only, and so
    do the generator's.

    Args:
      generator, discriminator: see `models.create_gan`.
      generator_tx, discriminator_tx: optax transformations; the latter makes n_dis updates a step.
      loss: one of `gan_losses.LOSSES`.
      n_dis: discriminator updates a step.
      latent: size of z, standard normal.
      num_classes: of the labels that generated pictures are drawn for; 0 for no labels.
      gradient_penalty: its weight (arXiv 1704.00028); 0 for none.
      policy: differentiable augmentation of all that the discriminator sees, see `data.diffaugment`.
      ema_decay: share of the old average that an update keeps, see `state.average`; unused if the state has none.
        Where it has one, the averaged generator draws the latents of the generator's update too: for its statistics.
      penalty_fn: the discriminator's parameters -> scalar added to its loss, or None.
      shard_fn: cuts the first axis of every array over the devices.

    Returns:
      A pure function (state, batch) -> (state, metrics). batch: 'images' uint8 [n_dis * B, H, W, C] and
      'labels' int [n_dis * B]. metrics: (sum, count) pairs of float32 scalars for `METRICS`.
    """

    def generate(variables, key, batch):
        z_key, label_key = jax.random.split(key)
        z = shard_fn(jax.random.normal(z_key, (batch, latent)))
        labels = shard_fn(jax.random.randint(label_key, (batch,), 0, num_classes)) if num_classes else None
        statistics = [name for name in variables if name != 'params']
        return generator.apply(variables, z, labels, train=True, mutable=statistics), labels

    def judge(params, model_state, images, labels):
        return discriminator.apply(
            {'params': params, **model_state}, images, labels, train=True, mutable=list(model_state)
        )

    def discriminator_update(state, real, labels, key):
        net = state.discriminator
        fake_key, *augment_keys, penalty_key = jax.random.split(key, 4)
        (fake, _), fake_labels = generate(state.generator.variables, fake_key, real.shape[0])
        fake = jax.lax.stop_gradient(fake)
        real, fake = (diffaugment(k, images, policy) for k, images in zip(augment_keys, (real, fake)))

        def loss_fn(params):
            real_logits, model_state = judge(params, net.model_state, real, labels)
            fake_logits, model_state = judge(params, model_state, fake, fake_labels)
            total = gan_losses.discriminator_loss(loss, real_logits, fake_logits)
            if gradient_penalty:
                critic = lambda images: judge(params, model_state, images, labels)[0]
                total += gradient_penalty * gan_losses.gradient_penalty(critic, real, fake, penalty_key)
            total += penalty_fn(params) if penalty_fn else 0
            return total, (model_state, real_logits.mean(), fake_logits.mean())

        (value, (model_state, real_logit, fake_logit)), grads = jax.value_and_grad(loss_fn, has_aux=True)(net.params)
        state = state.replace(discriminator=net.updated(grads, model_state, discriminator_tx))
        return state, {
            'discriminator_loss': value,
            'real_logit': real_logit,
            'fake_logit': fake_logit,
            'discriminator_gradient_norm': global_norm(grads),
        }

    def generator_update(state, batch, key):
        net = state.generator
        fake_key, augment_key = jax.random.split(key)

        def loss_fn(params):
            (fake, model_state), labels = generate({'params': params, **net.model_state}, fake_key, batch)
            fake = diffaugment(augment_key, fake, policy)
            logits, _ = judge(state.discriminator.params, state.discriminator.model_state, fake, labels)
            return gan_losses.generator_loss(loss, logits), model_state

        (value, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(net.params)
        state = state.replace(generator=net.updated(grads, model_state, generator_tx))
        state = state.replace(ema=averaged(state, batch, fake_key))
        return state, {'generator_loss': value, 'generator_gradient_norm': global_norm(grads)}

    def averaged(state, batch, key):
        """The average after an update of the generator, with statistics of generated pictures."""
        if state.ema is None:
            return None
        params = average(state.ema['params'], state.generator.params, ema_decay, state.step)
        statistics = without_counts({name: tree for name, tree in state.ema.items() if name != 'params'})
        (_, statistics), _ = generate({'params': params, **statistics}, key, batch)
        return {'params': params, **statistics}

    def gan_step(state, batch):
        key = jax.random.fold_in(state.rng, state.step)
        # Every n_dis-th picture: so each share lies on all devices, as the batch does.
        shares = [jnp.moveaxis(a.reshape(-1, n_dis, *a.shape[1:]), 1, 0) for a in (batch['images'], batch['labels'])]

        def turn(number, carry):
            state, totals = carry
            images, labels = (jax.lax.dynamic_index_in_dim(a, number, keepdims=False) for a in shares)
            images, labels = shard_fn((2 * to_float(images) - 1, labels))
            state, values = discriminator_update(
                state, images, labels if num_classes else None, jax.random.fold_in(key, number)
            )
            return state, jax.tree.map(jnp.add, totals, values)

        totals = {name: jnp.zeros(()) for name in _DISCRIMINATOR_METRICS}
        state, totals = loops.repeat(n_dis, turn, (state, totals))
        state, more = generator_update(state, shares[0].shape[1], jax.random.fold_in(key, n_dis))
        metrics = {name: (total, jnp.float32(n_dis)) for name, total in totals.items()}
        metrics |= {name: (value, jnp.float32(1)) for name, value in more.items()}
        return state.replace(step=state.step + 1), metrics

    return gan_step


def make_sampler(generator):
    """A pure function (variables, z [B, latent], labels [B] or None) -> pictures, float32 in [0, 1]."""

    def sample(variables, z, labels):
        return (generator.apply(variables, z, labels, train=False) + 1) / 2

    return sample
