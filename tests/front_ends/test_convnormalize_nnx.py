"""`convnormalize` of NNX models: whole nets, what is left, and the user's mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from convnorm_jax.errors import UserError
from convnorm_jax.nnx import ConvNorm, ConvNormTranspose, convnormalize
from tests.front_ends.nets_nnx import NETS, ConvNeXt, Decoder, MobileNet, PreActivation, ResNet
from tests.front_ends.reports import ALONE, left, pairs
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')

SPEC = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)


def images(seed=0, shape=SPEC.shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def at(model, path):
    for name in path.split('/'):
        model = (
            model[int(name)]
            if name.isdigit() and not isinstance(model, dict)
            else (model[name] if isinstance(model, dict) else getattr(model, name))
        )
    return model


def arrays(model):
    return jax.tree.map(jnp.copy, nnx.state(model))


def convert(model, given=SPEC, **options):
    return convnormalize(model, given, rngs=nnx.Rngs(1), **options)


@functools.lru_cache
def converted(net):
    model = net(nnx.Rngs(0))
    return model, arrays(model), *convert(model)


@pytest.mark.slow
@pytest.mark.parametrize('net', NETS)
def test_what_is_replaced(net):
    model, before, new, report = converted(net)
    expected, others = NETS[net]
    assert pairs(report) == expected and left(report) == others
    for entry in report.replaced:
        old, layer = at(model, entry.path), at(new, entry.place)
        assert type(layer).__name__.endswith(entry.layer) and isinstance(layer, (ConvNorm, ConvNormTranspose))
        kernel = old.kernel[...]
        if entry.layer == 'ConvNormTranspose':
            kernel = kernel[::-1, ::-1]
        np.testing.assert_array_equal(layer.kernel[...], kernel)
        if old.bias is not None:
            np.testing.assert_array_equal(layer.affine_bias[...], old.bias[...])
        assert f'{entry.path}' in str(report) and entry.details in str(report)
    for path in others:
        assert type(at(new, path)) is type(at(model, path))
    jax.tree.map(np.testing.assert_array_equal, arrays(model), before)  # the given model is as it was
    assert not any(isinstance(node, (ConvNorm, ConvNormTranspose)) for _, node in nnx.iter_graph(model))


@pytest.mark.slow
@pytest.mark.parametrize('net', few(NETS, ResNet))
def test_it_trains(net):
    model = nnx.clone(converted(net)[2])
    x, labels = images(1), jnp.arange(8) % 3
    rate = 1.0 if net is Decoder else 0.05  # its logits are means over an image
    optimizer = nnx.Optimizer(model, optax.sgd(rate, 0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss_of = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()
        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    model.train()
    losses = [float(step(model, optimizer)) for _ in range(12)]
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]
    model.eval()
    before = arrays(model)
    arguments = {MobileNet: {'train': False}, Decoder: {'frozen': True}}  # where an argument decides
    y = model(x, **arguments.get(net, {}))
    assert y.shape == (8, 3) and np.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, arrays(model), before)
    counts = [v[...] for path, v in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)) if path[-1] == 'count']
    assert len(counts) == sum(norm is not None for norm in NETS[net][0].values())
    assert all(count == 12 for count in counts)


class ResNetByHand(nnx.Module):
    """`ResNet` with ConvNorm, written by hand."""

    def __init__(self, rngs):
        make = functools.partial(ConvNorm, kernel_size=(3, 3), rngs=rngs)
        self.stem = make(3, 4, image_size=(8, 8), batch_norm_momentum=0.99)
        first = {'padding': 1, 'image_size': (8, 8), 'batch_norm_momentum': 0.8, 'batch_norm_epsilon': 1e-3}
        self.a1, self.a2 = make(4, 4, **first), make(4, 4, image_size=(8, 8), batch_norm_momentum=0.99)
        self.b1, self.b2 = make(4, 8, strides=2, **first), make(8, 8, image_size=(4, 4), batch_norm_momentum=0.99)
        self.shortcut = ConvNorm(4, 8, (1, 1), 2, image_size=(8, 8), batch_norm_momentum=0.99, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = nnx.relu(self.a2(nnx.relu(self.a1(x))) + x)
        x = nnx.relu(self.b2(nnx.relu(self.b1(x))) + self.shortcut(x))
        return self.head(x.mean((1, 2)))


def test_the_numbers_of_a_net_by_hand():
    new, hand = nnx.clone(converted(ResNet)[2]), ResNetByHand(nnx.Rngs(5))
    first, second = new.blocks
    places = {
        'stem': new.norm,
        'a1': first.bn1,
        'a2': first.bn2,
        'b1': second.bn1,
        'b2': second.bn2,
        'shortcut': second.shortcut.layers[1],
        'head': new.head,
    }
    for name, layer in places.items():
        params, statistics = (jax.tree.map(jnp.copy, nnx.state(layer, kind)) for kind in (nnx.Param, nnx.BatchStat))
        fresh = nnx.state(getattr(hand, name), nnx.BatchStat)
        if 'mean' in statistics:  # the running mean and variance start again
            for part in ('mean', 'var', 'count'):
                np.testing.assert_array_equal(statistics[part][...], fresh[part][...])
        nnx.update(getattr(hand, name), params, statistics)
    run = nnx.jit(lambda model, x: model(x))
    for seed in range(3):
        np.testing.assert_array_equal(run(new, images(seed)), run(hand, images(seed)))
    new.eval(), hand.eval()
    np.testing.assert_array_equal(run(new, images(9)), run(hand, images(9)))


def test_the_spectrum_starts_from_the_kernel():
    layer = converted(ResNet)[2].norm
    expected = ConvNorm(3, 4, (3, 3), rngs=nnx.Rngs(0))
    expected.kernel[...] = layer.kernel[...]
    expected._make_state((8, 8), 1)
    np.testing.assert_array_equal(layer.preconditioner[...], expected.preconditioner[...])


def test_scale_bias_and_epsilon_carry_over():
    model = ResNet(nnx.Rngs(0))
    norm = model.blocks[0].bn1
    norm.scale[...], norm.bias[...] = jnp.arange(4.0), -jnp.arange(4.0)
    norm.mean[...] += 3
    layer = convert(model)[0].blocks[0].bn1
    np.testing.assert_array_equal(layer.scale[...], jnp.arange(4.0))
    np.testing.assert_array_equal(layer.bias[...], -jnp.arange(4.0))
    np.testing.assert_array_equal(layer.mean[...], jnp.zeros(4))
    assert layer.settings.batch_norm_momentum == 0.8 and layer.settings.batch_norm_epsilon == 1e-3


class Odd(nnx.Module):
    """Convolutions of every kind that is left, each with a reason."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, 3, 3, (3, 3), rngs=rngs)
        self.reflect = conv(padding='REFLECT')
        self.spread = conv(input_dilation=2, padding=1)
        self.masked = conv(mask=jnp.ones((3, 3, 3, 3)))
        self.wide = conv(padding=3)
        self.own = OwnCall(3, 3, (3, 3), rngs=rngs)
        self.tied1, self.tied2 = conv(), conv()
        self.tied2.kernel = self.tied1.kernel
        self.spectral = nnx.SpectralNorm(conv(), rngs=rngs)
        self.causal = nnx.Conv(3, 3, (3,), padding='CAUSAL', rngs=rngs)
        self.one_sided = nnx.Conv(3, 3, (3,), padding=((2, 0),), rngs=rngs)
        self.never = conv()
        self.grown = nnx.ConvTranspose(3, 3, (2, 2), strides=(3, 3), padding='VALID', rngs=rngs)
        self.around = nnx.ConvTranspose(3, 3, (3, 3), padding='CIRCULAR', rngs=rngs)
        self.good = conv()
        self.masked_norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        y = self.reflect(x) + self.spread(x).mean() + self.masked(x) + self.wide(x).mean() + self.own(x)
        y += self.tied1(x) + self.tied2(x) + self.spectral(x, update_stats=False) + self.grown(x).mean()
        y += self.causal(x[:, 0]).mean() + self.one_sided(x[:, 0]).mean() + self.around(x)
        return self.masked_norm(self.good(y), mask=jnp.ones(y.shape, bool))


