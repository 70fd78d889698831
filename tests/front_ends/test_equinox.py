"""The Equinox layers: the ways of Equinox. Their numbers: test_same.py."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnorm_jax.errors import UserError

eqx = pytest.importorskip('equinox')

from convnorm_jax.equinox import ConvNorm, ConvNormTranspose  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compilation')


def images(seed, size=(6, 6), batch=8, channels=4):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, channels, *size)), jnp.float32)


def make(*arguments, seed=0, **options):
    kind = options.pop('kind', ConvNorm)
    return eqx.nn.make_with_state(kind)(*arguments, key=jax.random.key(seed), **options)


def over_batch(model, x, state):
    return jax.vmap(model, axis_name='batch', in_axes=(0, None), out_axes=(0, None))(x, state)


@pytest.mark.slow
def test_a_net_trains_and_infers():
    """In a Sequential, which must see that the layers have a state."""

    class Net(eqx.Module):
        layers: eqx.nn.Sequential
        head: eqx.nn.Linear

        def __init__(self, key):
            a, b, c = jax.random.split(key, 3)
            self.layers = eqx.nn.Sequential([
                ConvNorm(4, 8, 3, padding=1, image_size=(6, 6), key=a),
                eqx.nn.Lambda(jax.nn.relu),
                ConvNormTranspose(8, 8, 2, 2, image_size=(6, 6), key=b),
            ])  # fmt: skip
            self.head = eqx.nn.Linear(8, 2, key=c)

        def __call__(self, x, state):
            x, state = self.layers(x, state)
            return self.head(x.mean((1, 2))), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    x, labels = images(0, batch=16), jnp.arange(16) % 2
    tx = optax.sgd(0.3)
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, opt_state):
        def loss_of(model, state):
            logits, state = over_batch(model, x, state)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

        (loss, state), gradients = eqx.filter_value_and_grad(loss_of, has_aux=True)(model, state)
        updates, opt_state = tx.update(gradients, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state, loss

    losses = []
    for _ in range(40):
        model, state, opt_state, loss = step(model, state, opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    trained = eqx.nn.inference_mode(model)
    logits, after = over_batch(trained, x, state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    one = jnp.stack([trained(example, state)[0] for example in x])  # without the axis, too
    np.testing.assert_allclose(logits, one, atol=1e-5)
    with pytest.raises(UserError, match=r"outside of the axis 'batch': call the model as jax.vmap"):
        model(x[0], state)


def test_saved_and_loaded(tmp_path):
    layer, state = make(4, 8, 3, image_size=(6, 6))
    _, state = over_batch(layer, images(0), state)
    eqx.tree_serialise_leaves(tmp_path / 'layer.eqx', (layer, state))
    same = eqx.tree_deserialise_leaves(tmp_path / 'layer.eqx', make(4, 8, 3, image_size=(6, 6), seed=1))
    assert eqx.tree_equal(same, (layer, state))


@pytest.mark.slow
def test_layers_stacked_and_scanned():
    keys = jax.random.split(jax.random.key(0), 3)
    build = lambda key: eqx.nn.make_with_state(ConvNorm)(4, 4, 3, padding=1, image_size=(6, 6), key=key)
    layers, states = eqx.filter_vmap(build)(keys)
    arrays, static = eqx.partition(layers, eqx.is_array)

    def through(x, given):
        arrays, state = given
        y, state = over_batch(eqx.combine(arrays, static), x, state)
        return jax.nn.relu(y), state

    y, after = jax.jit(lambda x: jax.lax.scan(through, x, (arrays, states)))(images(0))
    expected = images(0)
    for key in keys:
        layer, state = build(key)
        expected, state = over_batch(layer, expected, state)
        expected = jax.nn.relu(expected)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    assert after.get(layers.state_index)['count'].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_gradients_of_single_examples_within_the_axis():
    """As `jax.vmap(jax.grad(...))` has them; in training they pass through the statistics to the whole batch."""
    layer, state = make(4, 8, 3, image_size=(6, 6))
    x, inference = images(0), eqx.nn.inference_mode(layer)
    of_one = lambda layer: lambda x: jnp.sin(layer(x, jax.tree.map(lambda a: a, state))[0]).sum()
    expected = jnp.stack([jax.grad(of_one(inference))(example) for example in x])
    np.testing.assert_allclose(jax.vmap(jax.grad(of_one(inference)), axis_name='batch')(x), expected, atol=1e-5)
    all_of_it = jax.grad(lambda x: jnp.sin(over_batch(layer, x, jax.tree.map(lambda a: a, state))[0]).sum())(x)
    np.testing.assert_allclose(jax.vmap(jax.grad(of_one(layer)), axis_name='batch')(x), all_of_it, atol=1e-4)


def test_no_gather_and_no_copy_for_the_axis():
    layer, state = make(4, 8, 3, image_size=(6, 6))
    text = str(jax.make_jaxpr(lambda x: over_batch(layer, x, jax.tree.map(lambda a: a, state))[0])(images(0)))
    assert 'whole_batch' not in text and 'own_example' not in text and 'all_gather' not in text


def test_exact_needs_no_size():
    layer, state = make(4, 8, 3, padding=1, spectrum='exact')
    for size in ((6, 6), (7, 9)):
        y, state = over_batch(layer, images(0, size), state)
        assert y.shape == (8, 8, *size)
    assert set(state.get(layer.state_index)) == {'mean', 'var'}
    trained = eqx.nn.inference_mode(layer)
    assert np.isfinite(over_batch(trained, images(1, (5, 6)), state)[0]).all()


def test_a_transposed_one_has_equinoxs_shape():
    layer, state = make(4, 8, 4, 2, padding=1, image_size=(6, 5), kind=ConvNormTranspose)
    y, state = over_batch(layer, images(0, (6, 5)), state)
    assert y.shape == (8, 8, 12, 10) and state.get(layer.state_index)['preconditioner'].shape == (14, 12, 8)
    plain = eqx.nn.ConvTranspose2d(4, 8, 4, 2, padding=1, key=jax.random.key(0))
    assert jax.vmap(plain)(images(0, (6, 5))).shape == y.shape


def test_refused():
    layer, state = make(4, 8, 3, image_size=(6, 6))
    with pytest.raises(UserError, match=r'expected one example, \[4, \*spatial\].*batches go through jax.vmap'):
        layer(images(0), state)
    with pytest.raises(UserError, match='expected one example'):
        over_batch(layer, images(0, channels=3), state)
    with pytest.raises(UserError, match='running spectrum is of 6x6 images, got 7x6'):
        over_batch(layer, images(0, (7, 6)), state)
    with pytest.raises(UserError, match="image_size=None with spectrum='running'"):
        make(4, 8, 3)
    with pytest.raises(UserError, match='feature_group_count=3'):
        make(4, 8, 3, groups=3, image_size=(6, 6))


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'equinox', None)
    for name in [name for name in sys.modules if name.startswith('convnorm_jax.equinox')]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"needs Equinox: pip install 'convnorm_jax\[equinox\]'"):
        importlib.import_module('convnorm_jax.equinox')
