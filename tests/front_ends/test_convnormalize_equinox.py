"""`convnormalize` of Equinox models: whole nets, what is left, and the user's mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnorm_jax.errors import UserError

eqx = pytest.importorskip('equinox')
from convnorm_jax.equinox import ConvNorm, ConvNormTranspose, convnormalize  # noqa: E402
from tests.front_ends import nets_equinox as nets  # noqa: E402
from tests.front_ends.reports import ALONE, left, pairs  # noqa: E402
from tests.selection import few  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compilation')

SPEC = jax.ShapeDtypeStruct((8, 3, 8, 8), jnp.float32)
KEY = jax.random.key(0)


def images(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(SPEC.shape), jnp.float32)


def at(model, path):
    for name in path.split('/'):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def build(net):
    if net is nets.ConvNeXt:
        return net(KEY), None
    return eqx.nn.make_with_state(net)(KEY)


def run(model, state, x):
    if state is None:
        return jax.vmap(model)(x), None
    return jax.vmap(model, axis_name='batch', in_axes=(0, None), out_axes=(0, None))(x, state)


def copied(state):
    """A state that may be used once more."""
    return jax.tree.unflatten(*reversed(jax.tree.flatten(state)))


def convert(model, state=None, given=SPEC, **options):
    return convnormalize(model, state, given, key=jax.random.key(1), **options)


@functools.lru_cache
def converted(net):
    model, state = build(net)
    return model, state, *convert(model, state)


@pytest.mark.slow
@pytest.mark.parametrize('net', nets.NETS)
def test_what_is_replaced(net):
    model, state, new, new_state, report = converted(net)
    expected, others = nets.NETS[net]
    assert pairs(report) == expected and left(report) == others
    for entry in report.replaced:
        old, layer = at(model, entry.path), at(new, entry.place)
        kernel = np.moveaxis(np.asarray(old.weight), (0, 1), (-1, -2))
        params = layer.params
        np.testing.assert_array_equal(params['kernel'], kernel[::-1, ::-1] if 'Transpose' in entry.layer else kernel)
        if old.bias is not None:
            np.testing.assert_array_equal(params['affine_bias'], old.bias[:, 0, 0])
        assert entry.details in str(report)
        if entry.norm is not None:
            assert isinstance(layer, (ConvNorm, ConvNormTranspose)) and isinstance(layer, eqx.nn.BatchNorm)
            assert new_state.get(layer.state_index)['count'] == 0
    for path in others:
        assert type(at(new, path)) is type(at(model, path))
    # The given model and its state are as they were.
    fresh = build(net)
    assert eqx.tree_equal(eqx.filter((model, state), eqx.is_array), eqx.filter(fresh, eqx.is_array))
    assert np.isfinite(jax.jit(lambda x: run(model, copied(state), x)[0])(images())).all()


@pytest.mark.slow
@pytest.mark.parametrize('net', few(nets.NETS, nets.ResNet))
def test_it_trains(net):
    model, state = converted(net)[2:4]
    x, labels = images(1), jnp.arange(8) % 3
    tx = optax.sgd(1.0 if net is nets.Decoder else 0.1, 0.9)
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, opt_state):
        def loss_of(model):
            y, after = run(model, state, x)
            return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean(), after

        (loss, state_after), gradients = eqx.filter_value_and_grad(loss_of, has_aux=True)(model)
        updates, opt_state = tx.update(gradients, opt_state)
        return eqx.apply_updates(model, updates), state_after, opt_state, loss

    state, losses = copied(state), []
    for _ in range(12):
        model, state, opt_state, loss = step(model, state, opt_state)
        losses.append(float(loss))
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]
    if state is not None:
        for path, norm in nets.NETS[net][0].items():
            if norm is not None:
                assert state.get(at(model, norm).state_index)['count'] == 12, path
    y, after = eqx.filter_jit(run)(eqx.nn.inference_mode(model), copied(state), x)
    assert y.shape == (8, 3) and np.isfinite(y).all()
    assert eqx.tree_equal(after, state)  # inference changes nothing


class ByHand(eqx.Module):
    """The ResNet with ConvNorm, written by hand."""

    layers: dict
    head: eqx.nn.Linear

    def __init__(self, key):
        make = functools.partial(ConvNorm, padding=1, key=key, batch_norm_momentum=0.99)
        first = {'batch_norm_momentum': 0.8, 'batch_norm_epsilon': 1e-3}
        big, small = {'image_size': (8, 8)}, {'image_size': (4, 4)}
        self.layers = {
            'stem': make(3, 4, 3, **big),
            'a1': make(4, 4, 3, **big, **first),
            'a2': make(4, 4, 3, **big),
            'b1': make(4, 8, 3, 2, **big, **first),
            'b2': make(8, 8, 3, **small),
            'shortcut': ConvNorm(4, 8, 1, 2, **big, batch_norm_momentum=0.99, key=key),
        }
        self.head = eqx.nn.Linear(8, 3, key=key)

    def __call__(self, x, state):
        def layer(name, x):
            nonlocal state
            y, state = self.layers[name](x, state)
            return y

        relu = jax.nn.relu
        x = relu(layer('stem', x))
        x = relu(layer('a2', relu(layer('a1', x))) + x)
        x = relu(layer('b2', relu(layer('b1', x))) + layer('shortcut', x))
        return self.head(x.mean((1, 2))), state


@pytest.mark.slow
def test_the_numbers_of_a_net_by_hand():
    model, state = converted(nets.ResNet)[2:4]
    state = copied(state)
    hand, hand_state = eqx.nn.make_with_state(ByHand)(KEY)
    first, second = model.blocks
    places = {
        'stem': model.norm,
        'a1': first.bn1,
        'a2': first.bn2,
        'b1': second.bn1,
        'b2': second.bn2,
        'shortcut': second.shortcut.layers[1],
    }
    for name, layer in places.items():
        entry, fresh = state.get(layer.state_index), hand_state.get(hand.layers[name].state_index)
        for part in ('mean', 'var', 'count'):
            np.testing.assert_array_equal(entry[part], fresh[part])
        hand_state = hand_state.set(hand.layers[name].state_index, entry)
        for part, value in layer.params.items():
            where = lambda hand, name=name, part=part: getattr(hand.layers[name], part)
            hand = eqx.tree_at(where, hand, value)
    hand = eqx.tree_at(lambda hand: hand.head, hand, model.head)
    call = eqx.filter_jit(run)
    for seed in range(3):
        y, state = call(model, state, images(seed))
        expected, hand_state = call(hand, hand_state, images(seed))
        np.testing.assert_allclose(y, expected, atol=1e-6)
    y, _ = call(eqx.nn.inference_mode(model), state, images(9))
    expected, _ = call(eqx.nn.inference_mode(hand), hand_state, images(9))
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_saved_and_loaded(tmp_path):
    """The names of the state's entries do not depend on the process."""
    model, state = converted(nets.ResNet)[2:4]
    eqx.tree_serialise_leaves(tmp_path / 'net', (model, copied(state)))
    again, again_state, _ = convnormalize(*build(nets.ResNet), SPEC, key=jax.random.key(7))
    again, again_state = eqx.tree_deserialise_leaves(tmp_path / 'net', (again, again_state))
    assert eqx.tree_equal((again, again_state), (model, state))
    y, expected = (eqx.filter_jit(run)(*each, images())[0] for each in ((again, again_state), (model, copied(state))))
    np.testing.assert_array_equal(y, expected)


