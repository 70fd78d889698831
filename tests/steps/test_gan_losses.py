"""Losses of a GAN against their formulas, and the gradient penalty against finite differences."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convnorm_jax import ConvNorm
from convnorm_jax.layers import spectral
from convnorm_jax.steps import gan_losses

KEY = jax.random.PRNGKey(3)
pytestmark = pytest.mark.usefixtures('quick_compilation')

REAL, FAKE = np.array([2.0, -1.0]), np.array([0.5, -3.0])

# By hand: softplus(1) = 1.3132617, (-1) = 0.3132617, (2) = 2.1269280, (-2) = 0.1269280,
# (0.5) = 0.9740770, (-0.5) = 0.4740770, (3) = 3.0485874, (-3) = 0.0485874.
BY_HAND = {
    'non_saturating': ((0.1269280 + 1.3132617) / 2 + (0.9740770 + 0.0485874) / 2, (0.4740770 + 3.0485874) / 2),
    'hinge': ((0 + 2) / 2 + (1.5 + 0) / 2, 1.25),
    'wasserstein': (-1.25 - 0.5, 1.25),
    'least_squares': ((1 + 4) / 2 / 2 + (0.25 + 9) / 2 / 2, (0.25 + 16) / 2 / 2),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# torch_mimicry's formulas, and the least-squares paper's.
FORMULAS = {
    'non_saturating': (
        lambda r, f: -np.log(sigmoid(r)).mean() - np.log(1 - sigmoid(f)).mean(),
        lambda f: -np.log(sigmoid(f)).mean(),
    ),
    'hinge': (
        lambda r, f: np.where(r < 1, 1 - r, 0).mean() + np.where(f > -1, 1 + f, 0).mean(),
        lambda f: -f.mean(),
    ),
    'wasserstein': (lambda r, f: -r.mean() + f.mean(), lambda f: -f.mean()),
    'least_squares': (
        lambda r, f: 0.5 * ((r - 1) ** 2).mean() + 0.5 * (f**2).mean(),
        lambda f: 0.5 * ((f - 1) ** 2).mean(),
    ),
}


@pytest.mark.parametrize('name', gan_losses.LOSSES)
def test_by_hand(name):
    discriminator, generator = BY_HAND[name]
    loss = gan_losses.discriminator_loss(name, jnp.float32(REAL), jnp.float32(FAKE))
    assert loss == pytest.approx(discriminator, rel=1e-6) and loss.dtype == jnp.float32 and loss.shape == ()
    loss = gan_losses.generator_loss(name, jnp.float32(FAKE))
    assert loss == pytest.approx(generator, rel=1e-6) and loss.dtype == jnp.float32 and loss.shape == ()


@pytest.mark.parametrize('name', gan_losses.LOSSES)
def test_formulas_and_slopes_in_float64(name):
    random = np.random.default_rng(0)
    real, fake = random.normal(0, 3, 9), random.normal(0, 3, (7, 1))  # any shape, any number
    discriminator, generator = FORMULAS[name]
    shift = 1e-6
    with jax.enable_x64(True):
        loss = lambda r, f: gan_losses.discriminator_loss(name, r, f)
        assert loss(jnp.array(real), jnp.array(fake)) == pytest.approx(discriminator(real, fake), rel=1e-12)
        assert gan_losses.generator_loss(name, jnp.array(fake)) == pytest.approx(generator(fake), rel=1e-12)
        by_real, by_fake = jax.grad(loss, (0, 1))(jnp.array(real), jnp.array(fake))
        by_generator = jax.grad(lambda f: gan_losses.generator_loss(name, f))(jnp.array(fake))
        sums = [np.sum(slope) for slope in map(np.asarray, (by_real, by_fake, by_generator))]
    # The sum of all slopes is that of a shift of all logits.
    ahead, behind = (np.array([discriminator(real + s, fake), discriminator(real, fake + s), generator(fake + s)])
                     for s in (shift, -shift))  # fmt: skip
    np.testing.assert_allclose(sums, (ahead - behind) / (2 * shift), atol=1e-8)


@pytest.mark.parametrize('name', gan_losses.LOSSES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_sure_discriminators_are_finite(name, dtype):
    real, fake = jnp.array([500.0, -500.0], dtype), jnp.array([-500.0, 500.0], dtype)
    loss, slopes = jax.value_and_grad(lambda r, f: gan_losses.discriminator_loss(name, r, f), (0, 1))(real, fake)
    by_generator, slope = jax.value_and_grad(lambda f: gan_losses.generator_loss(name, f))(fake)
    assert loss.dtype == by_generator.dtype == jnp.float32
    assert all(np.isfinite(a.astype(jnp.float32)).all() for a in (loss, *slopes, by_generator, slope))
    if name == 'non_saturating':  # a picture that is found out must still move, or nothing ever does
        assert slope[0] == -0.5 and slope[1] == 0


def test_unknown_names():
    with pytest.raises(ValueError, match=r"name='minimax': expected one of non_saturating, hinge"):
        gan_losses.discriminator_loss('minimax', jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"name='minimax'"):
        gan_losses.generator_loss('minimax', jnp.zeros(2))


class Critic(nn.Module):
    """ConvNorm (its channel-wise convolution has a hand-written gradient), a smooth bend, one logit.

    BatchNorm computes in float32 always, too coarse for finite differences: `own_batch_norm`
    is the same without parameters, in the dtype of the pictures. `running`: ConvNorm takes its
    stored spectrum.
    """

    own_batch_norm: bool
    running: bool

    @nn.compact
    def __call__(self, x, train):
        layer = ConvNorm(3, strides=2, padding=1, use_batch_norm=not self.own_batch_norm)
        x = layer(x, use_running_average=self.running)
        if self.own_batch_norm and train:
            x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
        return nn.Dense(1)(jnp.tanh(x).reshape(len(x), -1))[:, 0]


@pytest.fixture(scope='module')
def problem():
    """(float64 params, batch_stats of the net without BatchNorm, real, fake), drawn in NumPy."""
    random = np.random.default_rng(5)
    real, fake = random.uniform(-1, 1, (2, 3, 6, 6, 2))
    net = Critic(own_batch_norm=True, running=True)
    variables = jax.eval_shape(lambda: net.init(KEY, jnp.zeros((1, 6, 6, 2)), False))
    params = jax.tree.map(lambda a: random.normal(0, 0.5, a.shape), variables['params'])
    statistics = jax.tree.map(lambda a: 0.5 + random.uniform(size=a.shape), variables['batch_stats'])
    return params, statistics, real, fake


def critic_fn(params, statistics, train, own_batch_norm=True, running=None):
    """images -> logits of the net with these parameters; closes over them, as a step's loss does."""
    net = Critic(own_batch_norm, running=not train if running is None else running)

    def apply(images):
        variables = {'params': params, 'batch_stats': statistics}
        return net.apply(variables, images, train, mutable=['batch_stats'])[0]

    return apply


