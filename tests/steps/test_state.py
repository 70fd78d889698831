"""The optimizer against PyTorch's rule, and what the state holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnorm_jax.models import create_gan, create_model
from convnorm_jax.steps.gan import create_gan_state
from convnorm_jax.steps.state import TrainState, average, create_state, global_norm, make_optimizer, without_counts

STEPS = 5


def torch_sgd(value, grads, learning_rates, momentum, weight_decay):
    """PyTorch's SGD in float64: decay joins the gradient, the first buffer is the gradient itself."""
    value, buffer = np.float64(value), None
    for gradient, rate in zip(grads, learning_rates):
        direction = np.float64(gradient) + weight_decay * value
        buffer = direction if buffer is None else momentum * buffer + direction
        value = value - rate * buffer
    return value


def updated(tx, params, grads):
    """Parameters after all of `grads`."""
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in grads:
        updates, opt_state = update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    shapes = {'conv': {'kernel': (3, 3, 2, 4), 'bias': (4,)}, 'relu': {'shift': (4,)}}

    def draw():
        return jax.tree.map(
            lambda s: random.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
        )

    return draw(), [draw() for _ in range(STEPS)]


@pytest.mark.parametrize('momentum', [0.9, 0.0])
def test_sgd_is_pytorchs(problem, momentum):
    params, grads = problem
    rates = [0.1, 0.1, 0.01, 0.01, 0.001]
    tx = make_optimizer('sgd', lambda step: jnp.asarray(rates)[step], momentum=momentum, weight_decay=0.3)
    found = updated(tx, params, grads)
    for block, name, decay in (('conv', 'kernel', 0.3), ('conv', 'bias', 0.3), ('relu', 'shift', 0.0)):
        expected = torch_sgd(params[block][name], [g[block][name] for g in grads], rates, momentum, decay)
        np.testing.assert_allclose(found[block][name], expected, rtol=1e-5, atol=1e-6)


def test_sgd_is_that_of_torch_itself(problem):
    torch = pytest.importorskip('torch')
    params, grads = problem
    value = torch.nn.Parameter(torch.tensor(params['conv']['kernel']))
    optimizer = torch.optim.SGD([value], lr=0.1, momentum=0.9, weight_decay=0.3)
    for gradient in grads:
        value.grad = torch.tensor(gradient['conv']['kernel'])
        optimizer.step()
    found = updated(make_optimizer('sgd', 0.1, momentum=0.9, weight_decay=0.3), params, grads)
    np.testing.assert_allclose(found['conv']['kernel'], value.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adamw_decays_all_but_the_shift(problem):
    params, grads = problem
    plain, decayed = (updated(make_optimizer('adamw', 0.01, weight_decay=decay), params, grads) for decay in (0.0, 0.5))
    np.testing.assert_array_equal(plain['relu']['shift'], decayed['relu']['shift'])
    # The decay joins the step, not the gradient: after one step it is exactly rate * decay * value.
    one_plain, one_decayed = (
        updated(make_optimizer('adamw', 0.01, weight_decay=decay), params, grads[:1]) for decay in (0.0, 0.5)
    )
    for name in ('kernel', 'bias'):
        np.testing.assert_allclose(
            one_plain['conv'][name] - one_decayed['conv'][name], 0.01 * 0.5 * params['conv'][name], atol=1e-6
        )


def test_adam_is_that_of_torch(problem):
    """PyTorch's Adam: weight decay joins the gradient; in NumPy, float64."""
    params, grads = problem
    found = updated(make_optimizer('adam', 0.01, momentum=0.5, beta2=0.9, weight_decay=0.3), params, grads)
    value = params['conv']['kernel'].astype(np.float64)
    first, second = 0.0, 0.0
    for n, gradient in enumerate((g['conv']['kernel'] for g in grads), 1):
        gradient = gradient.astype(np.float64) + 0.3 * value
        first, second = 0.5 * first + 0.5 * gradient, 0.9 * second + 0.1 * gradient**2
        value = value - 0.01 * (first / (1 - 0.5**n)) / (np.sqrt(second / (1 - 0.9**n)) + 1e-8)
    np.testing.assert_allclose(found['conv']['kernel'], value, rtol=1e-5, atol=1e-6)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"optimizer\.name='lion': expected one of .*sgd"):
        make_optimizer('lion', 0.1)


