"""Auto-PGD against the algorithm written out in NumPy, torchattacks and closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from convnorm_jax.attacks import losses, projections
from convnorm_jax.attacks.apgd import _surface, _windows, apgd, apgd_advance, apgd_start

SHAPE = (8, 5, 4, 2)
SIZE = 40
CLASSES = 7
EPSILON = {'linf': 0.0625, 'l2': 0.25}
FIRST, SECOND = (np.random.default_rng(0).normal(size=shape) for shape in ((SIZE, 9), (9, CLASSES)))

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """These nets are so small that to compile fifty copies of an iteration would take most of the time."""
    monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies: False)


def problem(count, strongest):
    """Images, labels, and what is added to the logits [count, K]: 0 to `strongest` for the label, so that
    some examples are fooled early and others never. Float64."""
    images = np.random.default_rng(1).uniform(size=(count, *SHAPE[1:]))
    labels = np.argmax(np.sin(images.reshape(count, -1) @ FIRST) @ SECOND, axis=1)
    return images, labels, np.linspace(0, strongest, count)[:, None] * np.eye(CLASSES)[labels]


def network(bonus):
    """Neither linear nor monotone, so that steps overshoot."""
    return lambda images: jnp.sin(images.reshape(len(images), -1) @ FIRST) @ SECOND + bonus


def batch(count=SHAPE[0]):
    """Float32 images and the labels that `convolutional` gives them."""
    images = np.random.default_rng(1).uniform(size=(count, *SHAPE[1:])).astype(np.float32)
    return images, np.asarray(convolutional(images)).argmax(1)


def convolutional(images):
    """A small convolutional net: [B, *SHAPE[1:]] -> [B, K]."""
    kernel, head = FIRST[:27, :8].reshape(3, 3, 3, 8)[:, :, :2], SECOND[:8]
    features = jax.lax.conv_general_dilated(
        images, kernel.astype(np.float32), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return 10 * jnp.tanh(features).mean((1, 2)) @ head.astype(np.float32)


def run(logits_fn, images, labels, steps, *, rng, **options):
    """The state after a whole run."""
    state = apgd_start(logits_fn, images, labels, rng=rng, **options)
    return apgd_advance(logits_fn, images, labels, state, steps=steps, count=steps, **options)


def run_in_float64(bonus, images, labels, steps, key, **options):
    """The start and the end, as NumPy arrays."""
    with jax.enable_x64(True):

        @jax.jit
        def both(images, labels):
            logits_fn, rng = network(bonus), jax.random.key(key)
            start = apgd_start(logits_fn, images, labels, rng=rng, **options)
            end = apgd_advance(logits_fn, images, labels, start, steps=steps, count=steps, **options)
            return start.perturbed, end

        return jax.tree.map(np.asarray, both(images, labels))


# ------------------------------------------------------------------ the algorithm in NumPy


def numpy_loss(x, label, bonus, loss):
    """Loss, prediction and gradient of `network` at one example [SIZE], in closed form."""
    logits = np.sin(x @ FIRST) @ SECOND + bonus
    unit = np.eye(CLASSES)
    if loss == 'cross_entropy':
        value = scipy.special.logsumexp(logits) - logits[label]
        by_logit = scipy.special.softmax(logits) - unit[label]
    else:
        order = np.argsort(-logits)
        other = order[1] if order[0] == label else order[0]
        scale = logits[order[0]] - logits[order[2]]
        value = (logits[other] - logits[label]) / scale
        by_logit = (unit[other] - unit[label] - value * (unit[order[0]] - unit[order[2]])) / scale
    return value, logits.argmax(), ((by_logit @ SECOND.T) * np.cos(x @ FIRST)) @ FIRST.T


def numpy_project(x, image, epsilon, norm):
    if norm == 'linf':
        return np.clip(np.clip(x, image - epsilon, image + epsilon), 0, 1)
    delta = x - image
    return np.clip(image + delta * min(1, epsilon / np.linalg.norm(delta)), 0, 1)


def numpy_apgd(image, label, bonus, start, epsilon, norm, loss, steps):
    """Algorithm 1 for one example with its whole history: (best loss, best x, step size, fooled x or None)."""
    checks, last, window = {}, 0, int(0.22 * steps)
    while last + window <= steps:
        last += window
        checks[last] = window
        window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps))
    points, values, slopes = [], [], []

    def visit(x):
        value, prediction, slope = numpy_loss(x, label, bonus, loss)
        points.append(x), values.append(value), slopes.append(slope)
        return prediction != label

    if visit(start):
        return values[0], start, 2 * epsilon, start
    x = before = start
    slope, eta, halved = slopes[0], 2 * epsilon, [True]
    best_at_check = values[0]
    for done in range(1, steps + 1):
        up = np.sign(slope) if norm == 'linf' else slope / np.linalg.norm(slope)
        z = numpy_project(x + eta * up, image, epsilon, norm)
        mixed = z if done == 1 else x + 0.75 * (z - x) + 0.25 * (x - before)
        before, x = x, numpy_project(mixed, image, epsilon, norm)
        fooled = visit(x)
        slope, best = slopes[-1], int(np.argmax(values))
        if done in checks:
            recent = [0.0, *values[1:]][done - checks[done] : done + 1]
            rises = sum(b > a for a, b in itertools.pairwise(recent))
            halved.append(rises <= 0.75 * checks[done] or (not halved[-1] and best_at_check >= values[best]))
            best_at_check = values[best]
            if halved[-1]:
                eta, x, slope = eta / 2, points[best], slopes[best]
        if fooled:
            return values[best], points[best], eta, points[-1]
    return values[best], points[best], eta, None


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('loss', ['cross_entropy', 'dlr'])
def test_the_run_is_that_of_the_algorithm_in_numpy(norm, loss):
    images, labels, bonus = problem(16, strongest=8)
    # Twenty, with nothing converged yet: at a maximum, rounding decides whether the loss rose.
    steps, epsilon = 20, EPSILON[norm]
    start, state = run_in_float64(bonus, images, labels, steps, 3, epsilon=epsilon, norm=norm, loss=loss)
    assert state.perturbed.dtype == state.best_loss.dtype == np.float64
    adversarial = np.asarray(state.adversarial)
    halvings = []
    for i in range(16):
        value, best, eta, fooled = numpy_apgd(
            images[i].ravel(), labels[i], bonus[i], start[i].ravel(), epsilon, norm, loss, steps
        )
        np.testing.assert_allclose(state.best_loss[i], value, rtol=1e-6)
        np.testing.assert_allclose(state.best_images[i].ravel(), best, atol=1e-6)
        np.testing.assert_allclose(state.step_size[i], eta, rtol=1e-12)
        assert state.fooled[i] == (fooled is not None)
        np.testing.assert_allclose(adversarial[i].ravel(), best if fooled is None else fooled, atol=1e-6)
        halvings.append(round(np.log2(2 * epsilon / eta)))
    # Both ends of an example's run, and different decisions about the step, were seen.
    assert 0 < state.fooled.sum() < 16 and len(set(halvings)) >= 4


def test_checks_come_where_the_paper_puts_them():
    """Section 3.2: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    p = [0, 0.22]
    while p[-1] + max(p[-1] - p[-2] - 0.03, 0.06) <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    for steps in (100, 1000):
        table = _windows(steps)
        (at,) = np.nonzero(table)
        np.testing.assert_array_equal(at + 1, np.round(steps * np.array(p[1:])))
        np.testing.assert_array_equal(table[at], np.diff(np.round(steps * np.array(p))))
    assert _windows(1).tolist() == [1]  # never an empty window
    # int(0.22 * 40) = 8, then one less each time, down to int(0.06 * 40) = 2.
    assert _windows(40)[_windows(40) > 0].tolist() == [8, 7, 6, 5, 4, 3, 2, 2, 2]


