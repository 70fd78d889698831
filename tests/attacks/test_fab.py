"""FAB-T: its projections against SciPy, the attack against closed forms, NumPy in float64 and torchattacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from convnorm_jax.attacks import losses
from convnorm_jax.attacks.fab import _shortest_move, fab, fab_advance, fab_start

SHAPE = (6, 4, 4, 2)
SIZE = int(np.prod(SHAPE[1:]))
CLASSES = 5
NORMS = ('linf', 'l2')

start = jax.jit(fab_start, static_argnames=('logits_fn', 'norm'))
advance = jax.jit(fab_advance, static_argnames=('logits_fn', 'norm', 'count'))
jitted_fab = jax.jit(fab, static_argnames=('logits_fn', 'norm', 'steps'))

pytestmark = pytest.mark.usefixtures('quick_compilation', 'loop')


@pytest.fixture
def loop(monkeypatch):
    """Iterations are compiled once, not written out."""
    monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies: False)


@functools.partial(jax.jit, static_argnames='norm')
def project(points, normals, offsets, norm):
    """The shortest move to the planes <normal, x> = offset within the box."""
    return _shortest_move(points, normals, (normals * points).sum(-1) - offsets, norm)


def length(delta, norm):
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.abs(flat).max(axis=1) if norm == 'linf' else np.sqrt((flat**2).sum(axis=1))


def hyperplanes(count, size, seed=0):
    """Points in the box (some entries on its faces) and planes that it reaches, float64."""
    random = np.random.default_rng(seed)
    points = np.clip(random.uniform(-0.3, 1.3, (count, size)), 0, 1)
    normals = random.normal(size=(count, size)) * random.choice([0, 1, 1, 1, 0.01], (count, size))
    # An offset taken at another point of the box: some far, most near.
    others = random.uniform(size=(count, size))
    share = random.uniform(0, 1, (count, 1)) ** 2
    return points, normals, (normals * (points + share * (others - points))).sum(axis=1)


def unreachable(points, normals, seed=0):
    """Offsets beyond what the box reaches, and the corner nearest to each plane."""
    above = np.random.default_rng(seed).uniform(size=len(points)) < 0.5
    corner = np.where(normals == 0, points, (normals > 0) == above[:, None])
    return (normals * corner).sum(axis=1) + np.where(above, 0.5, -0.5), corner


def shortest_by_linprog(point, normal, offset):
    """The smallest largest change that reaches the plane within the box, and whether one does."""
    size = len(point)
    eye, ones = np.eye(size), np.ones((size, 1))
    solved = scipy.optimize.linprog(
        c=[0] * size + [1],
        A_ub=np.block([[eye, -ones], [-eye, -ones]]), b_ub=np.zeros(2 * size),
        A_eq=[[*normal, 0]], b_eq=[offset - normal @ point],
        bounds=[(-value, 1 - value) for value in point] + [(0, None)],
    )  # fmt: skip
    return solved.x[-1] if solved.status == 0 else None


def shortest_by_slsqp(point, normal, offset):
    solved = scipy.optimize.minimize(
        lambda delta: delta @ delta, np.zeros_like(point), jac=lambda delta: 2 * delta, method='SLSQP',
        bounds=[(-value, 1 - value) for value in point],
        constraints={'type': 'eq', 'fun': lambda delta: normal @ (point + delta) - offset, 'jac': lambda _: normal},
        options={'maxiter': 500, 'ftol': 1e-14},
    )  # fmt: skip
    assert solved.success, solved.message
    return solved.x


def shortest_by_bisection(point, normal, offset, norm):
    """z(level) = clip(point + level * direction) crosses the plane once: float64, no sort, no Newton."""
    excess = normal @ point - offset
    direction = (normal if norm == 'l2' else np.sign(normal)) * -np.sign(excess)
    low, high = 0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        left = (normal @ np.clip(point + middle * direction, 0, 1) - offset) * np.sign(excess)
        low, high = (middle, high) if left > 0 else (low, middle)
    return np.clip(point + high * direction, 0, 1) - point


def check_feasible(points, normals, offsets, delta):
    moved = points + delta
    assert moved.min() >= -1e-9 and moved.max() <= 1 + 1e-9
    np.testing.assert_allclose((normals * moved).sum(axis=1), offsets, atol=1e-9)


def test_linf_projection_is_as_short_as_linear_programming_makes_it():
    points, normals, offsets = hyperplanes(60, 8)
    with jax.enable_x64(True):
        delta = np.asarray(project(points, normals, offsets, 'linf'))
    check_feasible(points, normals, offsets, delta)
    best = [shortest_by_linprog(*case) for case in zip(points, normals, offsets)]
    np.testing.assert_allclose(length(delta, 'linf'), best, atol=1e-9)


def test_l2_projection_is_the_one_of_slsqp():
    points, normals, offsets = hyperplanes(60, 8, seed=1)
    with jax.enable_x64(True):
        delta = np.asarray(project(points, normals, offsets, 'l2'))
    check_feasible(points, normals, offsets, delta)
    best = np.stack([shortest_by_slsqp(*case) for case in zip(points, normals, offsets)])
    np.testing.assert_allclose(delta, best, atol=1e-5)
    assert (length(delta, 'l2') <= length(best, 'l2') + 1e-9).all()


@pytest.mark.parametrize('norm', NORMS)
def test_projection_of_whole_pictures_is_the_one_of_bisection(norm):
    points, normals, offsets = (a.astype(np.float32) for a in hyperplanes(12, 3072, seed=2))
    delta = project(points, normals, offsets, norm)
    assert delta.dtype == np.float32
    exact = [shortest_by_bisection(*case, norm) for case in zip(*map(np.float64, (points, normals, offsets)))]
    np.testing.assert_allclose(delta, np.stack(exact), atol=2e-6)


@pytest.mark.parametrize('norm', NORMS)
def test_what_the_box_does_not_reach_ends_at_the_nearest_corner(norm):
    points, normals, _ = hyperplanes(40, 8, seed=3)
    offsets, corner = unreachable(points, normals)
    assert shortest_by_linprog(points[0], normals[0], offsets[0]) is None
    # float32: the offset is out of reach by far more than rounding.
    points, normals, offsets = (a.astype(np.float32) for a in (points, normals, offsets))
    delta = project(points, normals, offsets, norm)
    np.testing.assert_allclose(points + delta, corner, atol=1e-6)


@pytest.mark.parametrize('norm', NORMS)
def test_projection_of_what_is_degenerate_is_finite(norm):
    points, normals, offsets = (a.astype(np.float32) for a in hyperplanes(5, 8, seed=4))
    expected = project(points, normals, offsets, norm=norm)
    # A plane can be written at any scale, even where squares leave float32.
    for scale in (1e-25, 1e25):
        np.testing.assert_allclose(project(points, normals * scale, offsets * scale, norm=norm), expected, atol=1e-5)
    np.testing.assert_array_equal(project(points, 0 * normals, offsets, norm=norm), 0)
    np.testing.assert_array_equal(project(points, 0 * normals, 0 * offsets, norm=norm), 0)
    on_plane = (normals * points).sum(axis=1)
    np.testing.assert_allclose(project(points, normals, on_plane, norm=norm), 0, atol=1e-6)
    tiny = normals * np.float32([1, 1e-30, 1, 1e-30, 1, 1, 1, 1])
    offsets, corner = unreachable(points, tiny)
    np.testing.assert_allclose(points + project(points, tiny, offsets, norm=norm), corner, atol=1e-6)
    # The loop must end on numbers that no network should give.
    assert np.isnan(project(points, normals * np.nan, offsets, norm=norm)).all()


@pytest.mark.parametrize('norm', NORMS)
def test_projection_passes_limits_of_all_magnitudes(norm):
    """Each turn of Newton's method then leaves few limits behind: slow, but as exact."""
    points = 2.0 ** -np.arange(30)[None]
    normals = np.random.default_rng(0).permutation(1.5 ** np.arange(30))[None]
    offsets = 1e-4 * (normals * points).sum(axis=1)
    with jax.enable_x64(True):
        delta = np.asarray(project(points, normals, offsets, norm))
    exact = shortest_by_bisection(points[0], normals[0], offsets[0], norm)
    np.testing.assert_allclose(delta[0], exact, atol=1e-12)