def test_a_fresh_state(quick_compilation):
    model = create_model('simple_cnn', num_classes=10, layer='convnorm', width=4, depth=(1,))
    tx = make_optimizer('sgd', 0.1)
    make = jax.jit(lambda seed: create_state(model, tx, (8, 8, 1), seed, use_ema=True))
    state, same, other = make(3), make(3), make(4)
    assert isinstance(state, TrainState) and int(state.step) == 0
    assert set(state.model_state) == {'batch_stats'}
    jax.tree.map(np.testing.assert_array_equal, state, same)
    kernels = [s.params['conv1_1']['kernel'] for s in (state, other)]
    assert not np.array_equal(*kernels) and not np.array_equal(state.rng, other.rng)
    jax.tree.map(np.testing.assert_array_equal, (state.ema, state.ema_state), (state.params, state.model_state))
    without = create_state(model, tx, (8, 8, 1), 3)
    assert without.ema is None and without.ema_state is None


def test_evaluation_takes_the_average_with_its_own_statistics():
    state = TrainState(step=0, params={'a': 1}, model_state={'batch_stats': {'b': 2}}, opt_state=(), rng=None)
    assert state.eval_variables == {'params': {'a': 1}, 'batch_stats': {'b': 2}}
    averaged = state.replace(ema={'a': 5}, ema_state={'batch_stats': {'b': 6}})
    assert averaged.eval_variables == {'params': {'a': 5}, 'batch_stats': {'b': 6}}
    with pytest.raises(ValueError, match='ema without ema_state'):
        _ = state.replace(ema={'a': 5}).eval_variables


def fresh_states(tx):
    model = create_model('simple_cnn', num_classes=10, layer='convnorm', width=4, depth=(1,))
    yield create_state(model, tx, (8, 8, 1), 0, use_ema=True, carried_batch=2)
    nets = create_gan('sngan', picture_shape=(8, 8, 1), latent=4, generator_width=4, discriminator_width=4)
    yield create_gan_state(*nets, tx, tx, input_shape=(8, 8, 1), latent=4, seed=0, use_ema=True)


# The second keeps the parameters themselves in its state.
@pytest.mark.slow
@pytest.mark.parametrize('tx', [optax.adam(0.1), optax.contrib.schedule_free_sgd(0.1)], ids=['adam', 'schedule_free'])
def test_a_fresh_state_can_be_donated(tx, quick_compilation):
    for state in fresh_states(tx):
        shapes = jax.tree.map(jnp.shape, state)
        moved = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(state)
        assert jax.tree.map(jnp.shape, moved) == shapes


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.9999])
def test_the_average_by_its_weights(decay):
    values = np.random.default_rng(0).normal(size=30)
    found, expected = {'a': jnp.float32(7)}, 7.0
    for n, value in enumerate(values):
        found = average(found, {'a': jnp.float32(value)}, decay, jnp.int32(n))
        keep = min(decay, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
    np.testing.assert_allclose(found['a'], expected, rtol=1e-5)


@pytest.mark.parametrize('updates', [1, 10, 100, 3000])
def test_the_average_reaches_back_no_further_than_a_tenth_of_the_run(updates):
    """Of a parameter that moves evenly it lags by a tenth of the way, whatever the decay and the length."""
    body = lambda n, ema: average(ema, (n + 1.0).astype(jnp.float32), 0.99999, n)
    lag = updates - float(jax.lax.fori_loop(0, updates, body, jnp.float32(0)))
    assert lag <= 0.1 * updates + 1e-3 * updates


def test_the_average_keeps_its_dtype():
    for dtype in jnp.bfloat16, jnp.float32:
        assert average({'a': jnp.ones(2, dtype)}, {'a': jnp.zeros(2, dtype)}, 0.9, jnp.int32(4))['a'].dtype == dtype


def test_counts_of_spectra_only_are_reset():
    ones = jnp.ones(3)
    state = {'batch_stats': {'conv': {'preconditioner': ones, 'count': ones[0]}, 'mine': {'count': ones[0]}}}
    found = without_counts(state)['batch_stats']
    assert (float(found['conv']['count']), float(found['mine']['count'])) == (0, 1)
    np.testing.assert_array_equal(found['conv']['preconditioner'], ones)
    assert without_counts({}) == {}


def test_global_norm():
    rng = np.random.default_rng(0)
    tree = {'a': rng.standard_normal((3, 4, 5)), 'b': [rng.standard_normal(7), np.float32(2)]}
    expected = np.sqrt(sum(np.square(a).sum() for a in jax.tree.leaves(tree)))
    np.testing.assert_allclose(global_norm(jax.tree.map(jnp.float32, tree)), expected, rtol=1e-6)