def test_the_start_lies_on_the_surface_of_the_ball():
    images = np.full((64, 8, 8, 3), 0.5, np.float32)
    labels, rng = np.zeros(64, int), jax.random.key(0)
    logits_fn = lambda x: x.mean((1, 2))
    starts = {
        norm: np.asarray(
            apgd_start(logits_fn, images, labels, epsilon=0.1, norm=norm, rng=rng, loss='margin').perturbed
        ).reshape(64, -1) - 0.5
        for norm in ('linf', 'l2')
    }  # fmt: skip
    np.testing.assert_allclose(np.abs(starts['linf']).max(1), 0.1, rtol=1e-5)
    np.testing.assert_allclose(starts['linf'].std(), 0.1 / np.sqrt(3), rtol=0.03)
    np.testing.assert_allclose(np.linalg.norm(starts['l2'], axis=1), 0.1, rtol=1e-5)
    # Normal, not uniform: kurtosis 3, not 1.8.
    np.testing.assert_allclose(np.mean(starts['l2'] ** 4) / np.mean(starts['l2'] ** 2) ** 2, 3, rtol=0.1)


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('loss', ['margin', 'cross_entropy'])
def test_the_optimum_of_a_binary_linear_classifier_is_found(norm, loss):
    """The margin can lose exactly epsilon times the dual norm of w1 - w0, where no pixel meets 0 or 1."""
    random = np.random.default_rng(2)
    images = random.uniform(0.4, 0.6, SHAPE).astype(np.float32)
    labels = random.integers(0, 2, SHAPE[0])
    slope = (0.1 * random.normal(size=SIZE)).astype(np.float32)
    dual = np.abs(slope).sum() if norm == 'linf' else np.linalg.norm(slope)
    epsilon = EPSILON[norm]

    @jax.jit
    def attacked(distance):
        """Attacks a classifier whose boundary is `distance` epsilons away from every example."""
        sign = np.where(labels == 1, 1, -1)
        shift = sign * distance * epsilon * dual - (images.reshape(len(images), -1) @ slope)

        def logits_fn(x):
            score = x.reshape(len(x), -1) @ slope + shift
            return jnp.stack([jnp.zeros_like(score), score], axis=1)

        options = {'epsilon': epsilon, 'norm': norm, 'loss': loss, 'rng': jax.random.key(0)}
        state = run(logits_fn, images, labels, 20, **options)
        return state, losses.attack_loss(logits_fn(state.adversarial), labels, 'margin')

    state, margin = attacked(1.5)
    assert not state.fooled.any()
    np.testing.assert_allclose(margin, -0.5 * epsilon * dual, rtol=1e-3)
    assert attacked(0.99)[0].fooled.all()
    assert not attacked(1.01)[0].fooled.any()