def linear(seed):
    return np.random.default_rng(seed).normal(size=(SIZE, CLASSES)).astype(np.float32)


def apply_linear(weights):
    return lambda images: (images.reshape(images.shape[0], -1) - 0.5) @ weights


def all_targets(logits_fn, images, labels):
    logits = logits_fn(images)
    return jnp.stack([losses.nth_wrong_class(logits, labels, n) for n in range(CLASSES - 1)])


def gaps_of(weights, images, labels):
    """(logit differences label - other [B, K], their gradients [B, K, D]) in float64."""
    weights, flat = weights.astype(np.float64), images.reshape(len(images), -1).astype(np.float64) - 0.5
    slopes = weights.T[labels][:, None] - weights.T[None]
    return np.einsum('bkd,bd->bk', slopes, flat), slopes


@pytest.mark.parametrize('norm', NORMS)
def test_minimal_perturbation_of_a_linear_classifier(norm):
    """Where no pixel meets 0 or 1: the least over classes of gap / dual norm of its slope."""
    random = np.random.default_rng(7)
    images = random.uniform(0.3, 0.7, (40, *SHAPE[1:])).astype(np.float32)
    weights = linear(1)
    logits_fn = apply_linear(weights)
    labels = np.asarray(logits_fn(images)).argmax(axis=1)
    gaps, slopes = gaps_of(weights, images, labels)
    dual = np.abs(slopes).sum(axis=2) if norm == 'linf' else np.sqrt((slopes**2).sum(axis=2))
    right = np.eye(CLASSES, dtype=bool)[labels]
    exact = np.where(right, np.inf, gaps / np.where(right, 1, dual)).min(axis=1)
    targets = all_targets(logits_fn, images, labels)
    attacked = np.asarray(jitted_fab(logits_fn, images, labels, targets=targets, norm=norm, steps=20))
    assert attacked.min() > 0 and attacked.max() < 1
    assert (np.asarray(logits_fn(attacked)).argmax(axis=1) != labels).all()
    found = length(attacked - images, norm)
    assert (found >= exact * (1 - 1e-4)).all()
    np.testing.assert_allclose(found, exact, rtol=0.01)
    # One target alone is worse for some example: the minimum is not the first row's.
    first = np.asarray(jitted_fab(logits_fn, images, labels, targets=targets[0], norm=norm, steps=20))
    assert (length(first - images, norm) > exact * 1.02).any()


