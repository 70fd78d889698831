"""Square attack: against loops in NumPy, closed forms on linear classifiers, torchattacks and AutoAttack.

torchattacks 3.5.1 holds an early version of the l2 proposal, which counts the length of the windows
once for every channel; AutoAttack and the paper do not. So it is the judge of linf only.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.attacks import inputs, projections

# Not `from convnorm_jax.attacks import square`: that may be the function of this name.
module = importlib.import_module('convnorm_jax.attacks.square')

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHAPE = (10, 10, 3)
CLASSES = 5
RADII = {'linf': 0.05, 'l2': 0.8}
# Not a multiple of the 10 queries of a chunk.
QUERIES = 36


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """Loops stay loops: they compile ten times faster. One test writes them out."""
    monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies: False)


def network(shape=SHAPE, classes=CLASSES, seed=0):
    """Weights of a small net with one hidden layer, float32."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(np.prod(shape), 16)) * np.sqrt(2 / np.prod(shape))
    return hidden.astype(np.float32), random.normal(size=(16, classes)).astype(np.float32)


def logits_of(weights, images):
    # A mean taken off each picture, so that the sign of a shift of all pixels is not all that counts.
    hidden = (images.reshape(len(images), -1) - 0.5) @ weights[0]
    return jnp.maximum(hidden, 0) @ weights[1]


LOGITS_FN = functools.partial(logits_of, network())


def batch(count=8, seed=1, shape=SHAPE, logits_fn=LOGITS_FN):
    """Images, some at 0 and 1, and the labels the network gives them."""
    images = np.clip(np.random.default_rng(seed).uniform(-0.2, 1.2, (count, *shape)), 0, 1).astype(np.float32)
    return images, np.asarray(jnp.argmax(logits_fn(images), axis=1))


@functools.cache
def start_fn(norm):
    return jax.jit(functools.partial(module.square_start, LOGITS_FN, epsilon=RADII[norm], norm=norm))


@functools.cache
def advance_fn(norm, count=10, queries=QUERIES):
    return jax.jit(
        functools.partial(
            module.square_advance, LOGITS_FN, epsilon=RADII[norm], norm=norm, queries=queries, count=count
        )
    )


def attacked(norm, images, labels, rng, count=10, queries=QUERIES):
    """The attack as a loop of the host over chunks."""
    state = start_fn(norm)(images, labels, rng=rng)
    for first in range(0, queries, count):
        state = advance_fn(norm, count, queries)(images, labels, state, rng=rng, first_query=first)
    return state


def numpy_share(query, queries):
    """The reference's `p_selection`, as a table."""
    query = int(query / queries * 10000)
    table = [(10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128), (8000, 256)]
    return next((0.8 / divisor for limit, divisor in table if query <= limit), 0.8 / 512)


@pytest.mark.parametrize('queries', [10000, 5000, 777, 29, 1])
def test_the_share_of_changed_pixels_is_the_published_schedule(queries):
    stages = np.asarray(jax.vmap(lambda query: module._stage(query, queries))(jnp.arange(queries)))
    np.testing.assert_array_equal(0.8 / 2.0**stages, [numpy_share(query, queries) for query in range(queries)])


def numpy_side(query, queries, norm, shape=SHAPE):
    side = round((numpy_share(query, queries) * shape[0] * shape[1]) ** 0.5)
    if norm == 'linf':
        return min(max(side, 1), *shape[:2])
    side = max(side, 3)
    return min(side + 1 - side % 2, *shape[:2])


