"""FGSM and PGD against closed forms on linear classifiers, and against themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from convnorm_jax import attacks
from convnorm_jax.attacks import loops

SHAPE = (6, 5, 4, 2)
CLASSES = 7
EPSILON, STEP_SIZE = 0.06, 0.017

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture
def problem():
    """Images, labels and the weights [H*W*C, K] and bias of a linear classifier, float64."""
    random = np.random.default_rng(0)
    images = random.uniform(size=SHAPE)
    labels = random.integers(0, CLASSES, SHAPE[0])
    weights = random.normal(size=(np.prod(SHAPE[1:]), CLASSES))
    return images, labels, weights, random.normal(size=CLASSES)


def linear(weights, bias):
    return lambda images: images.reshape(len(images), -1) @ weights + bias


def network(seed=0):
    """A small convolutional network, smooth but not linear."""
    keys = jax.random.split(jax.random.key(seed), 2)
    kernel = jax.random.normal(keys[0], (3, 3, SHAPE[-1], 8))
    head = jax.random.normal(keys[1], (8, CLASSES))

    def logits_fn(images):
        features = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return jnp.tanh(features).mean((1, 2)) @ head * 5

    return logits_fn


def batch(count=SHAPE[0], seed=1):
    random = np.random.default_rng(seed)
    images = random.uniform(size=(count, *SHAPE[1:])).astype(np.float32)
    return images, random.integers(0, CLASSES, count)


def numpy_gradient(images, labels, weights, bias, loss):
    """The gradient of the per-example loss of a linear classifier, in closed form."""
    logits = images.reshape(len(images), -1) @ weights + bias
    target = np.eye(CLASSES)[labels]
    if loss == 'cross_entropy':
        by_logit = scipy.special.softmax(logits, axis=1) - target
    else:
        by_logit = np.eye(CLASSES)[np.argmax(logits - 1e9 * target, axis=1)] - target
    return (by_logit @ weights.T).reshape(images.shape)


@pytest.mark.parametrize('loss', ['cross_entropy', 'margin'])
def test_pgd_is_the_numpy_reference(problem, loss):
    images, labels, weights, bias = problem
    init = np.random.default_rng(5).uniform(-EPSILON, EPSILON, SHAPE)
    expected = np.clip(images + init, 0, 1)
    for _ in range(5):
        slope = numpy_gradient(expected, labels, weights, bias, loss)
        moved = expected + STEP_SIZE * np.sign(slope)
        expected = np.clip(np.clip(moved, images - EPSILON, images + EPSILON), 0, 1)
    options = {'epsilon': EPSILON, 'step_size': STEP_SIZE, 'steps': 5, 'loss': loss}
    with jax.enable_x64(True):
        result = attacks.pgd(linear(weights, bias), images, labels, init=init, **options)
        assert result.dtype == np.float64
        result = np.asarray(result)
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize('loss', ['cross_entropy', 'margin'])
def test_fgsm_is_the_numpy_reference(problem, loss):
    images, labels, weights, bias = problem
    slope = numpy_gradient(images, labels, weights, bias, loss)
    expected = np.clip(images + EPSILON * np.sign(slope), 0, 1)
    with jax.enable_x64(True):
        result = attacks.fgsm(linear(weights, bias), images, labels, epsilon=EPSILON, loss=loss)
        result = np.asarray(result)
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize('loss', ['cross_entropy', 'margin'])
def test_both_attacks_reach_the_optimum_of_a_binary_linear_classifier(loss):
    """Without clipping at 0 and 1 the margin loses exactly epsilon * ||w1 - w0||_1, never more."""
    random = np.random.default_rng(2)
    images = random.uniform(0.3, 0.7, SHAPE).astype(np.float32)
    labels = random.integers(0, 2, SHAPE[0])
    # Small enough that no softmax saturates: float32 then keeps every sign.
    weights = (0.1 * random.normal(size=(np.prod(SHAPE[1:]), 2))).astype(np.float32)
    logits_fn = linear(weights, np.zeros(2, np.float32))
    before = attacks.attack_loss(logits_fn(images), labels, 'margin')
    best = before + EPSILON * np.abs(weights[:, 1] - weights[:, 0]).sum()
    options = {'epsilon': EPSILON, 'loss': loss}
    for attacked in (
        attacks.fgsm(logits_fn, images, labels, **options),
        attacks.pgd(logits_fn, images, labels, step_size=STEP_SIZE, steps=8,
                    rng=jax.random.key(0), **options),
    ):  # fmt: skip
        after = attacks.attack_loss(logits_fn(attacked), labels, 'margin')
        np.testing.assert_allclose(after, best, rtol=1e-4)


def test_losses_are_those_of_scipy():
    random = np.random.default_rng(3)
    logits = 30 * random.normal(size=(9, CLASSES)).astype(np.float32)
    labels = random.integers(0, CLASSES, 9)
    of_label = logits[np.arange(9), labels]
    expected = scipy.special.logsumexp(logits.astype(np.float64), axis=1) - of_label
    result = attacks.attack_loss(logits, labels, 'cross_entropy')
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    others = np.where(np.eye(CLASSES, dtype=bool)[labels], -np.inf, logits).max(axis=1)
    margin = attacks.attack_loss(logits, labels, 'margin')
    np.testing.assert_allclose(margin, others - of_label, rtol=1e-6)
    assert ((np.asarray(margin) > 0) == (logits.argmax(axis=1) != labels)).all()


@pytest.mark.parametrize('norm', attacks.NORMS)
def test_targeted_pgd_reaches_the_optimum_of_a_linear_classifier(norm):
    """Away from the walls of [0, 1] the best perturbation towards a class is known in closed form."""
    random = np.random.default_rng(2)
    weights = random.normal(size=(np.prod(SHAPE[1:]), 2))
    images, labels = np.full(SHAPE, 0.5), np.arange(SHAPE[0]) % 2
    radius = 0.1 if norm == 'linf' else 0.4
    toward = (weights[:, 1 - labels] - weights[:, labels]).T  # [B, D]
    direction = np.sign(toward) if norm == 'linf' else toward / np.linalg.norm(toward, axis=1, keepdims=True)
    best = images + radius * direction.reshape(SHAPE)
    for options in ({}, {'targets': 1 - labels}):
        with jax.enable_x64(True):
            attacked = attacks.pgd(
                linear(weights, np.zeros(2)), images, labels, epsilon=radius, step_size=radius / 2, steps=60,
                norm=norm, rng=jax.random.key(0), loss='margin', **options,
            )  # fmt: skip
        np.testing.assert_allclose(attacked, best, atol=1e-6)


@pytest.mark.slow
def test_a_target_is_reached_where_it_can_be():
    images, labels = batch(32)
    targets = (labels + 1) % CLASSES
    logits_fn = network()
    options = {'epsilon': 0.3, 'step_size': 0.05, 'steps': 20, 'rng': jax.random.key(0)}
    reached = {
        restarts: np.asarray(
            logits_fn(attacks.pgd(logits_fn, images, labels, targets=targets, restarts=restarts, **options))
        ).argmax(1)
        == targets
        for restarts in (1, 3)
    }
    clean = np.asarray(logits_fn(images)).argmax(1) == targets
    assert reached[1].sum() > clean.sum() + 8 and (reached[3] >= reached[1]).all()


@pytest.mark.parametrize('restarts', [1, 3])
def test_result_stays_in_the_ball_and_in_the_pixel_range(restarts):
    images, labels = batch()
    images = np.where(images < 0.3, 0, np.where(images > 0.7, 1, images)).astype(np.float32)
    result = np.asarray(attacks.pgd(
        network(), images, labels, epsilon=EPSILON, step_size=0.5, steps=3,
        rng=jax.random.key(0), restarts=restarts,
    ))  # fmt: skip
    assert result.dtype == np.float32 and result.shape == images.shape
    assert result.min() >= 0 and result.max() <= 1
    assert np.abs(result - images).max() <= EPSILON + 1e-6
    assert np.abs(result - images).max() > 0.99 * EPSILON


def test_uniform_start_fills_the_ball():
    noise = attacks.uniform_start(jax.random.key(0), jnp.zeros((8, 16, 16, 3)), 0.1)
    assert np.abs(noise).max() <= 0.1
    np.testing.assert_allclose(np.std(noise), 0.1 / np.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(np.mean(noise), 0, atol=0.003)


@pytest.mark.parametrize('restarts', [1, 3])
def test_jitted_equals_eager_with_traced_radius_and_step(restarts):
    images, labels = batch()

    def attack(epsilon, step_size):
        return attacks.pgd(network(), images, labels, epsilon=epsilon, step_size=step_size,
                           steps=4, rng=jax.random.key(7), restarts=restarts)  # fmt: skip

    eager, jitted = attack(EPSILON, STEP_SIZE), jax.jit(attack)(EPSILON, STEP_SIZE)
    np.testing.assert_allclose(eager, jitted, atol=1e-6)


@pytest.mark.parametrize('restarts', [1, 3])
def test_unrolled_equals_loop(monkeypatch, restarts):
    images, labels = batch()
    results, networks = {}, {}
    for unroll in (True, False):
        monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies, unroll=unroll: unroll)
        compiled = jax.jit(lambda x: attacks.pgd(
            network(), x, labels, epsilon=EPSILON, step_size=STEP_SIZE, steps=4,
            rng=jax.random.key(7), restarts=restarts,
        )).lower(images).compile()  # fmt: skip
        networks[unroll] = compiled.as_text().count('conv_general_dilated')
        results[unroll] = compiled(images)
    assert networks[True] > 2 * networks[False] > 0
    np.testing.assert_allclose(results[True], results[False], atol=1e-6)


def test_only_short_attacks_are_unrolled_and_only_for_a_cpu():
    """As the platform is that the program is for, not the one that traces it."""
    assert loops.unrolls(50) and not loops.unrolls(51)
    images, labels = batch(4)[0], np.zeros(4, int)
    convolve = lambda x: jax.lax.conv_general_dilated(
        x, jnp.ones((3, 3, images.shape[3], 5)), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    attack = jax.jit(
        lambda x: attacks.pgd(
            lambda x: convolve(x).mean((1, 2)), x, labels, epsilon=EPSILON, step_size=STEP_SIZE, steps=4
        )
    )
    while_loops = {}
    for platform in ('cpu', 'cuda', 'tpu'):
        exported = jax.export.export(attack, platforms=[platform])(jax.ShapeDtypeStruct(images.shape, jnp.float32))
        while_loops[platform] = exported.mlir_module().count('stablehlo.while')
    assert while_loops == {'cpu': 0, 'cuda': 1, 'tpu': 1}
    # The compiler sees no choice: a convolution within a conditional may be slow, too.
    assert ' conditional(' not in attack.lower(images).compile().as_text()
    both = jax.export.export(attack, platforms=['cpu', 'tpu'])(jax.ShapeDtypeStruct(images.shape, jnp.float32))
    found = both.call(images)
    np.testing.assert_allclose(found, attack(images), atol=1e-6)


def test_an_attack_in_a_loop_is_traced_once_for_all_platforms():
    images, labels = batch(4)
    traces = []

    def logits_fn(x):
        traces.append(1)
        return network()(x)

    jax.jit(lambda x: attacks.pgd(logits_fn, x, labels, epsilon=EPSILON, step_size=STEP_SIZE, steps=4)).lower(images)
    assert len(traces) == 2  # for the number of classes, and the body of both loops


@pytest.mark.slow
def test_more_restarts_never_find_less():
    images, _ = batch(64)
    logits_fn = network()
    labels = np.asarray(logits_fn(images)).argmax(axis=1)
    wrong, losses = [], []
    for restarts in (1, 2, 5):
        attacked = attacks.pgd(logits_fn, images, labels, epsilon=0.02, step_size=0.01, steps=2,
                               rng=jax.random.key(3), restarts=restarts)  # fmt: skip
        logits = logits_fn(attacked)
        wrong.append(np.asarray(logits).argmax(axis=1) != labels)
        losses.append(np.asarray(attacks.attack_loss(logits, labels, 'cross_entropy')))
    assert 0 < wrong[0].sum() < 64
    for fewer in (0, 1):
        assert (wrong[fewer + 1] >= wrong[fewer]).all()
        robust = ~wrong[fewer + 1]
        assert (losses[fewer + 1][robust] >= losses[fewer][robust] - 1e-5).all()
    # The first perturbation that fools is the one that stays.
    np.testing.assert_allclose(losses[2][wrong[0]], losses[0][wrong[0]], rtol=1e-4)


@pytest.mark.parametrize('start', ['clean', 'init', 'rng'])
def test_an_example_alone_is_as_in_a_padded_batch(start):
    images, labels = batch()
    noise = np.random.default_rng(4).uniform(-EPSILON, EPSILON, SHAPE).astype(np.float32)

    def attack(count, filler):
        padded = np.concatenate([images[:count], filler])
        options = {
            'clean': {},
            'init': {'init': np.concatenate([noise[:count], np.zeros_like(filler)])},
            'rng': {'rng': jax.random.key(0)},
        }[start]
        padded_labels = np.concatenate([labels[:count], np.zeros(len(filler), int)])
        return attacks.pgd(network(), padded, padded_labels, epsilon=EPSILON,
                           step_size=STEP_SIZE, steps=3, **options)[:count]  # fmt: skip

    alone = attack(2, np.zeros((0, *SHAPE[1:]), np.float32))
    padded = attack(2, np.zeros((5, *SHAPE[1:]), np.float32))
    among_others = attack(6, np.ones((1, *SHAPE[1:]), np.float32))[:2]
    np.testing.assert_allclose(padded, alone, atol=1e-6)
    np.testing.assert_allclose(among_others, alone, atol=1e-6)


def test_the_result_is_a_constant_to_differentiation():
    images, labels = batch()

    def total(scale):
        def logits_fn(x):
            return network()(x) * scale

        return attacks.fgsm(logits_fn, images * scale, labels, epsilon=EPSILON).sum()

    assert jax.grad(total)(0.9) == 0


def valid():
    images, labels = batch()
    return {'images': images, 'labels': labels, 'epsilon': 0.1, 'step_size': 0.1, 'steps': 1}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'epsilon': -0.1}, 'epsilon=-0.1'),
        ({'epsilon': 8}, 'epsilon=8'),
        ({'epsilon': float('nan')}, 'epsilon=nan'),
        ({'step_size': 0}, 'step_size=0'),
        ({'step_size': 2}, 'step_size=2'),
        ({'steps': 0}, 'steps=0'),
        ({'steps': 2.5}, 'steps=2.5'),
        ({'loss': 'hinge'}, "loss='hinge': expected one of cross_entropy, margin"),
        ({'norm': 'l1'}, "norm='l1': expected one of linf, l2"),
        ({'norm': 'l2', 'epsilon': -1}, 'epsilon=-1'),
        ({'targets': np.zeros(5, int)}, r'targets.shape=\(5,\)'),
        ({'rng': jax.random.split(jax.random.key(0), 5)}, r'rng.shape=\(5,\): expected one key, or 6'),
        ({'images': np.zeros((6, 5, 4), np.float32)}, r'images.shape=\(6, 5, 4\)'),
        ({'images': np.zeros(SHAPE, np.uint8)}, 'images.dtype=uint8'),
        ({'labels': np.zeros(5, int)}, r'labels.shape=\(5,\)'),
        ({'labels': np.zeros((6, CLASSES), int)}, r'labels.shape=\(6, 7\)'),
        ({'labels': np.zeros(6, np.float32)}, 'labels.dtype=float32'),
        ({'init': np.zeros((6, 5, 4, 1))}, r'init.shape=\(6, 5, 4, 1\)'),
        ({'restarts': 0}, 'restarts=0'),
        ({'restarts': 2}, 'restarts=2: more than one needs rng'),
        ({'restarts': 2, 'rng': jax.random.key(0), 'init': np.zeros(SHAPE)}, 'restarts=2'),
        ({'logits_fn': lambda x: x}, r'logits.shape=\(6, 5, 4, 2\)'),
    ],
)
def test_what_a_user_gets_wrong_is_named_on_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        attacks.pgd(**{'logits_fn': network(), **valid(), **change})
    assert '\n' not in str(caught.value)


def test_fgsm_checks_the_same():
    images, labels = batch()
    with pytest.raises(ValueError, match='epsilon=8'):
        attacks.fgsm(network(), images, labels, epsilon=8)
    with pytest.raises(ValueError, match='loss='):
        attacks.fgsm(network(), images, labels, epsilon=0.1, loss='other')


def test_torchattacks_agrees():
    """FGSM, and PGD from the clean image, on the same linear classifier in PyTorch."""
    torchattacks = pytest.importorskip('torchattacks')
    import torch

    images, labels = batch()
    random = np.random.default_rng(0)
    weights = (0.2 * random.normal(size=(np.prod(SHAPE[1:]), CLASSES))).astype(np.float32)
    logits_fn = linear(weights, np.zeros(CLASSES, np.float32))

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.from_numpy(weights))

        def forward(self, nchw):
            return nchw.permute(0, 2, 3, 1).reshape(len(nchw), -1) @ self.weights

    model = Linear().eval()
    torch_batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    fgsm = torchattacks.FGSM(model, eps=EPSILON)(*torch_batch)
    pgd = torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=5, random_start=False)
    options = {'epsilon': EPSILON, 'step_size': STEP_SIZE, 'steps': 5}
    for theirs, ours in (
        (fgsm, attacks.fgsm(logits_fn, images, labels, epsilon=EPSILON)),
        (pgd(*torch_batch), attacks.pgd(logits_fn, images, labels, **options)),
    ):
        close = np.abs(theirs.detach().numpy().transpose(0, 2, 3, 1) - ours) < 1e-5
        assert close.mean() >= 0.99