@pytest.mark.slow
@pytest.mark.parametrize('train', [False, True])
def test_gradient_penalty_by_finite_differences_of_the_pictures(problem, train):
    params, statistics, real, fake = problem
    with jax.enable_x64(True):
        critic = jax.jit(critic_fn(params, statistics, train))
        points = np.array(gan_losses.interpolate(KEY, jnp.array(real), jnp.array(fake)))
        slopes, step = np.empty(points.size), 1e-5
        for index, shift in enumerate(np.eye(points.size).reshape(-1, *points.shape) * step):
            slopes[index] = (critic(points + shift).sum() - critic(points - shift).sum()) / (2 * step)
        norms = np.sqrt((slopes.reshape(len(points), -1) ** 2).sum(1))
        assert np.std(norms) > 0.01
        for target in (1.0, 0.0, 2.5):
            found = gan_losses.gradient_penalty(critic, jnp.array(real), jnp.array(fake), KEY, target)
            assert found.dtype == jnp.float64
            assert found == pytest.approx(((norms - target) ** 2).mean(), rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize('train', [False, True])
def test_the_gradient_of_the_penalty_by_finite_differences_of_the_parameters(problem, train):
    params, statistics, real, fake = problem
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(params)

        def penalty(flat, running):
            critic = critic_fn(unravel(flat), statistics, train, running=running)
            return gan_losses.gradient_penalty(critic, jnp.array(real), jnp.array(fake), KEY)

        if train:
            # The spectrum of the kernel is a constant to differentiation: the differences are taken with that of
            # these parameters, stored.
            v = spectral.preconditioner(jnp.array(params['ConvNorm_0']['kernel']), (8, 8))
            statistics = {'ConvNorm_0': {**statistics['ConvNorm_0'], 'preconditioner': v}}
        slopes = jax.jit(jax.grad(penalty), static_argnums=1)(flat, not train)
        shifts = np.eye(flat.size) * 1e-5
        difference = lambda shift: penalty(flat + shift, True) - penalty(flat - shift, True)
        both = jax.jit(lambda: jax.lax.map(difference, shifts))()
        np.testing.assert_allclose(slopes, both / 2e-5, rtol=1e-5, atol=1e-8)
        by_name = unravel(slopes)
        # Not a comparison of zeros; affine_bias is one where batch statistics follow, they take it out.
        assert np.abs(by_name['ConvNorm_0']['kernel']).min() > 1e-6
        assert np.abs(by_name['ConvNorm_0']['affine_kernel']).min() > 1e-6


def test_through_batch_norm_in_float32(problem):
    params, statistics, real, fake = problem
    ones = {'scale': np.ones(3), 'bias': np.zeros(3)}
    more = {**params, 'ConvNorm_0': {**params['ConvNorm_0'], 'batch_norm': ones}}
    states = {'ConvNorm_0': {**statistics['ConvNorm_0'], 'batch_norm': {'mean': np.zeros(3), 'var': np.ones(3)}}}

    def penalty(params, own):
        critic = critic_fn(params, statistics if own else states, True, own)
        return gan_losses.gradient_penalty(critic, jnp.array(real), jnp.array(fake), KEY)

    def slopes(params, own):
        return jax.jit(jax.grad(penalty), static_argnums=1)(params, own)

    with jax.enable_x64(True):
        expected = slopes(params, True)
        # float32's random numbers are others than float64's: here both are those of float64.
        found = slopes(more, False)
    del found['ConvNorm_0']['batch_norm']
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected)