def test_minimal_perturbation_of_a_linear_classifier_in_the_box():
    """Pixels at 0 and 1, so that the box matters: linear programming knows the answer."""
    random = np.random.default_rng(2)
    images = random.choice([0, 0.02, 0.5, 0.99, 1], (12, *SHAPE[1:])).astype(np.float32)
    weights = linear(2)
    logits_fn = apply_linear(weights)
    labels = np.asarray(logits_fn(images)).argmax(axis=1)
    gaps, slopes = gaps_of(weights, images, labels)
    flat = images.reshape(len(images), -1).astype(np.float64)
    exact = []
    for i, label in enumerate(labels):
        others = [k for k in range(CLASSES) if k != label]
        every = [shortest_by_linprog(flat[i], slopes[i, k], slopes[i, k].sum() / 2) for k in others]
        exact.append(min(one for one in every if one is not None))
    without_box = np.abs(slopes).sum(axis=2)
    free = np.where(gaps > 0, gaps / np.where(gaps > 0, without_box, 1), np.inf).min(axis=1)
    assert (np.asarray(exact) > 1.1 * free).any()
    targets = all_targets(logits_fn, images, labels)
    attacked = np.asarray(jitted_fab(logits_fn, images, labels, targets=targets, steps=40))
    np.testing.assert_allclose(length(attacked - images, 'linf'), exact, rtol=0.01)


@pytest.mark.parametrize('norm', NORMS)
def test_every_iteration_is_the_numpy_reference(norm):
    """A quadratic classifier, whose gradient is known: logits = x W + x^2 V, bisected projections, float64."""
    random = np.random.default_rng(3)
    images = random.uniform(size=SHAPE)
    first, second = random.normal(size=(2, SIZE, CLASSES))

    def logits_fn(x):
        flat = x.reshape(x.shape[0], -1)
        return flat @ first + flat**2 @ second

    labels = logits_fn(images).argmax(axis=1)
    targets = (labels + 1 + np.arange(SHAPE[0]) % (CLASSES - 1)) % CLASSES
    options = {'norm': norm, 'targets': targets}
    with jax.enable_x64(True):
        state = start(logits_fn, images, labels, epsilon=None, rng=None, **options)
        state = advance(logits_fn, images, labels, state, count=9, **options)
        state = jax.tree.map(np.asarray, state)
    assert state.current.dtype == np.float64
    for i in range(SHAPE[0]):
        current, nearest, distance = reference(images[i], labels[i], targets[i], first, second, norm, 9)
        np.testing.assert_allclose(state.current[i], current, atol=1e-8)
        np.testing.assert_allclose(state.nearest[i], nearest, atol=1e-8)
        np.testing.assert_allclose(state.distance[i], distance, atol=1e-8)
    assert np.isfinite(state.distance).all()