def numpy_bump(height, width):
    """The reference's `eta_rectangles`: growing squares, summed into the array one by one."""
    bump = np.zeros((height, width))
    top, left = height // 2, width // 2
    for k in range(max(height // 2 + 1, width // 2 + 1)):
        bump[max(top, 0) : min(top + 2 * k + 1, height), max(left, 0) : min(left + 2 * k + 1, width)] += (
            1 / (k + 1) ** 2
        )
        top, left = top - 1, left - 1
    return bump / max(np.linalg.norm(bump), 1e-12)


def numpy_pattern(side):
    pattern = np.zeros((side, side))
    pattern[: side // 2] = numpy_bump(side // 2, side)
    pattern[side // 2 :] = -numpy_bump(side - side // 2, side)
    return pattern / np.linalg.norm(pattern)


@pytest.mark.parametrize('side', [1, 2, 3, 4, 7, 28, 29])
def test_the_pattern_is_the_sum_of_squares(side):
    np.testing.assert_allclose(module._pattern(side), numpy_pattern(side), atol=1e-12)


def numpy_l2_candidate(image, best, draws, side, epsilon):
    """Algorithm 3 of the paper for one [H, W, C], with slices."""
    (row, row2), (column, column2), coin, signs = draws
    delta = best - image
    union = np.zeros(image.shape[:2], bool)
    here = np.s_[row : row + side, column : column + side]
    there = np.s_[row2 : row2 + side, column2 : column2 + side]
    union[here] = union[there] = True
    spare = max(epsilon**2 - (delta**2).sum(), 0) / image.shape[2]
    lengths = np.sqrt(spare + (delta[union] ** 2).sum(axis=0))
    old = delta[here]
    new = old / (1e-12 + np.sqrt((old**2).sum(axis=(0, 1))))
    pattern = numpy_pattern(side)
    new = new + (pattern.T if coin else pattern)[:, :, None] * signs
    new = new / np.sqrt((new**2).sum(axis=(0, 1))) * lengths
    delta[there] = 0
    delta[here] = new
    return np.clip(image + epsilon * delta / np.linalg.norm(delta), 0, 1)


def numpy_linf_candidate(image, best, draws, side, epsilon):
    (row,), (column,), _, signs = draws
    new = best.copy()
    new[row : row + side, column : column + side] += 2 * epsilon * signs
    return np.clip(np.clip(new, image - epsilon, image + epsilon), 0, 1)


def draws_of(keys, norm):
    """For every example, for every query: what the attack draws, as NumPy arrays, and the side of its square."""
    count = {'linf': 3, 'l2': 5}[norm] + SHAPE[2]
    numbers = jax.jit(lambda: jax.vmap(module._numbers, (None, 0, None))(keys, jnp.arange(QUERIES), count))()
    sides = [numpy_side(query, QUERIES, norm) for query in range(QUERIES)]
    moves = jax.jit(jax.vmap(jax.vmap(lambda x, side: module._moves(x, side, SHAPE), (0, None))))
    moves = [np.asarray(x) for x in moves(numbers, jnp.asarray(sides))]
    return [[(tuple(x[query, i] for x in moves), sides[query]) for query in range(QUERIES)] for i in range(len(keys))]


@pytest.mark.parametrize('norm', inputs.NORMS)
def test_square_is_the_numpy_loop(norm):
    """One example at a time, float64, from the same start and draws."""
    images, labels = batch()
    keys = inputs.example_keys(jax.random.key(4), 8)
    start = start_fn(norm)(images, labels, rng=keys)
    state = attacked(norm, images, labels, keys)
    weights = [w.astype(np.float64) for w in network()]
    propose = {'linf': numpy_linf_candidate, 'l2': numpy_l2_candidate}[norm]

    def margin_of(x, label):
        logits = np.maximum((x.ravel() - 0.5) @ weights[0], 0) @ weights[1]
        return np.delete(logits, label).max() - logits[label]

    changes = 0
    draws = draws_of(keys, norm)
    for i, (image, label) in enumerate(zip(images.astype(np.float64), labels)):
        best = np.asarray(start.images[i], np.float64)
        margin, used = margin_of(best, label), 1
        for query in range(QUERIES):
            if margin > 0:
                break
            candidate = propose(image, best, *draws[i][query], RADII[norm])
            used += 1
            if margin_of(candidate, label) > margin:
                best, margin = candidate, margin_of(candidate, label)
                changes += 1
        np.testing.assert_allclose(state.images[i], best, atol=2e-6)
        np.testing.assert_allclose(state.margin[i], margin, atol=1e-5)
        assert (state.queries[i], state.fooled[i]) == (used, margin > 0)
    assert changes > 20
    assert 0 < np.sum(state.fooled) < 8


@pytest.mark.parametrize('norm', inputs.NORMS)
def test_squares_reach_every_position_and_no_further(norm):
    numbers = module._numbers(jax.random.split(jax.random.key(0), 500), 0, {'linf': 6, 'l2': 8}[norm])
    moves = jax.vmap(lambda numbers: module._moves(numbers, 7, (10, 12, 3)))(numbers)
    rows, columns, coins, signs = (np.asarray(x) for x in moves)
    assert set(rows.ravel()) == set(range(4)) and set(columns.ravel()) == set(range(6))
    assert set(signs.ravel()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.1 and abs(coins.mean() - 0.5) < 0.1


def test_start_of_linf_is_vertical_stripes():
    images = np.full((8, *SHAPE), 0.5, np.float32)
    noise = np.asarray(start_fn('linf')(images, np.zeros(8, int), rng=jax.random.key(0)).images) - 0.5
    np.testing.assert_allclose(abs(noise), RADII['linf'], atol=1e-6)
    np.testing.assert_array_equal(noise, np.broadcast_to(noise[:, :1], noise.shape))
    assert len(np.unique(np.sign(noise[:, 0]), axis=0)) == 8
    assert abs(np.sign(noise[:, 0]).mean()) < 0.3


def test_start_of_l2_is_a_grid_of_patterns_of_length_epsilon():
    images = np.full((2, 32, 30, 3), 0.5, np.float32)
    logits_fn = lambda x: x.mean((1, 2))
    start = jax.jit(functools.partial(module.square_start, logits_fn, epsilon=RADII['l2'], norm='l2'))
    state = start(images, np.zeros(2, int), rng=jax.random.key(0))
    noise = np.asarray(state.images) - 0.5
    np.testing.assert_allclose(projections.l2_norm(noise), RADII['l2'], rtol=1e-4)
    # 32 = 1 + 5 * 6 + 1 rows, 30 = 5 * 6 columns.
    assert (noise[:, [0, -1]] == 0).all()
    pattern = numpy_pattern(6)
    tiles = noise[:, 1:31].reshape(2, 5, 6, 5, 6, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 6, 6)
    tiles = tiles / np.linalg.norm(tiles[0])
    choices = np.stack([pattern, -pattern, pattern.T, -pattern.T])
    nearest = np.abs(tiles[:, None] - choices).max(axis=(2, 3))
    assert (nearest.min(axis=1) < 1e-4).all()
    assert set(nearest.argmin(axis=1)) == {0, 1, 2, 3}


@pytest.mark.parametrize('norm', inputs.NORMS)
def test_results_stay_in_the_ball_and_in_the_pixel_range(norm):
    images, labels = batch()
    for rng in range(5):
        state = attacked(norm, images, labels, jax.random.key(rng))
        result = np.asarray(state.images)
        assert result.dtype == np.float32 and result.min() >= 0 and result.max() <= 1
        lengths = np.asarray(projections.norm_of(result - images, norm))
        assert lengths.max() <= RADII[norm] * (1 + 1e-6) + 1e-7
        assert lengths.min() > 0.7 * RADII[norm]


@pytest.mark.parametrize('norm', inputs.NORMS)
def test_chunks_equal_the_whole(norm):
    images, labels = batch()
    rng = jax.random.key(2)
    chunks = attacked(norm, images, labels, rng)
    options = {'epsilon': RADII[norm], 'norm': norm, 'queries': QUERIES}
    whole = jax.jit(lambda x, y, rng: module.square(LOGITS_FN, x, y, rng=rng, **options))(images, labels, rng)
    np.testing.assert_array_equal(whole.queries, chunks.queries)
    np.testing.assert_array_equal(whole.fooled, chunks.fooled)
    np.testing.assert_allclose(whole.images, chunks.images, atol=1e-6)
    assert chunks.queries.max() == QUERIES + 1 and chunks.queries.min() < QUERIES


def test_written_out_equals_a_loop(monkeypatch):
    images, labels = batch(4)
    options = {'epsilon': 0.03, 'queries': 3, 'rng': jax.random.key(1)}
    results = {}
    for unroll in (True, False):
        monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies, unroll=unroll: unroll)
        results[unroll] = jax.jit(lambda x, y: module.square(LOGITS_FN, x, y, **options))(images, labels)
    jax.tree.map(np.testing.assert_array_equal, results[True], results[False])
    assert results[True].queries.max() == 4


def test_one_program_serves_every_chunk():
    images, labels = batch()
    traces = []

    def logits_fn(x):
        traces.append(0)
        return LOGITS_FN(x)

    options = {'epsilon': 0.05, 'queries': 1000, 'count': 1}
    advance = jax.jit(functools.partial(module.square_advance, logits_fn, **options))
    state = start_fn('linf')(images, labels, rng=jax.random.key(0))
    for first in (0, 17, 400, 999):
        state = advance(images, labels, state, rng=jax.random.key(0), first_query=first)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize('norm', inputs.NORMS)
def test_an_example_does_not_depend_on_its_batch(norm):
    """Four of eight, in another order and one twice: from the start, and packed between two chunks."""
    images, labels = batch(8)
    keys = inputs.example_keys(jax.random.key(5), 8)
    whole = attacked(norm, images, labels, keys)
    order = np.array([6, 1, 1, 3])
    expected = jax.tree.map(lambda x: np.asarray(x)[order], whole)
    assert expected.queries.min() > 11
    jax.tree.map(np.testing.assert_array_equal, attacked(norm, images[order], labels[order], keys[order]), expected)
    state = start_fn(norm)(images, labels, rng=keys)
    state = advance_fn(norm)(images, labels, state, rng=keys, first_query=0)
    state = jax.tree.map(lambda x: x[order], state)
    for first in (10, 20, 30):
        state = advance_fn(norm)(images[order], labels[order], state, rng=keys[order], first_query=first)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_no_gradient_is_taken():
    """Neither by the attack nor, through it, by a training step around it."""

    @jax.custom_vjp
    def logits_fn(x, scale):
        return LOGITS_FN(x) * scale

    def refuse(*_):
        raise AssertionError('differentiated')

    logits_fn.defvjp(refuse, refuse)
    images, labels = batch(4)
    options = {'epsilon': 0.8, 'norm': 'l2', 'queries': 3, 'rng': jax.random.key(0)}
    with pytest.raises(AssertionError, match='differentiated'):
        jax.grad(lambda scale: logits_fn(images, scale).sum())(2.0)
    state = jax.jit(lambda x: module.square(lambda x: logits_fn(x, 2.0), x, labels, **options))(images)
    assert state.queries.max() > 1

    @jax.jit
    def total(scale):
        found = module.square(lambda x: LOGITS_FN(x) * scale, images * scale, labels, **options)
        return found.images.sum() + found.margin.sum()

    assert jax.grad(total)(0.9) == 0


def linear_problem(count=6, shape=(4, 4, 2)):
    """A linear classifier of two classes, and images that it gets right, far from 0 and 1."""
    random = np.random.default_rng(3)
    weights = random.normal(size=(np.prod(shape), 2)).astype(np.float32)
    images = random.uniform(0.4, 0.6, (count, *shape)).astype(np.float32)
    logits = images.reshape(count, -1) @ weights
    difference = weights[:, 1] - weights[:, 0]
    return weights, images, logits.argmax(axis=1), abs(logits[:, 1] - logits[:, 0]), difference


def attack_with_own_radii(weights, images, labels, **options):
    """The attack as a function of one radius an example, [B]."""

    @jax.jit
    def attack(epsilon):
        # The radius is brought into the model: the attack moves grey pictures by 0.1.
        def logits_fn(x):
            seen = images + (x - 0.5) / 0.1 * epsilon[:, None, None, None]
            return seen.reshape(len(x), -1) @ weights

        return module.square(
            logits_fn, jnp.full_like(images, 0.5), labels, epsilon=0.1, rng=jax.random.key(0), **options
        )

    return attack


def test_linf_finds_the_minimal_perturbation_of_a_linear_classifier():
    """Fooled exactly where epsilon is above margin / ||w1 - w0||_1, to 1 part in 1000."""
    weights, images, labels, margin, difference = linear_problem()
    minimal = margin / abs(difference).sum()
    attack = attack_with_own_radii(weights, images, labels, queries=2000)
    above, below = attack(minimal * 1.001), attack(minimal * 0.999)
    assert above.fooled.all()
    assert not below.fooled.any()
    # The optimum itself: what is left of the margin is what epsilon lacks.
    np.testing.assert_allclose(below.margin, -0.001 * margin, rtol=0.05)
    assert (below.queries == 2001).all() and above.queries.max() < 2001


def test_l2_never_beats_the_closed_form_and_needs_at_most_twice_that():
    weights, images, labels, margin, difference = linear_problem()
    minimal = margin / np.linalg.norm(difference)
    attack = attack_with_own_radii(weights, images, labels, norm='l2', queries=400)
    assert not attack(minimal * 0.999).fooled.any()
    # Its patterns fill 3 x 3 of 4 x 4 pixels here: the optimum itself is out of reach.
    assert attack(minimal * 2).fooled.all()


def valid():
    images, labels = batch(2)
    return {'images': images, 'labels': labels, 'epsilon': 0.1, 'queries': 1, 'rng': jax.random.key(0)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'epsilon': 8}, 'epsilon=8'),
        ({'norm': 'l1'}, "norm='l1': expected one of linf, l2"),
        ({'queries': 0}, 'queries=0'),
        ({'images': np.zeros((2, *SHAPE), np.uint8)}, 'images.dtype=uint8'),
        ({'labels': np.zeros(3, int)}, r'labels.shape=\(3,\)'),
        ({'rng': jax.random.split(jax.random.key(0), 3)}, r'rng.shape=\(3,\)'),
        ({'logits_fn': lambda x: x}, 'logits.shape='),
    ],
)
def test_what_a_user_gets_wrong_is_named_on_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        module.square(**{'logits_fn': LOGITS_FN, **valid(), **change})
    assert '\n' not in str(caught.value)


def test_advance_checks_the_same():
    images, labels = batch(2)
    state = start_fn('linf')(images, labels, rng=jax.random.key(0))
    with pytest.raises(ValueError, match='count=0'):
        module.square_advance(
            LOGITS_FN, images, labels, state, epsilon=0.1, rng=jax.random.key(0), first_query=0, count=0
        )


def torch_model(weights):
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.from_numpy(w) for w in weights])

        def forward(self, nchw):
            flat = nchw.permute(0, 2, 3, 1).reshape(len(nchw), -1) - 0.5
            return torch.relu(flat @ self.weights[0]) @ self.weights[1]

    return Net().eval()


