"""SimBA: against a loop in NumPy, SciPy's cosine transform, and cases counted by hand."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.special

from convnorm_jax.attacks import inputs

# Not `from convnorm_jax.attacks import simba`: that may be the function of this name.
module = importlib.import_module('convnorm_jax.attacks.simba')

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHAPE = (4, 5, 2)
VECTORS = 40
CLASSES = 3
OFFSETS = np.array([2, 0, 0], np.float32)
STEP = 0.15


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """Loops stay loops: they compile ten times faster. One test writes them out."""
    monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies: False)


def network(seed=0):
    """Weights of a small net with one hidden layer, float64."""
    random = np.random.default_rng(seed)
    return random.normal(size=(VECTORS, 12)) / 4, random.normal(size=(12, CLASSES))


def logits_of(xp, weights, images):
    # The first class leads by so much that not every example of it can be fooled.
    return xp.tanh((images.reshape(len(images), -1) - 0.5) @ weights[0]) @ weights[1] + OFFSETS


LOGITS_FN = functools.partial(logits_of, jnp, [w.astype(np.float32) for w in network()])


def batch(count=6, seed=1):
    """Images, some pixels at 0 and 1, and the labels the network gives them."""
    images = np.clip(np.random.default_rng(seed).uniform(-0.2, 1.2, (count, *SHAPE)), 0, 1).astype(np.float32)
    return images, np.asarray(jnp.argmax(LOGITS_FN(images), axis=1))


@functools.cache
def start_fn(basis):
    return jax.jit(functools.partial(module.simba_start, LOGITS_FN, basis=basis))


@functools.cache
def advance_fn(basis, epsilon=None):
    """Chunks of 16 queries, a size that does not divide 80."""
    options = {'basis': basis, 'epsilon': epsilon, 'step_size': STEP, 'count': 16}
    return jax.jit(functools.partial(module.simba_advance, LOGITS_FN, **options))


def attacked(basis, images, labels, rng, epsilon=None):
    """(result, order) of the attack as a loop of the host over chunks."""
    state = start_fn(basis)(images, labels, rng=rng)
    while module.simba_active(state).any():
        state = advance_fn(basis, epsilon)(images, labels, state)
    return module.simba_result(images, state, epsilon), np.asarray(state.order)


@pytest.mark.parametrize('size', [1, 2, 5, 32])
def test_dct_matrix_is_that_of_scipy(size):
    matrix = module.dct_matrix(size)
    np.testing.assert_allclose(matrix, scipy.fft.dct(np.eye(size), axis=0, norm='ortho'), atol=1e-12)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)


def numpy_vector(number, basis):
    """Basis vector `number` as an image [H, W, C]: SciPy's inverse transform of a one."""
    coefficients = np.zeros(VECTORS)
    coefficients[number] = 1
    coefficients = coefficients.reshape(SHAPE)
    return coefficients if basis == 'pixel' else scipy.fft.idctn(coefficients, axes=(0, 1), norm='ortho')


def numpy_simba(image, label, order, basis, epsilon):
    """Algorithm 1 for one image, float64: (image, queries, success)."""

    def applied(delta):
        return np.clip(image + (delta if epsilon is None else np.clip(delta, -epsilon, epsilon)), 0, 1)

    def judge(delta):
        probabilities = scipy.special.softmax(logits_of(np, network(), applied(delta)[None])[0])
        return probabilities[label], probabilities.argmax() != label

    delta = np.zeros(SHAPE)
    probability, fooled = judge(delta)
    queries = 0
    for number in order:
        if fooled:
            break
        for step in (STEP, -STEP):
            candidate = delta + step * numpy_vector(number, basis)
            value, success = judge(candidate)
            queries += 1
            if value < probability:
                delta, probability, fooled = candidate, value, success
                break
    return applied(delta), queries, fooled


