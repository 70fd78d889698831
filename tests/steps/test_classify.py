"""The training step and the evaluation step on a tiny net."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from convnorm_jax.data.augment import augment, normalize, to_float
from convnorm_jax.data.sources import load_source
from convnorm_jax.models import create_model
from convnorm_jax.steps import classify
from convnorm_jax.steps.state import create_state, make_optimizer

MEAN, STD = (0.3,), (0.4,)
SHAPE, CLASSES = (8, 8, 1), 10

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def batch():
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (16, *SHAPE), np.uint8)
    return {'images': jnp.asarray(images), 'labels': jnp.asarray(random.integers(0, CLASSES, 16), jnp.int32)}


def net(layer='convnorm', **options):
    return create_model('simple_cnn', num_classes=CLASSES, layer=layer, width=4, depth=(1,), **options)


def make(model, *, kind='crop', tx=None, **options):
    """(train_step, fresh state)."""
    tx = tx or make_optimizer('sgd', 0.1, weight_decay=1e-4)
    step = classify.make_train_step(
        model, tx, mean=MEAN, std=STD, augment_fn=functools.partial(augment, kind=kind, padding=1), **options
    )
    return step, create_state(model, tx, SHAPE, 0, use_ema=options.get('ema_decay', 0) > 0)


def close(actual, expected, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), actual, expected)


@pytest.fixture(scope='module')
def convnorm(batch):
    """(jitted step, state before, state after, metrics)."""
    step, state = make(net())
    step = jax.jit(step)
    return step, state, *step(state, batch)


@pytest.mark.slow
def test_jitted_equals_eager(convnorm, batch):
    _, state, after, metrics = convnorm
    eager_state, eager_metrics = make(net())[0](state, batch)
    close(after.params, eager_state.params)
    close(after.model_state, eager_state.model_state)
    close(metrics, eager_metrics)
    assert int(after.step) == int(eager_state.step) == 1


def test_metrics_are_sums_and_counts(convnorm, batch):
    _, state, _, metrics = convnorm
    key = jax.random.fold_in(state.rng, 0)
    images = normalize(to_float(augment(key, batch['images'], 'crop', 1)), MEAN, STD)
    apply = jax.jit(lambda variables, images: net().apply(variables, images, train=True, mutable=['batch_stats']))
    logits, _ = apply({'params': state.params, **state.model_state}, images)
    logits, labels = np.asarray(logits, np.float64), np.asarray(batch['labels'])
    losses = scipy.special.logsumexp(logits, axis=-1) - logits[np.arange(16), labels]
    assert set(metrics) == {'loss', 'accuracy', 'gradient_norm'}
    np.testing.assert_allclose(metrics['loss'], (losses.sum(), 16), rtol=1e-5)
    np.testing.assert_allclose(metrics['accuracy'], ((logits.argmax(-1) == labels).sum(), 16))
    assert metrics['gradient_norm'][1] == 1
    assert all(np.asarray(v).dtype == np.float32 for pair in metrics.values() for v in pair)


def test_the_state_moves_on_but_its_key_stays(convnorm):
    _, state, after, _ = convnorm
    np.testing.assert_array_equal(state.rng, after.rng)
    stats = after.model_state['batch_stats']['conv1_1']
    assert float(stats['count']) == 1
    assert not np.array_equal(
        stats['batch_norm']['mean'], state.model_state['batch_stats']['conv1_1']['batch_norm']['mean']
    )


def test_randomness_is_a_function_of_key_and_step(convnorm, batch):
    step, state, after, metrics = convnorm
    again, metrics_again = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, (after, metrics), (again, metrics_again))
    for other in (state.replace(step=state.step + 1), state.replace(rng=jax.random.PRNGKey(9))):
        assert float(step(other, batch)[1]['loss'][0]) != float(metrics['loss'][0])


@pytest.mark.parametrize('layer', ['batchnorm', 'none'])
def test_gradient_equals_finite_differences(layer, batch):
    # Not ConvNorm: its preconditioner is a constant to differentiation, as published.
    # Learning rate 1 without momentum and decay: the update is the gradient.
    step, state = make(net(layer), kind='none', tx=make_optimizer('sgd', 1.0, momentum=0.0))
    step = jax.jit(step)
    after, metrics = step(state, batch)
    gradient = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), state.params, after.params)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics['gradient_norm'][0], norm, rtol=1e-4)
    # Short steps where there are kinks (ReLU, max pool) behind the parameter, long ones where there are none.
    entries = ((('linear', 'kernel'), (7, 3), 1e-2), (('linear', 'bias'), (5,), 1e-2))
    for path, index, width in (*entries, (('conv1_1', 'conv', 'kernel'), (1, 1, 0, 2), 1e-3)):
        leaf = functools.partial(functools.reduce, lambda tree, key: tree[key], path)
        losses = []
        for sign in (1, -1):
            params = jax.tree.map(np.array, state.params)
            leaf(params)[index] += sign * width
            losses.append(float(step(state.replace(params=params), batch)[1]['loss'][0]) / 16)
        np.testing.assert_allclose(leaf(gradient)[index], (losses[0] - losses[1]) / (2 * width), rtol=0.02, atol=5e-4)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.6])
def test_label_smoothing(smoothing):
    random = np.random.default_rng(2)
    logits, labels = random.normal(size=(6, CLASSES)), random.integers(0, CLASSES, 6)
    targets = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
    expected = -(targets * (logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True))).sum(-1)
    found = classify.classification_loss(jnp.float32(logits), jnp.int32(labels), smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_label_smoothing_reaches_the_step(convnorm, batch):
    plain = float(convnorm[3]['loss'][0])
    step, state = make(net(), label_smoothing=0.3)
    assert abs(float(jax.jit(step)(state, batch)[1]['loss'][0]) - plain) > 1e-3


def test_moving_average(batch):
    step, state = make(net('batchnorm'), ema_decay=0.2)
    step, expected = jax.jit(step), jax.tree.map(np.float64, state.params)
    for keep in (0.1, 2 / 11, 0.2, 0.2):  # see `average`
        state, _ = step(state, batch)
        expected = jax.tree.map(lambda a, p, k=keep: k * a + (1 - k) * np.float64(p), expected, state.params)
    close(state.ema, expected, atol=1e-6)
    assert not np.allclose(state.ema['linear']['kernel'], state.params['linear']['kernel'], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('microbatches', [1, 2])
@pytest.mark.parametrize('layer', ['batchnorm', 'convnorm'])
def test_statistics_of_the_average_are_estimated_with_it(layer, microbatches, batch):
    model = net(layer)
    step, state = make(model, kind='none', ema_decay=0.9, microbatches=microbatches)
    images, step = normalize(to_float(batch['images']), MEAN, STD), jax.jit(step)
    for _ in range(3):
        before = state.ema_state
        state, _ = step(state, batch)
    apply = jax.jit(lambda variables, images: model.apply(variables, images, train=True, mutable=['batch_stats']))
    for part in range(microbatches):
        _, before = apply({'params': state.ema, **before}, images[part::microbatches])
    expected, found = before['batch_stats']['conv1_1'], state.ema_state['batch_stats']['conv1_1']
    name = 'norm' if layer == 'batchnorm' else 'batch_norm'
    close(found[name], expected[name])
    assert not np.allclose(found[name]['var'], state.model_state['batch_stats']['conv1_1'][name]['var'], rtol=1e-3)
    if layer == 'convnorm':
        kernel = np.asarray(state.ema['conv1_1']['kernel'], np.float64)
        power = np.square(np.abs(np.fft.fft2(kernel, found['preconditioner'].shape[:2], axes=(0, 1)))).sum(2)
        np.testing.assert_allclose(found['preconditioner'], power**-0.5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(('layer', 'decay'), [('batchnorm', 0.9), ('convnorm', 0.9999)])
def test_the_average_is_no_worse_than_the_raw_net(layer, decay):
    """On the digits, at a decay that suits the length and at one much too long for it."""
    source = load_source('digits')
    model = create_model('simple_cnn', num_classes=10, layer=layer, width=8)
    tx = make_optimizer('sgd', optax.cosine_decay_schedule(0.1, 60), weight_decay=1e-4)
    logits_fn = classify.make_logits_fn(model, source.mean, source.std)
    evaluate = jax.jit(classify.make_eval_step(logits_fn))
    test = {'images': source.test.images, 'labels': source.test.labels, 'mask': np.ones(len(source.test.labels))}
    options = {'mean': source.mean, 'std': source.std, 'augment_fn': lambda key, images: images}
    step = jax.jit(classify.make_train_step(model, tx, ema_decay=decay, **options), donate_argnums=0)
    state, random = create_state(model, tx, SHAPE, 0, use_ema=True), np.random.default_rng(0)
    for _ in range(60):
        rows = random.permutation(len(source.train.labels))[:64]
        state, _ = step(state, {'images': source.train.images[rows], 'labels': source.train.labels[rows]})
    raw, averaged = (
        {name: float(total) / float(count) for name, (total, count) in evaluate(variables, test).items()}
        for variables in ({'params': state.params, **state.model_state}, state.eval_variables)
    )
    assert raw['accuracy'] > 0.85
    assert averaged['accuracy'] > raw['accuracy'] - 0.02 and averaged['loss'] < raw['loss'] + 0.05


def test_statistics_of_parameters_that_were_not_trained_with_them(batch):
    """Estimated from batches, as PyTorch's update_bn does."""
    model = net('convnorm')
    state = create_state(model, make_optimizer('sgd', 0.1), SHAPE, 0)
    params = jax.tree.map(lambda a: 1.5 * a, state.params)
    options = {'mean': MEAN, 'std': STD, 'augment_fn': lambda key, images: images}
    step, statistics = jax.jit(classify.make_statistics_step(model, **options)), state.model_state
    for number in range(100):
        statistics = step(params, statistics, jax.random.key(number), batch['images'])
    images = normalize(to_float(batch['images']), MEAN, STD)
    variables = {'params': params, **statistics}
    close(model.apply(variables, images, train=False), train_output(model, variables, images), atol=2e-3)