def to_torch(images, labels):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))


def reference(library, norm, epsilon, queries):
    """The attack of 'torchattacks' or 'autoattack' on the network, ready to run."""
    package = pytest.importorskip(library)
    model, name = torch_model(network()), {'linf': 'Linf', 'l2': 'L2'}[norm]
    if library == 'torchattacks':
        return package.Square(model, norm=name, eps=epsilon, n_queries=queries)
    square = importlib.import_module('autoattack.square')
    return square.SquareAttack(model, norm=name, eps=epsilon, n_queries=queries, device='cpu')


JUDGES = [('torchattacks', 'linf'), ('autoattack', 'linf'), ('autoattack', 'l2')]


@pytest.mark.parametrize(('library', 'norm'), JUDGES)
def test_the_reference_takes_the_same_way(library, norm):
    """Its code, fed with our start and our draws, ends at our images; one example at a time."""
    pytest.importorskip(library)
    images, labels = batch()
    keys = inputs.example_keys(jax.random.key(4), 8)
    start = start_fn(norm)(images, labels, rng=keys)
    state = attacked(norm, images, labels, keys)
    draws = draws_of(keys, norm)
    x, y = to_torch(images, labels)
    for i in range(8):
        theirs = reference(library, norm, RADII[norm], QUERIES)
        replay_into(theirs, draws[i], to_torch(np.asarray(start.images[i : i + 1]), labels)[0] - x[i : i + 1])
        theirs.init_hyperparam(x)
        queries, result = theirs.attack_single_run(x[i : i + 1], y[i : i + 1])
        np.testing.assert_allclose(result[0].permute(1, 2, 0).numpy(), state.images[i], atol=2e-6)
        assert queries.item() == state.queries[i]