@pytest.mark.parametrize(('basis', 'epsilon'), [('pixel', None), ('dct', None), ('dct', 0.07)])
def test_simba_is_the_numpy_loop(basis, epsilon):
    images, labels = batch()
    result, orders = attacked(basis, images, labels, jax.random.key(3), epsilon)
    expected = [
        numpy_simba(image, label, order, basis, epsilon)
        for image, label, order in zip(images.astype(np.float64), labels, orders)
    ]
    pixels, queries, success = (np.array(x) for x in zip(*expected))
    np.testing.assert_allclose(result.images, pixels, atol=2e-6)
    np.testing.assert_array_equal(result.queries, queries)
    np.testing.assert_array_equal(result.success, success)
    lengths = np.sqrt(((pixels - images) ** 2).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(result.l2, lengths, rtol=1e-5)
    # All that can happen does: fooled early, through with all vectors, + taken, - taken, neither.
    assert 0 < success.sum() < 6
    assert VECTORS < queries[~success].min() < 2 * VECTORS
    if epsilon is not None:
        assert abs(pixels - images).max() <= epsilon + 1e-6


def test_queries_counted_by_hand():
    """Two classes, two pixels of 1/2, logits (9 x0 - 8 x1, x1): + fails on x0, - fails on x1."""

    def logits_fn(x):
        first, second = x[:, 0, 0, 0], x[:, 0, 1, 0]
        return jnp.stack([9 * first - 8 * second + 2, jnp.zeros_like(first)], axis=1)

    images = np.full((3, 1, 2, 1), 0.5, np.float32)
    keys = jax.random.split(jax.random.key(0), 40)
    first = np.asarray(jax.vmap(lambda key: jax.random.permutation(key, 2))(keys))[:, 0]
    keys = keys[np.array([np.flatnonzero(first == 0)[0], np.flatnonzero(first == 1)[0], 0])]
    # The label of the last one is wrong to begin with.
    labels = np.array([0, 0, 1])
    attack = jax.jit(functools.partial(module.simba, logits_fn, step_size=0.2), static_argnames='steps')
    result = attack(images, labels, rng=keys)
    # Margin 2.5; -x0 takes 1.8 of it and costs 2, +x1 takes 1.6 and costs 1.
    np.testing.assert_array_equal(result.queries, [3, 3, 0])
    np.testing.assert_array_equal(result.success, [True, True, True])
    np.testing.assert_allclose(result.images[:2].squeeze(), [[0.3, 0.7], [0.3, 0.7]], atol=1e-6)
    np.testing.assert_array_equal(result.images[2], images[2])
    # With one step: 2 queries or 1.
    result = attack(images, labels, rng=keys, steps=1)
    np.testing.assert_array_equal(result.queries, [2, 1, 0])
    np.testing.assert_array_equal(result.success, [False, False, True])
    np.testing.assert_allclose(result.l2, [0.2, 0.2, 0], atol=1e-6)
    summary = module.simba_summary(result)
    assert summary['examples'] == 2
    assert summary['average_queries'] == 1.5
    assert summary['success_rate'] == 0
    assert np.isnan(summary['average_queries_success']) and np.isnan(summary['mean_l2_success'])


def test_summary_leaves_out_what_was_wrong_to_begin_with():
    result = module.SimbaResult(
        images=np.zeros((4, *SHAPE)),
        queries=np.array([10, 0, 30, 80]),
        success=np.array([True, True, True, False]),
        l2=np.array([1.0, 0.0, 2.0, 6.0]),
    )
    assert module.simba_summary(result) == {
        'examples': 3,
        'average_queries': 40,
        'average_queries_success': 20,
        'success_rate': pytest.approx(2 / 3),
        'mean_l2': 3,
        'mean_l2_success': 1.5,
    }


@pytest.mark.parametrize('basis', module.BASES)
def test_every_example_goes_through_all_vectors_in_its_own_order(basis):
    images, labels = batch()
    order = np.asarray(start_fn(basis)(images, labels, rng=jax.random.key(0)).order)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(VECTORS), (6, 1)))
    assert len(np.unique(order, axis=0)) == 6


def orders(shape, **options):
    """Frequencies [B, steps] (the larger of row and column) and channels of four examples."""
    images = np.zeros((4, *shape), np.float32)
    logits_fn = lambda x: x.mean((1, 2)) + jnp.arange(shape[2])
    start = jax.jit(functools.partial(module.simba_start, logits_fn, basis='dct', **options))
    state = start(images, np.zeros(4, int), rng=jax.random.key(0))
    row, column, channel = np.unravel_index(np.asarray(state.order), shape)
    return np.maximum(row, column), channel


def test_frequencies_keep_the_lowest_block_alone():
    frequency, channel = orders((8, 8, 3), frequencies=3)
    assert frequency.shape == (4, 27) and frequency.max() == 2
    assert (np.sort(channel, axis=1) == np.repeat(np.arange(3), 9)).all()
    assert (frequency[:, 0] != frequency[0, 0]).any() or (channel[:, 0] != channel[0, 0]).any()