def reference(image, label, target, first, second, norm, count):
    """FAB-T on one image, as the paper's algorithm 1 without its final search."""
    clean, current, nearest, distance = image.ravel(), image.ravel(), image.ravel(), np.inf
    for _ in range(count):
        logits = current @ first + current**2 @ second
        slopes = first + 2 * current[:, None] * second
        normal = slopes[:, target] - slopes[:, label]
        offset = normal @ current - (logits[target] - logits[label])
        moves = [shortest_by_bisection(point, normal, offset, norm) for point in (current, clean)]
        near, far = length(np.stack(moves), norm)
        weight = min(near / (near + far), 0.1)
        moved = (1 - weight) * (current + 1.05 * moves[0]) + weight * (clean + 1.05 * moves[1])
        current = moved = np.clip(moved, 0, 1)
        if (moved @ first + moved**2 @ second).argmax() != label:
            away = length((moved - clean)[None], norm)[0]
            if away < distance:
                nearest, distance = moved, away
            current = clean + 0.9 * (moved - clean)
    return current.reshape(image.shape), nearest.reshape(image.shape), distance


def network(seed=0, shape=SHAPE):
    """A small convolutional network, smooth but not linear; its weights beside it."""
    keys = jax.random.split(jax.random.key(seed), 2)
    kernel = jax.random.normal(keys[0], (3, 3, shape[-1], 8))
    head = jax.random.normal(keys[1], (shape[1] * shape[2] * 8, CLASSES)) / 4

    def logits_fn(images):
        features = jax.lax.conv_general_dilated(
            images - 0.5, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return jnp.tanh(features).reshape(images.shape[0], -1) @ head

    return logits_fn, np.asarray(kernel), np.asarray(head)


@pytest.fixture(scope='module')
def problem():
    """(logits_fn, images, labels that it predicts, second likeliest classes)."""
    logits_fn = network()[0]
    images = np.random.default_rng(5).uniform(size=SHAPE).astype(np.float32)
    logits = logits_fn(images)
    labels = np.asarray(logits).argmax(axis=1)
    return logits_fn, images, labels, np.asarray(losses.nth_wrong_class(logits, labels, 0))


def begin(problem, norm, epsilon=None, rng=None):
    logits_fn, images, labels, targets = problem
    return start(logits_fn, images, labels, epsilon=epsilon, norm=norm, rng=rng, targets=targets)


def go_on(problem, norm, state, count=2, advance=advance):
    logits_fn, images, labels, targets = problem
    return advance(logits_fn, images, labels, state, norm=norm, targets=targets, count=count)


def assert_same(a, b, atol=1e-5):
    for left, right in zip(a, b):
        np.testing.assert_allclose(left, right, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize('norm', NORMS)
def test_pieces_add_up_to_the_whole_jitted_or_not(problem, norm):
    state = begin(problem, norm)
    for advanced in (advance, advance, fab_advance):
        state = go_on(problem, norm, state, advance=advanced)
    assert_same(state, go_on(problem, norm, begin(problem, norm), 6))
    logits_fn, images, labels, targets = problem
    attacked = fab(logits_fn, images, labels, targets=targets, norm=norm, steps=6)
    np.testing.assert_allclose(attacked, state.nearest, atol=1e-5)


@pytest.mark.parametrize('norm', NORMS)
def test_state_tells_what_was_found(problem, norm):
    logits_fn, images, labels, _ = problem
    states = [go_on(problem, norm, begin(problem, norm))]
    states.append(go_on(problem, norm, go_on(problem, norm, states[0])))
    for state in states:
        nearest = np.asarray(state.nearest)
        assert nearest.dtype == np.float32 and nearest.shape == SHAPE
        assert nearest.min() >= 0 and nearest.max() <= 1
        assert state.current.min() >= 0 and state.current.max() <= 1
        found = np.isfinite(state.distance)
        assert found.any()
        np.testing.assert_allclose(length(nearest - images, norm)[found], state.distance[found], rtol=1e-4)
        assert ((np.asarray(logits_fn(nearest)).argmax(axis=1) != labels) == found).all()
    assert (states[1].distance <= states[0].distance).all()
    assert (states[1].distance < states[0].distance).any()


def test_unrolled_equals_loop(problem, monkeypatch):
    state = begin(problem, 'linf')
    logits_fn, images, labels, targets = problem
    options = {'norm': 'linf', 'targets': targets, 'count': 2}
    results, loops = [], []
    for unrolls in (False, True):
        monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies, unrolls=unrolls: unrolls)
        program = jax.jit(lambda state: fab_advance(logits_fn, images, labels, state, **options)).lower(state)
        results.append(program.compile()(state))
        loops.append(program.as_text().count('stablehlo.while'))
    assert_same(*results)
    assert loops == [2, 1]  # the projection loops itself


def test_an_example_alone_is_as_in_a_padded_batch(problem):
    logits_fn, images, labels, targets = problem

    def attack(count, filler):
        padded = np.concatenate([images[:count], np.full((filler, *SHAPE[1:]), 0.5, np.float32)])
        # A filler with its own label as the target has a slope of 0.
        classes = [np.concatenate([given[:count], np.zeros(filler, int)]) for given in (labels, targets)]
        options = {'targets': classes[1], 'steps': 3, 'epsilon': 0.05, 'rng': jax.random.key(3)}
        return jitted_fab(logits_fn, padded, classes[0], **options)[:2]

    alone = attack(2, 0)
    assert (length(alone - images[:2], 'linf') > 0).all()
    np.testing.assert_allclose(attack(2, 5), alone, atol=1e-5)
    np.testing.assert_allclose(attack(6, 1), alone, atol=1e-5)


@pytest.mark.parametrize('norm', NORMS)
def test_random_start_lies_at_half_the_radius(problem, norm):
    logits_fn, _, labels, targets = problem
    grey = np.full(SHAPE, 0.5, np.float32)
    one, other = (begin((logits_fn, grey, labels, targets), norm, 0.2, jax.random.key(seed)) for seed in (0, 1))
    for state in (one, other):
        np.testing.assert_allclose(length(state.current - grey, norm), 0.1, rtol=1e-4)
        np.testing.assert_array_equal(state.nearest, grey)
    assert (length(one.current - other.current, norm) > 0.05).all()
    np.testing.assert_array_equal(begin((logits_fn, grey, labels, targets), norm).current, grey)
    clipped = begin((logits_fn, 0 * grey, labels, targets), norm, 0.2, jax.random.key(0)).current
    assert clipped.min() == 0 and clipped.max() > 0


def test_more_attacks_never_find_less(problem):
    logits_fn, images, labels, _ = problem
    targets = all_targets(logits_fn, images, labels)
    rng = jax.random.key(2)
    found = [
        length(jitted_fab(logits_fn, images, labels, targets=rows, steps=4, rng=rng, epsilon=0.1) - images, 'linf')
        for rows in (targets[:1], targets[:3])
    ]
    assert (found[1] <= found[0] + 1e-6).all() and (found[1] < found[0] - 1e-4).any()


def test_what_cannot_or_need_not_be_fooled_stays_as_it_is(problem):
    logits_fn, images, labels, _ = problem
    wrong = (labels + 1) % CLASSES
    mistaken = logits_fn, images, wrong, labels
    state = go_on(mistaken, 'linf', begin(mistaken, 'linf'))
    np.testing.assert_array_equal(state.distance, 0)
    np.testing.assert_array_equal(state.nearest, images)

    def constant(x):
        return jnp.zeros((x.shape[0], CLASSES)).at[:, 0].set(1) + 0 * x.sum()

    zeros = np.zeros_like(labels)
    certain = constant, images, zeros, zeros + 1
    state = go_on(certain, 'linf', begin(certain, 'linf'))
    assert np.isinf(state.distance).all()
    np.testing.assert_array_equal(state.nearest, images)
    assert np.isfinite(state.current).all()
    attacked = jitted_fab(constant, images, zeros, targets=zeros + 1, steps=2)
    np.testing.assert_array_equal(attacked, images)


def test_the_result_is_a_constant_to_differentiation(problem):
    logits_fn, images, labels, targets = problem

    def total(scale):
        return fab(lambda x: logits_fn(x) * scale, images * scale, labels, targets=targets, steps=2).sum()

    assert jax.grad(total)(0.9) == 0


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'norm': 'l1'}, "norm='l1': expected one of linf, l2"),
        ({'steps': 0}, 'steps=0'),
        ({'epsilon': 8}, 'epsilon=8'),
        ({'rng': jax.random.key(0)}, 'epsilon=None'),
        ({'images': np.zeros(SHAPE, np.uint8)}, 'images.dtype=uint8'),
        ({'labels': np.zeros(5, int)}, r'labels.shape=\(5,\)'),
        ({'targets': np.zeros(5, int)}, r'targets.shape=\(5,\)'),
        ({'targets': np.zeros((2, 5), int)}, r'targets.shape=\(5,\)'),
        ({'targets': np.zeros(6, np.float32)}, 'targets.dtype=float32'),
        ({'logits_fn': lambda x: x}, r'logits.shape=\(6, 4, 4, 2\)'),
    ],
)
def test_what_a_user_gets_wrong_is_named_on_one_line(problem, change, message):
    logits_fn, images, labels, targets = problem
    valid = {'logits_fn': logits_fn, 'images': images, 'labels': labels, 'targets': targets}
    with pytest.raises(ValueError, match=message) as caught:
        fab(**{**valid, **change})
    assert '\n' not in str(caught.value)


