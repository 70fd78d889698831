"""GAN training: several updates of the discriminator, then one of the generator, as one pure step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from convnorm_jax.attacks import loops
from convnorm_jax.data.augment import to_float
from convnorm_jax.data.diffaugment import diffaugment
from convnorm_jax.steps import gan_losses
from convnorm_jax.steps.state import Batch, Metrics, Params, average, global_norm, unshared, without_counts

METRICS = (
    'discriminator_loss',
    'generator_loss',
    'real_logit',
    'fake_logit',
    'discriminator_gradient_norm',
    'generator_gradient_norm',
)

# The metrics of an update of the discriminator.
_DISCRIMINATOR_METRICS = ('discriminator_loss', 'real_logit', 'fake_logit', 'discriminator_gradient_norm')


@struct.dataclass
class NetState:
    """The state of one of the two nets.

    Attributes:
      params: its parameters.
      opt_state: state of its optimizer (optax).
      model_state: every other collection.
    """

    params: Any
    opt_state: Any
    model_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that `apply` takes."""
        return {'params': self.params, **self.model_state}

    def updated(self, grads: Params, model_state: Any, tx: optax.GradientTransformation) -> 'NetState':
        """The state after one update of its optimizer."""
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        return NetState(optax.apply_updates(self.params, updates), opt_state, model_state)


@struct.dataclass
class GANState:
    """Everything that a step reads and writes: a frozen pytree.

    Attributes:
      step: int32 scalar, generator updates done.
      generator: a `NetState`.
      discriminator: a `NetState`.
      rng: key data of the run; randomness is `fold_in(rng, step)`, so `rng` never changes.
      ema: the generator's variables with the exponential moving average of its parameters, see `state.average`, and
        with statistics computed with these parameters (not an average of the generator's), or None.
    """

    step: jax.Array
    generator: NetState
    discriminator: NetState
    rng: jax.Array
    ema: Any = None

    @property
    def params(self) -> dict[str, Params]:
        """The parameters of both nets."""
        return {'generator': self.generator.params, 'discriminator': self.discriminator.params}

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The generator's variables for sampling: the averaged ones if there are any."""
        return self.generator.variables if self.ema is None else self.ema


def create_gan_state(
    generator: nn.Module,
    discriminator: nn.Module,
    generator_tx: optax.GradientTransformation,
    discriminator_tx: optax.GradientTransformation,
    *,
    input_shape: Sequence[int],
    latent: int,
    seed: int,
    use_ema: bool,
) -> GANState:
    """Initializes a state; jittable.

    Args:
      generator: see `models.create_gan`.
      discriminator: see `models.create_gan`.
      generator_tx: the generator's optimizer.
      discriminator_tx: the discriminator's optimizer.
      input_shape: [H, W, C] of an image.
      latent: size of z.
      seed: of the initial values and of the run's random numbers.
      use_ema: keep an average of the generator.

    Returns:
      The state before the first step.
    """
    generator_key, discriminator_key, rng = jax.random.split(jax.random.PRNGKey(seed), 3)
    labels = jnp.zeros((1,), jnp.int32)  # a net without classes ignores them
    generator_variables = generator.init(generator_key, jnp.zeros((1, latent)), labels, train=False)
    discriminator_variables = discriminator.init(discriminator_key, jnp.zeros((1, *input_shape)), labels, train=False)
    generator_state = _net_state(generator_variables, generator_tx)
    discriminator_state = _net_state(discriminator_variables, discriminator_tx)
    state = GANState(
        step=jnp.zeros((), jnp.int32),
        generator=generator_state,
        discriminator=discriminator_state,
        rng=rng,
        ema=generator_state.variables if use_ema else None,
    )
    return unshared(state)


def _net_state(variables: Any, tx: optax.GradientTransformation) -> NetState:
    model_state = dict(variables)
    params = model_state.pop('params')
    return NetState(params, tx.init(params), model_state)