def test_stride_goes_outwards_block_by_block():
    """3 x 3 first, then rings of 2: 9, 25 - 9, 49 - 25, and what is left of 64, times 3 channels."""
    frequency, channel = orders((8, 8, 3), frequencies=3, stride=2)
    edges = 3 * np.array([0, 9, 25, 49, 64])
    for i, inside in enumerate([(0, 2), (3, 4), (5, 6), (7, 7)]):
        ring = frequency[:, edges[i] : edges[i + 1]]
        assert (ring.min(), ring.max()) == inside
        # In random order: not sorted, not the same for all.
        assert (np.diff(channel[:, edges[i] : edges[i + 1]], axis=1) < 0).any()
    assert frequency.shape == (4, 192)
    assert len(np.unique(frequency[:, :27], axis=0)) == 4


def test_dct_stays_in_the_span_of_its_frequencies():
    images = np.full((3, *SHAPE), 0.5, np.float32)
    labels = np.asarray(LOGITS_FN(images)).argmax(axis=1)
    attack = jax.jit(functools.partial(module.simba, LOGITS_FN, step_size=0.01, basis='dct', frequencies=2))
    result = attack(images, labels, rng=jax.random.key(0))
    spectrum = scipy.fft.dctn(np.asarray(result.images - images, np.float64), axes=(1, 2), norm='ortho')
    assert abs(spectrum[:, :2, :2]).max() > 0.009
    spectrum[:, :2, :2] = 0
    assert abs(spectrum).max() < 1e-6


def test_linear_classifier_gives_in_at_the_closed_form():
    """All pixels by step against the weights: margin - step * ||w1 - w0||_1 is left, and no less."""
    random = np.random.default_rng(2)
    weights = random.normal(size=(VECTORS, 2)).astype(np.float32)
    images = random.uniform(0.3, 0.7, (5, *SHAPE)).astype(np.float32)
    logits = images.reshape(5, -1) @ weights
    labels = logits.argmax(axis=1)
    margin, slope = abs(logits[:, 1] - logits[:, 0]), abs(weights[:, 1] - weights[:, 0]).sum()

    @jax.jit
    def attack(step):
        options = {'step_size': 0.1, 'rng': jax.random.key(0)}

        def logits_fn(x):
            seen = images + (x - 0.5) / 0.1 * step[:, None, None, None]
            return seen.reshape(5, -1) @ weights

        return module.simba(logits_fn, jnp.full_like(images, 0.5), labels, **options)

    assert attack(margin / slope * 1.001).success.all()
    result = attack(margin / slope * 0.999)
    assert not result.success.any()
    # Every vector is taken with one sign or the other: 1 or 2 queries.
    np.testing.assert_allclose(result.l2, 0.1 * np.sqrt(VECTORS), rtol=1e-5)
    signs = np.sign(np.asarray(result.images) - 0.5).reshape(5, -1)
    np.testing.assert_array_equal(result.queries, VECTORS + (signs < 0).sum(axis=1))


def test_a_probability_that_rounds_to_one_still_falls():
    """softmax gives exactly 1 in float32 before and after every single step."""

    def logits_fn(x):
        level = 200 * (x.mean((1, 2, 3)) - 0.5)
        return jnp.stack([level + 60, jnp.zeros_like(level)], axis=1)

    images = np.full((2, *SHAPE), 0.5, np.float32)
    assert (jax.nn.softmax(logits_fn(images - STEP / VECTORS))[:, 0] == 1).all()
    attack = jax.jit(functools.partial(module.simba, logits_fn, step_size=0.4))
    result = attack(images, np.zeros(2, int), rng=jax.random.key(0))
    # 60 / 200 / (0.4 / 40) = 30 pixels, each by -: two queries.
    assert result.success.all()
    assert (abs(result.queries - 61) <= 1).all()


@pytest.mark.parametrize('basis', module.BASES)
def test_chunks_equal_the_whole(basis):
    images, labels = batch()
    chunks, _ = attacked(basis, images, labels, jax.random.key(3))
    attack = jax.jit(functools.partial(module.simba, LOGITS_FN, step_size=STEP, basis=basis))
    whole = attack(images, labels, rng=jax.random.key(3))
    np.testing.assert_array_equal(whole.queries, chunks.queries)
    np.testing.assert_array_equal(whole.success, chunks.success)
    np.testing.assert_allclose(whole.images, chunks.images, atol=1e-6)


def test_written_out_equals_a_loop(monkeypatch):
    images, labels = batch(4)
    options = {'step_size': STEP, 'steps': 2, 'rng': jax.random.key(1)}
    results = {}
    for unroll in (True, False):
        monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies, unroll=unroll: unroll)
        results[unroll] = jax.jit(lambda x, y: module.simba(LOGITS_FN, x, y, **options))(images, labels)
    np.testing.assert_allclose(results[True].images, results[False].images, atol=1e-6)
    np.testing.assert_array_equal(results[True].queries, results[False].queries)
    assert 2 <= results[True].queries.max() <= 4