def test_the_pieces_check_what_they_are_given(problem):
    with pytest.raises(ValueError, match='count=0'):
        go_on(problem, 'linf', begin(problem, 'linf'), 0)
    with pytest.raises(ValueError, match='norm='):
        go_on(problem, 'l0', begin(problem, 'linf'), 1)


@pytest.mark.parametrize(('norm', 'epsilon'), [('linf', 0.02), ('l2', 0.12)])
def test_torchattacks_breaks_no_more(norm, epsilon):
    """200 pictures, the likeliest wrong class, ten iterations from the clean image, the same net in PyTorch."""
    torchattacks = pytest.importorskip('torchattacks')
    import torch

    shape = (200, 8, 8, 1)
    logits_fn, kernel, head = network(1, shape)
    images = np.random.default_rng(6).uniform(size=shape).astype(np.float32)
    logits = logits_fn(images)
    labels = np.asarray(logits).argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % CLASSES
    targets = losses.nth_wrong_class(logits, labels, 0)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
            self.head = torch.nn.Parameter(torch.from_numpy(head.copy()))

        def forward(self, nchw):
            features = torch.tanh(torch.nn.functional.conv2d(nchw - 0.5, self.kernel, padding=1))
            return features.permute(0, 2, 3, 1).reshape(len(nchw), -1) @ self.head

    their_norm = {'linf': 'Linf', 'l2': 'L2'}[norm]
    attack = torchattacks.FAB(Network().eval(), norm=their_norm, steps=10, multi_targeted=True)
    # The likeliest wrong class of what is classified correctly. (Its `__call__` hides what lies outside epsilon.)
    attack.target_class = 2
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    theirs = attack.attack_single_run_targeted(*batch).detach().numpy().transpose(0, 2, 3, 1)
    ours = np.asarray(jitted_fab(logits_fn, images, labels, targets=targets, norm=norm, steps=10))
    right = np.asarray(logits).argmax(axis=1) == labels
    found = [length(attacked - images, norm)[right] for attacked in (ours, theirs)]
    wrong = [np.asarray(logits_fn(attacked)).argmax(axis=1) != labels for attacked in (ours, theirs)]
    assert right.sum() == 180 and wrong[0].all() and wrong[1].sum() >= 199
    broken = [(away <= epsilon).sum() for away in found]
    assert 30 < broken[1] < 150
    assert broken[0] >= broken[1] - 1
    assert np.median(found[0]) <= 1.02 * np.median(found[1])
    assert np.isclose(found[0], found[1], rtol=0.01).mean() > 0.95