# ------------------------------------------------------------------ the published code


@pytest.mark.parametrize(
    ('norm', 'loss', 'goal'), [('linf', 'cross_entropy', None), ('l2', 'dlr', None), ('linf', 'dlr', 2)]
)
def test_torchattacks_agrees(monkeypatch, norm, loss, goal):
    """The same start, in float64: the same best points, losses and victims after 100 iterations.

    Not compared: the targeted attack in l2, where torchattacks gives all examples the first one's step.
    """
    torch, torchattacks = pytest.importorskip('torch'), pytest.importorskip('torchattacks')
    images, labels, bonus = problem(24, strongest=8)
    epsilon = EPSILON[norm]
    with jax.enable_x64(True):
        targets = (
            None if goal is None else losses.nth_wrong_class(network(bonus)(images), jnp.asarray(labels), goal - 2)
        )
        noise = np.asarray(_surface(jax.random.key(5), jnp.asarray(images), norm))
        _, state = run_in_float64(bonus, images, labels, 100, 5, epsilon=epsilon, norm=norm, loss=loss, targets=targets)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torch.nn.Parameter(torch.from_numpy(w)) for w in (FIRST, SECOND))

        def forward(self, x):
            hidden = torch.sin(x.permute(0, 2, 3, 1).reshape(len(x), -1) @ self.first)
            return hidden @ self.second + torch.from_numpy(bonus)

    noise = torch.tensor(noise.transpose(0, 3, 1, 2))
    monkeypatch.setattr(torch, 'rand', lambda shape: (noise + 1) / 2)
    monkeypatch.setattr(torch, 'randn', lambda shape: noise)
    settings = {'norm': {'linf': 'Linf', 'l2': 'L2'}[norm], 'eps': epsilon, 'steps': 100}
    if goal is None:
        reference = torchattacks.APGD(Net(), loss={'cross_entropy': 'ce', 'dlr': 'dlr'}[loss], **settings)
    else:
        reference = torchattacks.APGDT(Net(), n_classes=CLASSES, **settings)
        reference.target_class = goal
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # its bookkeeping would be float32
    try:
        best, robust, best_loss, _ = reference.attack_single_run(
            torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(labels)
        )
    finally:
        torch.set_default_dtype(before)
    robust = robust.numpy()
    np.testing.assert_array_equal(state.fooled, ~robust)
    assert 0 < robust.sum() < 24
    np.testing.assert_allclose(state.best_loss[robust], best_loss.detach().numpy()[robust], rtol=1e-6)
    expected = best.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(state.best_images[robust], expected[robust], atol=1e-6)