def test_scale_bias_epsilon_and_inference_carry_over():
    model, state = build(nets.ResNet)
    where = lambda model: [model.norm.weight, model.norm.bias]
    model = eqx.nn.inference_mode(eqx.tree_at(where, model, [jnp.arange(4.0), -jnp.arange(4.0)]))
    layer = convert(model, state)[0].norm
    np.testing.assert_array_equal(layer.scale, jnp.arange(4.0))
    np.testing.assert_array_equal(layer.bias, -jnp.arange(4.0))
    assert layer.inference and layer.axis_name == 'batch' and layer.settings.batch_norm_momentum == 0.99


class Odd(eqx.Module):
    """Convolutions and norms that are left, each with a reason, and some that are called in odd ways."""

    own: eqx.nn.Conv2d
    spectral: eqx.nn.WeightNorm
    never: eqx.nn.Conv2d
    causal: eqx.nn.Conv1d
    stacked: eqx.nn.Conv2d
    shared: eqx.nn.Shared
    twice: eqx.nn.Conv2d
    alone: eqx.nn.BatchNorm
    two_axes: eqx.nn.BatchNorm
    before: eqx.nn.Conv2d

    def __init__(self, key):
        make = lambda cin=3: eqx.nn.Conv2d(cin, 3, 3, padding=1, key=key)
        self.own = OwnCall(3, 3, 3, padding=1, key=key)
        self.spectral = eqx.nn.WeightNorm(make())
        self.never, self.twice, self.before = make(), make(), make()
        self.causal = eqx.nn.Conv1d(3, 3, 3, padding=((2, 0),), key=key)
        self.stacked = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(3, 3, 3, padding=1, key=key))(jax.random.split(key))
        self.shared = eqx.nn.Shared((make(), make()), lambda pair: pair[1].weight, lambda pair: pair[0].weight)
        self.alone = nets.norm(3)
        self.two_axes = eqx.nn.BatchNorm(3, axis_name=('batch',), mode='batch')

    def __call__(self, x, state):
        x = self.own(x) + self.spectral(x) + self.twice(self.twice(x))
        x += self.causal(x[:, 0])[:, None]
        first, second = self.shared()
        x = first(x) + second(x)
        arrays, static = eqx.partition(self.stacked, eqx.is_array)
        x = jax.lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), x, arrays)[0]
        x, state = self.alone(jax.nn.relu(x), state)
        return self.two_axes(eqx.filter_checkpoint(self.before)(x), state)