@pytest.mark.slow
@pytest.mark.parametrize('budget', [1, 4, 5, 1000])
def test_no_query_beyond_the_budget(budget):
    """Within a chunk too, and between + and - of a vector."""
    images, labels = batch()
    keys = jax.random.key(3)
    without, _ = attacked('pixel', images, labels, keys)
    whole = jax.jit(functools.partial(module.simba, LOGITS_FN, step_size=STEP, queries=budget))(
        images, labels, rng=keys
    )
    np.testing.assert_array_equal(whole.queries, np.minimum(without.queries, budget))
    state = start_fn('pixel')(images, labels, rng=keys)
    advance = jax.jit(functools.partial(module.simba_advance, LOGITS_FN, step_size=STEP, queries=budget, count=3))
    while module.simba_active(state, budget).any():
        state = advance(images, labels, state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), module.simba_result(images, state), whole)


def test_an_example_does_not_depend_on_its_batch():
    images, labels = batch()
    keys = inputs.example_keys(jax.random.key(3), 6)
    whole, _ = attacked('dct', images, labels, keys)
    order = np.array([4, 1, 1])
    part, _ = attacked('dct', images[order], labels[order], keys[order])
    jax.tree.map(np.testing.assert_array_equal, part, jax.tree.map(lambda x: np.asarray(x)[order], whole))


def test_packing_between_chunks_changes_nothing():
    images, labels = batch()
    whole, _ = attacked('dct', images, labels, jax.random.key(3))
    state = start_fn('dct')(images, labels, rng=jax.random.key(3))
    for _ in range(2):
        state = advance_fn('dct')(images, labels, state)
    rest = np.flatnonzero(module.simba_active(state))[::-1]
    assert 2 <= len(rest) < 6
    state = jax.tree.map(lambda x: x[rest], state)
    while module.simba_active(state).any():
        state = advance_fn('dct')(images[rest], labels[rest], state)
    packed = module.simba_result(images[rest], state)
    jax.tree.map(np.testing.assert_array_equal, packed, jax.tree.map(lambda x: np.asarray(x)[rest], whole))


def test_no_gradient_is_taken():
    """Neither by the attack nor, through it, by a training step around it."""

    @jax.custom_vjp
    def logits_fn(x, scale):
        return LOGITS_FN(x) * scale

    def refuse(*_):
        raise AssertionError('differentiated')

    logits_fn.defvjp(refuse, refuse)
    images, labels = batch(4)
    options = {'step_size': STEP, 'steps': 3, 'rng': jax.random.key(0)}
    with pytest.raises(AssertionError, match='differentiated'):
        jax.grad(lambda scale: logits_fn(images, scale).sum())(2.0)
    found = jax.jit(lambda x: module.simba(lambda x: logits_fn(x, 2.0), x, labels, **options))(images)
    assert found.queries.max() >= 3

    @jax.jit
    def total(scale):
        found = module.simba(lambda x: LOGITS_FN(x) * scale, images * scale, labels, **options)
        return found.images.sum() + found.l2.sum()

    assert jax.grad(total)(0.9) == 0


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'basis': 'fourier'}, "basis='fourier': expected one of pixel, dct"),
        ({'step_size': 0}, 'step_size=0'),
        ({'steps': 0}, 'steps=0'),
        ({'queries': 0}, 'queries=0'),
        ({'epsilon': 8}, 'epsilon=8'),
        ({'frequencies': 2}, "frequencies=2, stride=None: expected None with basis='pixel'"),
        ({'basis': 'dct', 'frequencies': 0}, 'frequencies=0'),
        ({'basis': 'dct', 'frequencies': 6}, 'frequencies=6: expected at most 5'),
        ({'basis': 'dct', 'stride': 2}, 'stride=2: expected None without frequencies'),
        ({'images': np.zeros((2, *SHAPE), np.uint8)}, 'images.dtype=uint8'),
        ({'labels': np.zeros(3, int)}, r'labels.shape=\(3,\)'),
        ({'rng': jax.random.split(jax.random.key(0), 3)}, r'rng.shape=\(3,\)'),
        ({'logits_fn': lambda x: x}, 'logits.shape='),
    ],
)
def test_what_a_user_gets_wrong_is_named_on_one_line(change, message):
    images, labels = batch(2)
    given = {'logits_fn': LOGITS_FN, 'images': images, 'labels': labels, 'steps': 1, 'rng': jax.random.key(0)}
    with pytest.raises(ValueError, match=message) as caught:
        module.simba(**{**given, **change})
    assert '\n' not in str(caught.value)