# ------------------------------------------------------------------ our own promises


@pytest.mark.parametrize(('norm', 'epsilon'), [('linf', 0.02), ('l2', 0.1)])
def test_result_is_adversarial_in_the_ball_and_in_the_pixel_range(norm, epsilon):
    images, _ = batch(16)
    images = np.where(images < 0.3, 0, np.where(images > 0.7, 1, images)).astype(np.float32)
    labels = np.asarray(convolutional(images)).argmax(1)
    labels[:2] = (labels[:2] + 1) % CLASSES
    attack = jax.jit(
        lambda x, y: apgd(convolutional, x, y, epsilon=epsilon, norm=norm, steps=15, rng=jax.random.key(0))
    )
    result = np.asarray(attack(images, labels))
    assert result.dtype == np.float32 and result.shape == images.shape
    assert result.min() >= 0 and result.max() <= 1
    size = np.asarray(projections.norm_of(result - images, norm))
    assert size.max() <= epsilon + 1e-6 and size.max() > 0.9 * epsilon
    # What is wrong as it is, stays; of the rest some are fooled, and the others have gone uphill.
    np.testing.assert_array_equal(result[:2], images[:2])
    wrong = np.asarray(convolutional(result)).argmax(1) != labels
    assert wrong[:2].all() and 0 < wrong[2:].sum() < 14
    before, after = (losses.attack_loss(convolutional(x), labels, 'cross_entropy') for x in (images, result))
    assert (after[2:] > before[2:]).all()


def test_chunks_give_the_whole():
    images, labels = batch(16)
    options = {'epsilon': 0.02, 'norm': 'linf', 'loss': 'dlr'}
    advance = jax.jit(apgd_advance, static_argnames=('logits_fn', 'norm', 'loss', 'steps', 'count'))
    start = jax.jit(lambda x, y: apgd_start(convolutional, x, y, rng=jax.random.key(2), **options))(images, labels)

    def result(*chunks):
        state = start
        for count in chunks:
            state = advance(convolutional, images, labels, state, steps=20, count=count, **options)
        return vars(jax.tree.map(np.asarray, state))

    whole = result(20)
    assert 0 < whole['fooled'].sum() < 16 and len(set(whole['step_size'].tolist())) > 1
    # Past the end nothing moves: the last of three chunks is too long.
    for name, leaf in result(8, 8, 8).items():
        np.testing.assert_array_equal(leaf, whole[name], err_msg=name)


@pytest.mark.slow
def test_jitted_equals_eager_with_a_traced_radius():
    images, labels = batch()

    def attack(epsilon):
        return apgd(convolutional, images, labels, epsilon=epsilon, steps=6, norm='l2', rng=jax.random.key(7))

    np.testing.assert_allclose(attack(0.1), jax.jit(attack)(0.1), atol=1e-5)


def test_unrolled_equals_loop(monkeypatch):
    images, labels = batch()
    results = []
    for unroll in (True, False):
        monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies, unroll=unroll: unroll)
        options = {'epsilon': 0.01, 'norm': 'linf', 'loss': 'margin', 'rng': jax.random.key(7)}
        results.append(jax.jit(lambda x, y, options=options: run(convolutional, x, y, 4, **options))(images, labels))
    for ours, others in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(ours, others, rtol=1e-4, atol=1e-5)