def train_output(model, variables, images):
    return model.apply(variables, images, train=True, mutable=['batch_stats'])[0]


def test_a_net_without_state(batch):
    step, state = make(net('none'))
    assert state.model_state == {}
    after, metrics = jax.jit(step)(state, batch)
    assert after.model_state == {} and np.isfinite(metrics['loss'][0])
    assert not np.array_equal(after.params['linear']['kernel'], state.params['linear']['kernel'])


def test_bfloat16_trains(batch):
    step, state = make(net(dtype='bfloat16'), kind='none')
    step, losses = jax.jit(step), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss'][0]) / 16)
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:2])
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.model_state))} == {'float32'}


# --- evaluation ----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def evaluation(batch):
    """(jitted evaluation step, variables, batch without mask)."""
    model = net('batchnorm')
    variables = create_state(model, make_optimizer('sgd', 0.1), SHAPE, 0).eval_variables
    return jax.jit(classify.make_eval_step(classify.make_logits_fn(model, MEAN, STD))), variables, batch


def test_masked_equals_subset(evaluation):
    step, variables, batch = evaluation
    mask = np.ones(16, np.float32)
    mask[[1, 5, 11, 12, 13, 14, 15]] = 0
    masked = step(variables, {**batch, 'mask': mask})
    subset = step(variables, {**{k: v[mask > 0] for k, v in batch.items()}, 'mask': np.ones(9, np.float32)})
    close(masked, subset)
    assert masked['loss'][1] == masked['accuracy'][1] == 9
    whole = step(variables, {**batch, 'mask': np.ones(16, np.float32)})
    assert whole['loss'][0] != masked['loss'][0]