class OwnCall(eqx.nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) + 1


def test_every_reason():
    model, state = eqx.nn.make_with_state(Odd)(KEY)
    report = convert(model, state)[2]
    expected = {
        'own': 'a class with its own __call__',
        'spectral/layer': 'WeightNorm around it',
        'never': 'does not reach it',
        'causal': 'sees the whole sequence',
        'stacked': 'layers stacked by a transformation',
        'shared/pytree/0': 'Shared around it',
        'shared/pytree/1': 'Shared around it',
        'alone': ALONE,
        'two_axes': "axis_name=('batch',)",
    }
    found = left(report)
    assert set(found) == set(expected)
    for path, reason in expected.items():
        assert reason in found[path], path
    assert pairs(report) == {'twice': None, 'before': None}


def test_layer_norms():
    model, _ = build(nets.ConvNeXt)
    where = lambda model: [model.norm.weight, model.norm.bias]
    model = eqx.tree_at(where, model, [2 * jnp.ones(8), jnp.arange(8.0)])
    new, state, report = convert(model, norms=(eqx.nn.LayerNorm,))
    assert state is None and pairs(report) == {'stem': 'stem_norm', 'depthwise': 'norm'} and not report.left
    expected = model.depthwise.bias[:, 0, 0] * 2 + jnp.arange(8)
    np.testing.assert_array_equal(new.depthwise.params['affine_bias'], expected)
    plain = convert(model)[0].depthwise.params['affine_kernel']
    np.testing.assert_array_equal(new.depthwise.params['affine_kernel'], 2 * plain)
    assert np.isfinite(jax.jit(jax.vmap(new))(images())).all()


def test_options_and_choice():
    model, state = build(nets.PreActivation)
    new, _, report = convert(model, state, where='convs', momentum=0.9, use_affine=False)
    assert left(report)['stem'] == 'not chosen by `where`' and set(pairs(report)) == {'convs/0', 'convs/1'}
    for layer in (new.norms[1], new.convs[1]):
        assert layer.settings.momentum == 0.9 and set(layer.params) == {'kernel'}


def test_mistakes():
    model, state = build(nets.ResNet)
    with pytest.raises(UserError, match='the model has no convolution'):
        convert(eqx.nn.Linear(3, 3, key=KEY))
    with pytest.raises(UserError, match=r"where='bottleneck'\): it matches none of the convolutions stem"):
        convert(model, state, where='bottleneck')
    with pytest.raises(UserError, match=r'dtype=...\): expected options of ConvNorm: use_affine'):
        convert(model, state, dtype=jnp.float16)
    with pytest.raises(UserError, match='momentum=2'):
        convert(model, state, momentum=2)
    with pytest.raises(ValueError, match='rank 3') as error:  # Equinox's own
        convert(model, state, jax.ShapeDtypeStruct((8, 3, 8), jnp.float32))
    assert not isinstance(error.value, UserError)