def make_gan_step(
    generator: nn.Module,
    discriminator: nn.Module,
    generator_tx: optax.GradientTransformation,
    discriminator_tx: optax.GradientTransformation,
    *,
    loss: str,
    n_dis: int,
    latent: int,
    num_classes: int = 0,
    gradient_penalty: float = 0.0,
    policy: Sequence[str] = (),
    ema_decay: float = 0.0,
    penalty_fn: Callable[[Params], jax.Array] | None = None,
    shard_fn: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[[GANState, Batch], tuple[GANState, Metrics]]:
    """Makes the step of a GAN: `n_dis` updates of the discriminator, each on new images, then one of the generator.

    Images are in [-1, 1]. Both nets use batch statistics; the discriminator sees real and generated images
    in separate passes. The running statistics of each net are updated in its own updates only.

    >>> from convnorm_jax.models import create_gan
    >>> nets = create_gan('sngan', picture_shape=(8, 8, 1), latent=4, generator_width=4, discriminator_width=4)
    >>> optimizers = (optax.adam(2e-4), optax.adam(2e-4))
    >>> sizes = {'input_shape': (8, 8, 1), 'latent': 4, 'seed': 0, 'use_ema': False}
    >>> state = jax.eval_shape(lambda: create_gan_state(*nets, *optimizers, **sizes))
    >>> step = make_gan_step(*nets, *optimizers, loss='hinge', n_dis=2, latent=4)
    >>> batch = {'images': jnp.zeros((8, 8, 8, 1), jnp.uint8), 'labels': jnp.zeros(8, int)}
    >>> state, metrics = jax.eval_shape(step, state, batch)  # jax.jit(step) runs it
    >>> sorted(metrics)[:3]
    ['discriminator_gradient_norm', 'discriminator_loss', 'fake_logit']

    Args:
      generator: see `models.create_gan`.
      discriminator: see `models.create_gan`.
      generator_tx: the generator's optimizer.
      discriminator_tx: the discriminator's optimizer, which makes n_dis updates a step.
      loss: one of `gan_losses.LOSSES`.
      n_dis: discriminator updates a step.
      latent: size of z, standard normal.
      num_classes: number of classes of the labels that generated images are drawn for; 0 for no labels.
      gradient_penalty: its weight (arXiv 1704.00028); 0 for none.
      policy: differentiable augmentation of everything that the discriminator sees, see `data.diffaugment`.
      ema_decay: share of the old average that an update keeps, see `state.average`; unused if the state has none.
        If it has one, the averaged generator also runs on the latents of the generator's update, for its statistics.
      penalty_fn: the discriminator's parameters -> scalar added to its loss, or None.
      shard_fn: divides the first axis of every array over the devices.

    Returns:
      A pure function (state, batch) -> (state, metrics). batch: 'images' uint8 [n_dis * B, H, W, C] and
      'labels' int [n_dis * B]. metrics: (sum, count) pairs of float32 scalars for `METRICS`.
    """

    def generate(variables: Any, key: jax.Array, batch: int) -> tuple[Any, jax.Array | None]:
        z_key, label_key = jax.random.split(key)
        z = shard_fn(jax.random.normal(z_key, (batch, latent)))
        labels = shard_fn(jax.random.randint(label_key, (batch,), 0, num_classes)) if num_classes else None
        statistics = [name for name in variables if name != 'params']
        return generator.apply(variables, z, labels, train=True, mutable=statistics), labels

    def judge(params: Params, model_state: Any, images: jax.Array, labels: jax.Array | None) -> tuple[jax.Array, Any]:
        logits, model_state = discriminator.apply(
            {'params': params, **model_state}, images, labels, train=True, mutable=list(model_state)
        )
        return logits, model_state

    def discriminator_update(
        state: GANState, real: jax.Array, labels: jax.Array | None, key: jax.Array
    ) -> tuple[GANState, dict[str, jax.Array]]:
        net = state.discriminator
        fake_key, *augment_keys, penalty_key = jax.random.split(key, 4)
        (fake, _), fake_labels = generate(state.generator.variables, fake_key, real.shape[0])
        fake = jax.lax.stop_gradient(fake)
        real, fake = (diffaugment(k, images, policy) for k, images in zip(augment_keys, (real, fake)))

        def loss_fn(params: Params) -> tuple[jax.Array, tuple]:
            real_logits, model_state = judge(params, net.model_state, real, labels)
            fake_logits, model_state = judge(params, model_state, fake, fake_labels)
            total = gan_losses.discriminator_loss(loss, real_logits, fake_logits)
            if gradient_penalty:
                critic = lambda images: judge(params, model_state, images, labels)[0]
                total += gradient_penalty * gan_losses.gradient_penalty(critic, real, fake, penalty_key)
            total += penalty_fn(params) if penalty_fn else 0
            return total, (model_state, real_logits.mean(), fake_logits.mean())

        (value, (model_state, real_logit, fake_logit)), grads = jax.value_and_grad(loss_fn, has_aux=True)(net.params)
        state = dataclasses.replace(state, discriminator=net.updated(grads, model_state, discriminator_tx))
        return state, {
            'discriminator_loss': value,
            'real_logit': real_logit,
            'fake_logit': fake_logit,
            'discriminator_gradient_norm': global_norm(grads),
        }

    def generator_update(state: GANState, batch: int, key: jax.Array) -> tuple[GANState, dict[str, jax.Array]]:
        net = state.generator
        fake_key, augment_key = jax.random.split(key)

        def loss_fn(params: Params) -> tuple[jax.Array, Any]:
            (fake, model_state), labels = generate({'params': params, **net.model_state}, fake_key, batch)
            fake = diffaugment(augment_key, fake, policy)
            logits, _ = judge(state.discriminator.params, state.discriminator.model_state, fake, labels)
            return gan_losses.generator_loss(loss, logits), model_state

        (value, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(net.params)
        state = dataclasses.replace(state, generator=net.updated(grads, model_state, generator_tx))
        state = dataclasses.replace(state, ema=averaged(state, batch, fake_key))
        return state, {'generator_loss': value, 'generator_gradient_norm': global_norm(grads)}

    def averaged(state: GANState, batch: int, key: jax.Array) -> Any:
        """The average after an update of the generator, with statistics of generated images."""
        if state.ema is None:
            return None
        params = average(state.ema['params'], state.generator.params, ema_decay, state.step)
        statistics = without_counts({name: tree for name, tree in state.ema.items() if name != 'params'})
        (_, statistics), _ = generate({'params': params, **statistics}, key, batch)
        return {'params': params, **statistics}

    def gan_step(state: GANState, batch: Batch) -> tuple[GANState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        # Strided shares: each of them is spread over all devices, as the batch is.
        shares = [jnp.moveaxis(a.reshape(-1, n_dis, *a.shape[1:]), 1, 0) for a in (batch['images'], batch['labels'])]

        def turn(number: jax.Array, carry: tuple) -> tuple:
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
        return dataclasses.replace(state, step=state.step + 1), metrics

    return gan_step


def make_sampler(generator: nn.Module) -> Callable[[Any, jax.Array, jax.Array | None], jax.Array]:
    """Makes a pure function (variables, z [B, latent], labels [B] or None) -> images, float32 in [0, 1]."""

    def sample(variables: Any, z: jax.Array, labels: jax.Array | None) -> jax.Array:
        images: Any = generator.apply(variables, z, labels, train=False)
        return (images + 1) / 2

    return sample