def test_a_nan_in_a_filled_up_example_does_not_spread(batch):
    def logits_fn(variables, pixels):
        logits = jnp.tile(jnp.arange(10.0), (len(pixels), 1)) * variables
        return logits.at[3].set(jnp.nan)

    mask = np.ones(16, np.float32)
    mask[3] = 0
    step = classify.make_eval_step(logits_fn)
    metrics = step(1.0, {**batch, 'mask': mask})
    expected = scipy.special.logsumexp(np.arange(10.0)) - np.asarray(batch['labels'])[mask > 0]
    np.testing.assert_allclose(metrics['loss'], (expected.sum(), 15), rtol=1e-5)
    assert np.isnan(step(1.0, {**batch, 'mask': np.ones(16, np.float32)})['loss'][0])


def test_the_logits_function_normalizes_and_uses_fixed_statistics(evaluation):
    _, variables, batch = evaluation
    model, pixels = net('batchnorm'), to_float(batch['images'])
    logits = classify.make_logits_fn(model, MEAN, STD)(variables, pixels)
    np.testing.assert_allclose(logits, model.apply(variables, (pixels - 0.3) / 0.4, train=False), atol=1e-4)
    alone = classify.make_logits_fn(model, MEAN, STD)(variables, pixels[:1])
    np.testing.assert_allclose(alone, logits[:1], atol=1e-4)


def test_microbatches_without_batch_statistics_are_the_whole_batch(batch):
    (whole, state), (parts, _) = make(net('none')), make(net('none'), microbatches=4)
    (want, wanted), (found, metrics) = jax.jit(whole)(state, batch), jax.jit(parts)(state, batch)
    close(found.params, want.params)
    close(metrics, wanted)


def test_microbatches_have_their_own_statistics_one_after_another(batch):
    step, state = make(net(), kind='none', tx=make_optimizer('sgd', 1.0, momentum=0.0), microbatches=2)
    found, metrics = jax.jit(step)(state, batch)
    gradient = jax.jit(jax.value_and_grad(classify.make_loss_fn(net(), mean=MEAN, std=STD), has_aux=True))
    model_state, grads, losses = state.model_state, [], []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        pixels, labels = to_float(batch['images'][part]), batch['labels'][part]
        (loss, (_, model_state)), grad = gradient(state.params, model_state, pixels, labels)
        grads.append(grad)
        losses.append(float(loss))
    close(found.model_state, model_state)
    close(found.params, jax.tree.map(lambda p, a, b: p - (a + b) / 2, state.params, *grads), atol=1e-4)
    assert float(metrics['loss'][0]) == pytest.approx(8 * sum(losses), rel=1e-4)


def test_logits_that_are_not_finite_are_wrong():
    """In training and in evaluation; argmax would call NaN the class 0."""
    logits = jnp.zeros((6, CLASSES)).at[:, 0].set(1).at[0].set(jnp.nan).at[1, 5].set(jnp.nan).at[2, 0].set(jnp.inf)
    labels, count = jnp.zeros(6, int), 6
    found = classify.step_metrics(jnp.float32(0), logits, labels, {})['accuracy']
    assert (float(found[0]), float(found[1])) == (3, count)
    step = classify.make_eval_step(lambda variables, pixels: logits)
    images = jnp.zeros((6, *SHAPE), jnp.uint8)
    found = step({}, {'images': images, 'labels': labels, 'mask': jnp.array([1, 1, 1, 1, 1, 0.0])})['accuracy']
    assert (float(found[0]), float(found[1])) == (2, 5)