def test_an_example_alone_is_as_in_a_padded_batch():
    images, labels = batch()
    keys = jax.random.split(jax.random.key(1), len(images))

    @jax.jit
    def attack(images, labels, rng):
        return apgd(convolutional, images, labels, rng=rng, epsilon=0.1, norm='l2', steps=8, loss='dlr')

    whole = attack(images, labels, keys)
    packed = np.array([5, 2])
    alone = attack(images[packed], labels[packed], keys[packed])
    np.testing.assert_allclose(alone, whole[packed], atol=1e-5)
    full = np.array([5, 2, 0, 0, 0, 0, 0, 0])
    blank = np.where(np.arange(8)[:, None, None, None] < 2, images[full], 0).astype(np.float32)
    np.testing.assert_allclose(attack(blank, labels[full], keys[full])[:2], alone, atol=1e-5)


def test_targets_lead_the_way_but_any_wrong_class_is_a_success():
    images, labels = batch(32)
    targets = np.asarray(losses.nth_wrong_class(convolutional(images), labels, 3))

    @jax.jit
    def predicted(targets):
        options = {
            'epsilon': 0.1,
            'norm': 'linf',
            'rng': jax.random.key(0),
            'loss': 'cross_entropy',
            'targets': targets,
        }
        state = run(convolutional, images, labels, 15, **options)
        return state.fooled, jnp.argmax(convolutional(state.adversarial), axis=-1)

    reached = []
    for goal in (None, targets):
        fooled, classes = map(np.asarray, predicted(goal))
        np.testing.assert_array_equal(fooled, classes != labels)
        assert (classes[fooled] != targets[fooled]).any()
        reached.append((classes == targets).sum())
    assert reached[1] > reached[0] + 3


def valid():
    images, labels = batch()
    return {'logits_fn': convolutional, 'images': images, 'labels': labels, 'epsilon': 0.1, 'steps': 2,
            'rng': jax.random.key(0)}  # fmt: skip


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'epsilon': 8}, 'epsilon=8'),
        ({'norm': 'l1'}, "norm='l1': expected one of linf, l2"),
        ({'steps': 0}, 'steps=0'),
        ({'steps': 2.5}, 'steps=2.5'),
        ({'loss': 'hinge'}, "loss='hinge': expected one of"),
        ({'targets': np.zeros(5, int)}, r'targets.shape=\(5,\)'),
        ({'targets': np.zeros(8, np.float32)}, 'targets.dtype=float32'),
        ({'rng': jax.random.split(jax.random.key(0), 5)}, r'rng.shape=\(5,\): expected one key, or 8'),
        ({'images': np.zeros(SHAPE, np.uint8)}, 'images.dtype=uint8'),
        ({'labels': np.zeros(5, int)}, r'labels.shape=\(5,\)'),
        ({'loss': 'dlr', 'logits_fn': lambda x: x[:, 0, 0]}, r'logits.shape=\(8, 2\)'),
    ],
)
def test_what_a_user_gets_wrong_is_named_on_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        apgd(**{**valid(), **change})
    assert '\n' not in str(caught.value)


def test_a_chunk_is_checked_too():
    options = valid()
    fixed = {'epsilon': 0.1, 'norm': 'linf', 'loss': 'margin'}
    logits_fn, images, labels = (options[name] for name in ('logits_fn', 'images', 'labels'))
    state = apgd_start(logits_fn, images, labels, rng=options['rng'], **fixed)
    with pytest.raises(ValueError, match='count=0: expected an integer of at least 1'):
        apgd_advance(logits_fn, images, labels, state, steps=5, count=0, **fixed)
    with pytest.raises(ValueError, match=r'state.perturbed.shape=\(8, 5, 4, 2\): expected \(3, 5, 4, 2\)'):
        apgd_advance(logits_fn, images[:3], labels[:3], state, steps=5, count=1, **fixed)