def replay_into(attack, draws, noise):
    """Makes the random numbers of a reference ours: the start's effect `noise`, then the moves of every query."""
    import torch

    queries, corners, now = iter(draws), [], {}
    normalize = attack.normalize if hasattr(attack, 'normalize') else attack.normalize_delta

    def random_int(low, high):
        if not corners:
            (rows, columns, now['coin'], now['signs']), now['side'] = next(queries)
            corners.extend(int(x) for pair in zip(rows, columns) for x in pair)
        return torch.tensor([corners.pop(0)])

    def random_choice(shape):
        if now:
            return torch.from_numpy(now['signs'].copy()).float().reshape(1, -1, 1, 1)[:: len(shape) - 2]
        return noise / attack.eps if attack.norm == 'Linf' else torch.ones(shape)

    def eta(side):
        pattern = torch.from_numpy(numpy_pattern(side)).float()
        return pattern.T if now and now['coin'] else pattern

    attack.random_int, attack.random_choice, attack.eta = random_int, random_choice, eta
    started = lambda delta: normalize(delta) if now else noise / attack.eps
    attack.normalize = attack.normalize_delta = started


@pytest.mark.parametrize(('library', 'norm'), [JUDGES[0], JUDGES[2]])
def test_the_reference_leaves_as_many_robust(library, norm):
    """Of 200, with its own random numbers, once its squares may lie in the last row and column, too.

    A batch shares its squares there, so that its counts scatter by about six: the mean of three.
    """
    pytest.importorskip(library)
    images, labels = batch(200, seed=7)
    queries = 100
    ours = attacked(norm, images, labels, jax.random.key(0), count=20, queries=queries)
    ours = 200 - int(ours.fooled.sum())
    model, theirs = torch_model(network()), []
    for seed in range(3):
        attack = reference(library, norm, RADII[norm], queries)
        attack.seed = seed
        draw = attack.random_int
        attack.random_int = lambda low, high, draw=draw: draw(low, high + 1)
        result = (attack if library == 'torchattacks' else attack.perturb)(*to_torch(images, labels))
        theirs.append((model(result).argmax(dim=1).numpy() == labels).sum())
    assert 20 < ours < 180
    assert abs(ours - np.mean(theirs)) <= 8, (ours, theirs)