class OwnCall(nnx.Conv):
    def __call__(self, x):
        return super().__call__(x) + 1


@pytest.mark.slow
def test_every_reason():
    new, report = convert(Odd(nnx.Rngs(0)))
    found = left(report)
    expected = {
        'reflect': "padding='REFLECT'",
        'spread': 'input_dilation=2',
        'masked': 'a mask on its kernel',
        'wide': 'expected between 0 and kernel_size - 1',
        'own': 'a class with its own __call__',
        'tied1': 'it shares its kernel',
        'tied2': 'it shares its kernel',
        'spectral/layer_instance': 'SpectralNorm around it',
        'causal': 'sees the whole sequence',
        'one_sided': 'sees the whole sequence',
        'never': 'does not reach it',
        'grown': 'beyond the full transposed convolution',
        'around': "padding='CIRCULAR' of a transposed convolution",
        'masked_norm': 'it is called with a mask',
    }
    assert set(found) == set(expected)
    for path, reason in expected.items():
        assert reason in found[path], path
        assert f'{path} ' in str(report)
    assert pairs(report) == {'good': None}
    assert np.isfinite(new(images())).all()


class Repeated(nnx.Module):
    """One convolution and one norm called twice, a loop, a batch axis more, a cast, a remat and a jit on the way."""

    def __init__(self, rngs):
        self.twice, self.twice_norm = nnx.Conv(3, 3, (3, 3), rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.looped = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.inner, self.inner_norm = nnx.Conv(3, 3, (3, 3), rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.cast, self.cast_norm = nnx.Conv(3, 3, (3, 3), rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.alias = self.cast
        self.mapped = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.many, self.many_norm = nnx.Conv(3, 3, (3, 3), rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        x = self.twice_norm(self.twice(x)) + self.twice_norm(self.twice(x[:, :4, :4])).mean()
        for _ in range(1):
            x = jax.lax.scan(lambda x, _: (self.looped(x), None), x, None, length=3)[0]
        y = nnx.jit(lambda conv, x: conv(x))(self.inner, x)
        x = nnx.remat(lambda norm, y: norm(y))(self.inner_norm, y)
        x = self.cast_norm(self.cast(x).astype(jnp.float16).astype(jnp.float32))
        x = jax.vmap(self.mapped)(x)
        return self.many_norm(self.many(jnp.stack([x, -x]))).sum(0)


@pytest.mark.slow
@pytest.mark.parametrize('graph', [True, False])
def test_calls_of_every_kind(graph):
    model = Repeated(nnx.Rngs(0))
    if not graph:
        del model.alias  # a tree has no shared layers
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        new, report = convert(model)
        y = new(images())
    expected = {'twice': None, 'looped': None, 'inner': 'inner_norm', 'cast': 'cast_norm', 'mapped': None, 'many': None}
    assert pairs(report) == expected
    found = left(report)
    assert found.pop('twice_norm') == 'it is called more than once'
    assert 'takes one batch axis' in found.pop('many_norm') and not found
    assert y.shape == SPEC.shape and np.isfinite(y).all()
    if graph:
        assert new.alias is new.cast


class Stacked(nnx.Module):
    def __init__(self, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(key))

        self.layers = make(jax.random.split(rngs.params(), 2))
        self.last = nnx.Conv(3, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        scan = nnx.scan(lambda layer, x: nnx.relu(layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.last(scan(self.layers, x))


def test_stacked_layers_are_left():
    new, report = convert(Stacked(nnx.Rngs(0)))
    assert 'layers stacked by a transformation' in left(report)['layers'] and pairs(report) == {'last': None}
    assert np.isfinite(new(images())).all()


def test_a_path_or_a_function_chooses():
    model = ResNet(nnx.Rngs(0))
    report = convert(model, where=r'conv\d$')[1]
    assert set(pairs(report)) == {f'blocks/{i}/conv{j}' for i in (0, 1) for j in (1, 2)}
    assert left(report)['stem'] == 'not chosen by `where`' and left(report)['norm'] == 'its convolution stem is left'
    assert pairs(convert(model, where=lambda path: path == 'stem')[1]) == {'stem': 'norm'}


def test_options():
    model = PreActivation(nnx.Rngs(0))
    new, report = convert(model, spectrum='running', use_affine=False, momentum=0.9)
    assert '3x3, 3 -> 8, no BatchNorm, without the bias of the convolution' in str(report)
    for layer in (new.stem, new.bn2):
        assert layer.settings.momentum == 0.9 and not layer.settings.use_affine
        assert layer.preconditioner[...].shape == (10, 10, 8)
    new(images())
    assert new.stem.count[...] == 1
    new, _ = convert(model)
    new(images())
    assert new.stem.settings.spectrum == 'exact' and new.bn2.settings.spectrum == 'running'
    assert new.stem.preconditioner is None and new.bn2.count[...] == 1


def test_other_norms():
    model = ConvNeXt(nnx.Rngs(0))
    model.norm.scale[...] = jnp.arange(8.0)
    new, report = convert(model, norms=(nnx.LayerNorm,))
    assert pairs(report) == {'stem': 'stem_norm', 'depthwise': 'norm'} and not report.left
    np.testing.assert_array_equal(new.norm.scale[...], jnp.arange(8.0))
    assert new.norm.settings.use_batch_norm and new.norm.settings.batch_norm_epsilon == 1e-6
    new.eval()
    assert np.isfinite(new(images())).all()
    new.train()
    new(images())
    assert new.norm.count[...] == 1


def test_dtypes():
    model = nnx.Sequential(
        nnx.Conv(3, 8, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        nnx.Conv(8, 3, (3, 3), param_dtype=jnp.float16, rngs=nnx.Rngs(0)),
    )
    new, _ = convert(model)
    first, second = new.layers
    assert first(images()).dtype == jnp.bfloat16 and first.kernel.dtype == jnp.float32
    assert second.kernel.dtype == second.affine_bias.dtype == jnp.float16


def test_the_variable_of_the_kernel():
    class Weight(nnx.Param):
        pass

    for conv in (nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.ConvTranspose(3, 4, (3, 3), rngs=nnx.Rngs(0))):
        conv.kernel = Weight(conv.kernel[...], note='mine')
        new, _ = convert(conv)
        assert type(new.kernel) is Weight and new.kernel.get_metadata()['note'] == 'mine'
        assert new.kernel is not conv.kernel


def test_the_call():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.drop = nnx.Conv(3, 3, (3, 3), rngs=rngs), nnx.Dropout(0.5)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, batch, rngs):
            return self.norm(self.drop(self.conv(batch['image']), rngs=rngs))

    call = lambda model, batch: {'y': model(batch, nnx.Rngs(0))}
    new, report = convert(Net(nnx.Rngs(0)), {'image': SPEC}, call=call)
    assert pairs(report) == {'conv': None} and left(report) == {'norm': ALONE}
    new({'image': images()}, nnx.Rngs(1))


def test_a_model_that_is_a_convolution():
    new, report = convert(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    assert isinstance(new, ConvNorm) and pairs(report) == {'': None}
    assert new(images()[0]).shape == (8, 8, 4)  # without a batch, as a convolution
    again, report = convert(nnx.Sequential(new, nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))))
    assert pairs(report) == {'layers/1': None} and again.layers[0].kernel[...].shape == (3, 3, 3, 4)


class LooksAtTheShape(nnx.Module):
    def __init__(self, rngs, strides):
        self.conv = nnx.Conv(3, 3, (3, 3), strides=strides, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        y = self.conv(x)
        return self.norm(y).reshape(y.shape[0], y.shape[1] * y.shape[2], 3)


def test_mistakes():
    with pytest.raises(UserError, match='the model has no convolution'):
        convert(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    model = ResNet(nnx.Rngs(0))
    with pytest.raises(UserError, match=r"where='bottleneck'\): it matches none of the convolutions stem, blocks/0"):
        convert(model, where='bottleneck')
    with pytest.raises(UserError, match=r"where='conv\('\): no regular expression"):
        convert(model, where='conv(')
    with pytest.raises(UserError, match=r'kernel_size=...\): expected options of ConvNorm: use_affine'):
        convert(model, kernel_size=5)
    with pytest.raises(UserError, match='momentum=2'):
        convert(model, momentum=2)
    with pytest.raises(Exception, match='shape') as error:  # flax's own
        convert(model, jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert not isinstance(error.value, UserError)
    assert pairs(convert(LooksAtTheShape(nnx.Rngs(0), 1))[1]) == {'conv': 'norm'}
    with pytest.raises(UserError, match='depends on the shape of an array between a convolution and its normalization'):
        convert(LooksAtTheShape(nnx.Rngs(0), 2))