def test_points_lie_between_the_pictures_each_at_its_own_place():
    real, fake = jnp.ones((500, 2, 2, 1)), jnp.full((500, 2, 2, 1), -1.0)
    points = np.array(gan_losses.interpolate(KEY, real, fake))
    share = (points[:, 0, 0, 0] + 1) / 2
    np.testing.assert_allclose(points, np.broadcast_to(2 * share[:, None, None, None] - 1, points.shape), atol=1e-6)
    assert share.min() >= 0 and share.max() <= 1
    np.testing.assert_allclose(np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.06)
    np.testing.assert_array_equal(points, jax.jit(gan_losses.interpolate)(KEY, real, fake))
    assert not np.array_equal(points, gan_losses.interpolate(jax.random.PRNGKey(4), real, fake))


def test_a_flat_discriminator_has_a_finite_gradient():
    images = jnp.ones((4, 2, 2, 1))

    def penalty(weight):
        return gan_losses.gradient_penalty(lambda x: weight * (x**2).sum((1, 2, 3)), images, images, KEY)

    value, slope = jax.jit(jax.value_and_grad(penalty))(jnp.float32(0))
    assert value == 1 and slope == 0
    assert np.isfinite(jax.grad(penalty)(1e-20))


def test_low_precision_is_summed_in_float32():
    images = jnp.ones((2, 32, 32, 3), jnp.bfloat16)
    norms = gan_losses.gradient_norms(lambda x: x.sum((1, 2, 3)), images)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, np.sqrt(3072), rtol=1e-6)


@pytest.mark.parametrize(
    ('real', 'fake', 'critic_fn', 'message'),
    [
        (jnp.ones((2, 4)), jnp.ones((1, 4)), jnp.sum, r'fake.shape=\(1, 4\)'),
        (jnp.ones((2, 4), jnp.uint8), jnp.ones((2, 4)), jnp.sum, 'real.dtype=uint8'),
        (jnp.ones((2, 4)), jnp.ones((2, 4)), lambda x: x[:, :1], r'logits.shape=\(2, 1\): expected \(2,\)'),
    ],
)
def test_what_is_wrong_is_named(real, fake, critic_fn, message):
    with pytest.raises(ValueError, match=message):
        gan_losses.gradient_penalty(critic_fn, real, fake, KEY)
