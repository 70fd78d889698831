"""What the attacks are given, good and bad, each of them in the same way: ranges, classes, radii, keys, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import attacks
from convnorm_jax.attacks import inputs, losses, projections
from convnorm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHAPE, CLASSES, BATCH = (3, 2, 4), 4, 4  # as many channels as images: an epsilon of shape [B] might broadcast over them
RADII = {'linf': 0.05, 'l2': 0.3}


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """Loops stay loops: they compile faster."""
    monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies: False)


def logits_fn(images, scale=1.0):
    random = np.random.default_rng(0)
    hidden, last = (random.normal(size=size) for size in ((24, 8), (8, CLASSES)))
    dtype = images.dtype
    flat = images.reshape(images.shape[0], 24) - 0.5
    return jnp.maximum(flat @ jnp.asarray(hidden, dtype), 0) @ jnp.asarray(last, dtype) * jnp.asarray(scale, dtype)


@pytest.fixture(scope='module')
def batch():
    images = np.random.default_rng(1).uniform(0.2, 0.8, (BATCH, *SHAPE)).astype(np.float32)
    return images, np.asarray(logits_fn(jnp.asarray(images)).argmax(-1))


KEY = jax.random.key(0)


def fgsm(f, x, y, epsilon, rng=KEY, **_):
    return attacks.fgsm(f, x, y, epsilon=epsilon)


def pgd(f, x, y, epsilon, rng=KEY, norm='linf', **options):
    return attacks.pgd(f, x, y, epsilon=epsilon, step_size=0.02, steps=3, rng=rng, norm=norm, **options)


def apgd(f, x, y, epsilon, rng=KEY, norm='linf', **options):
    return attacks.apgd(f, x, y, epsilon=epsilon, steps=5, rng=rng, norm=norm, **options)


def fab(f, x, y, epsilon, rng=KEY, norm='linf', targets=None):
    # Where the targets are not what is looked at: the class next to the label, which is one even if the label is none.
    targets = (y + 1) % CLASSES if targets is None else targets
    return attacks.fab(f, x, y, epsilon=epsilon, targets=targets, steps=3, norm=norm, rng=rng)


def square(f, x, y, epsilon, rng=KEY, norm='linf', **_):
    return attacks.square(f, x, y, epsilon=epsilon, queries=5, rng=rng, norm=norm).images


def simba(f, x, y, epsilon, rng=KEY, **_):
    return attacks.simba(f, x, y, epsilon=epsilon, steps=3, rng=rng, basis='dct').images


ATTACKS = {attack.__name__: attack for attack in (fgsm, pgd, apgd, fab, square, simba)}
EACH = pytest.mark.parametrize('name', ATTACKS)
IN_BOTH_NORMS = [
    (name, norm) for name in ATTACKS for norm in inputs.NORMS if norm == 'linf' or name not in ('fgsm', 'simba')
]


def ensemble(f, x, y, **options):
    options = {'epsilon': 0.05, 'rng': KEY, 'steps': 3, 'queries': 3, 'log': lambda _: None, **options}
    return attacks.run_ensemble(f, x, y, **options)


# --- pixels ----------------------------------------------------------------------------------

OUTSIDE = {
    'of 0 to 255': lambda x: 255 * x,
    'normalized': lambda x: (x - 0.5) / 0.25,
    'a little below': lambda x: x - x.min() - np.float32(0.001),
    'NaN': lambda x: np.where(x > 0.75, np.float32('nan'), x),
}


@EACH
@pytest.mark.parametrize('kind', OUTSIDE)
def test_pixels_outside_are_refused(batch, name, kind):
    images, labels = OUTSIDE[kind](batch[0]), batch[1]
    for given in (images, jnp.asarray(images)):
        with pytest.raises(UserError, match=r'images: pixels between .* expected 0 to 1; divide') as caught:
            ATTACKS[name](logits_fn, given, labels, 0.05)
        assert '\n' not in str(caught.value)


@EACH
def test_traced_pixels_outside_come_out_as_nan(batch, name):
    images, labels = batch[0].copy(), batch[1]
    images[1, 0, 0, 0], images[2, 1, 1, 1] = 1.01, np.nan
    found = jax.jit(lambda x, y: ATTACKS[name](logits_fn, x, y, 0.05))(images, labels)
    np.testing.assert_array_equal(np.isnan(found).all((1, 2, 3)), [False, True, True, False])
    np.testing.assert_array_equal(np.isnan(found).any((1, 2, 3)), [False, True, True, False])
    clean = jax.jit(lambda x, y: ATTACKS[name](logits_fn, x, y, 0.05))(batch[0], labels)
    np.testing.assert_array_equal(found[::3], clean[::3])  # the others are not touched


@pytest.mark.slow
@pytest.mark.covering(1)
@EACH
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_rounding_is_no_error(batch, name, dtype):
    images = np.array(batch[0])
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1, 0
    images = jnp.asarray(images, dtype)
    rounded = images.at[0, 0, 0, 0].set(jnp.asarray(1 + jnp.finfo(dtype).eps, dtype))
    rounded = rounded.at[1, 0, 0, 0].set(-1e-7)
    attack = lambda x: ATTACKS[name](logits_fn, x, batch[1], 0.05)
    attack(rounded)
    np.testing.assert_array_equal(jax.jit(attack)(rounded), jax.jit(attack)(images))


@EACH
def test_integer_images_are_refused(batch, name):
    with pytest.raises(UserError, match=r'images\.dtype=uint8: expected floating pixels'):
        ATTACKS[name](logits_fn, (255 * batch[0]).astype(np.uint8), batch[1], 0.05)


def test_the_ensemble_looks_at_all_pixels_and_lets_rounding_pass(batch):
    images, labels = batch[0].copy(), batch[1]
    images[0, 0, 0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert ensemble(logits_fn, images, labels, attacks=('apgd-ce',)).images.max() <= 1
    images[3, 0, 0, 0] = 1.01
    with pytest.raises(UserError, match=r'pixels between 0\.\d+ and 1\.00999999, expected 0 to 1'):
        ensemble(logits_fn, images, labels)


def test_images_within_a_jitted_function_that_are_no_arguments_of_it(batch):
    attack = lambda images: jax.jit(lambda scale: pgd(lambda x: logits_fn(x, scale), images, batch[1], 0.05))(1.0)
    assert np.isfinite(attack(jnp.asarray(batch[0]))).all()
    with pytest.raises(UserError, match='images: pixels between'):
        attack(jnp.asarray(255 * batch[0]))


# --- classes ---------------------------------------------------------------------------------


@pytest.mark.covering(1)
@EACH
@pytest.mark.parametrize('wrong', [CLASSES, -1])
def test_labels_beyond_the_classes(batch, name, wrong):
    labels = np.array(batch[1])
    labels[-1] = wrong
    with pytest.raises(UserError, match=rf'labels: classes between .* expected 0 to {CLASSES - 1}'):
        ATTACKS[name](logits_fn, batch[0], labels, 0.05)
    found = jax.jit(lambda x, y: ATTACKS[name](logits_fn, x, y, 0.05))(batch[0], labels)
    np.testing.assert_array_equal(np.isnan(found).all((1, 2, 3)), [False, False, False, True])


@pytest.mark.covering(1)
@pytest.mark.parametrize('name', ['pgd', 'apgd', 'fab'])
@pytest.mark.parametrize('wrong', [CLASSES, -1])
def test_targets_beyond_the_classes(batch, name, wrong):
    targets = (batch[1] + 1) % CLASSES
    targets[0] = wrong
    with pytest.raises(UserError, match=rf'targets: classes between .* expected 0 to {CLASSES - 1}'):
        ATTACKS[name](logits_fn, *batch, 0.05, targets=targets)
    found = jax.jit(lambda x, t: ATTACKS[name](logits_fn, x, batch[1], 0.05, targets=t))(batch[0], targets)
    np.testing.assert_array_equal(np.isnan(found).all((1, 2, 3)), [True, False, False, False])


def test_several_targets_of_fab(batch):
    targets = np.stack([(batch[1] + 1) % CLASSES, (batch[1] + 2) % CLASSES])
    assert np.isfinite(fab(logits_fn, *batch, 0.05, targets=targets)).all()
    targets[1, 2] = CLASSES
    with pytest.raises(UserError, match='targets: classes between'):
        fab(logits_fn, *batch, 0.05, targets=targets)
    found = jax.jit(lambda t: fab(logits_fn, *batch, 0.05, targets=t))(targets)
    np.testing.assert_array_equal(np.isnan(found).all((1, 2, 3)), [False, False, True, False])


def test_the_ensemble_and_labels_beyond_the_classes(batch):
    ran = []

    def counted(images):
        jax.debug.callback(lambda: ran.append(1))
        return logits_fn(images)

    with pytest.raises(UserError, match=r'labels: classes between .* the model has 4 classes'):
        ensemble(counted, batch[0], np.full(BATCH, CLASSES))
    jax.effects_barrier()
    assert not ran


@EACH
def test_logits_that_are_no_array(batch, name):
    with pytest.raises(UserError, match='logits_fn returns a tuple'):
        ATTACKS[name](lambda x: (logits_fn(x), 0), *batch, 0.05)


@pytest.mark.parametrize(
    'attack',
    [
        lambda f, x, y: attacks.fgsm(f, x, y, epsilon=0.05, loss='dlr'),
        lambda f, x, y: pgd(f, x, y, 0.05, loss='dlr'),
        lambda f, x, y: apgd(f, x, y, 0.05, loss='dlr'),
        lambda f, x, y: ensemble(f, x, y, attacks=('apgd-ce', 'apgd-dlr')),
    ],
)
def test_dlr_of_two_classes_is_refused_before_the_net_runs(batch, attack):
    ran = []

    def two(images):
        jax.debug.callback(lambda: ran.append(1))
        return logits_fn(images)[:, :2]

    with pytest.raises(UserError, match=r'at least 3|at least three'):
        attack(two, batch[0], np.zeros(BATCH, int))
    jax.effects_barrier()
    assert not ran


# --- radii -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'norm'),
    [case if case[0] in ('pgd', 'square') else pytest.param(*case, marks=pytest.mark.slow) for case in IN_BOTH_NORMS],
)
def test_a_radius_an_image(batch, name, norm):
    """Each image as with its own radius for all: never a radius a channel, though there are as many."""
    radii = np.array([0.01, 0.04, 0.02, 0.08], np.float32) * (1 if norm == 'linf' else 5)
    attack = jax.jit(lambda epsilon: ATTACKS[name](logits_fn, *batch, epsilon, norm=norm))
    found = attack(radii)
    for i, radius in enumerate(radii):
        np.testing.assert_allclose(found[i], attack(jnp.float32(radius))[i], atol=1e-6)
    if name != 'fab':  # its radius is that of the start only
        length = np.asarray(projections.norm_of(found - batch[0], norm))
        assert (length <= radii * (1 + 1e-5)).all() and length[3] > radii[1]


def test_a_step_an_image(batch):
    steps = np.array([0.001, 0.002, 0.003, 0.004], np.float32)
    found = attacks.pgd(logits_fn, *batch, epsilon=0.05, step_size=steps, steps=1)
    np.testing.assert_allclose(np.abs(found - batch[0]).max((1, 2, 3)), steps, rtol=1e-4)
    found = attacks.simba(logits_fn, *batch, step_size=10 * steps, steps=1, rng=KEY).l2
    assert all(length in (0, pytest.approx(step, rel=1e-3)) for length, step in zip(found, 10 * steps))


@EACH
@pytest.mark.parametrize('shape', [(BATCH - 1,), (1,), (1, 1, 1, BATCH), (*SHAPE,)])
def test_other_shapes_of_a_radius(batch, name, shape):
    with pytest.raises(UserError, match=r'epsilon.shape=\(.*expected a number, or \(4,\), one per image'):
        ATTACKS[name](logits_fn, *batch, np.full(shape, 0.05))


@EACH
def test_arrays_of_impossible_radii(batch, name):
    for epsilon in (jnp.float32(8), np.array([0.1, 0.1, 8, 0.1]), np.float32('nan')):
        with pytest.raises(UserError, match=r'epsilon=(8.0|nan): expected 0 to 1'):
            ATTACKS[name](logits_fn, *batch, epsilon)


def test_the_ensemble_takes_one_radius(batch):
    with pytest.raises(UserError, match=r'epsilon of shape \(4,\): expected one number'):
        ensemble(logits_fn, *batch, epsilon=np.full(BATCH, 0.05))


def test_public_projections_take_a_radius_an_image():
    images = jnp.full((2, 2, 2, 2), 0.5)
    for norm, order in (('linf', np.inf), ('l2', 2)):
        found = projections.project(images + 0.4, images, jnp.array([0.1, 0.3]), norm) - images
        np.testing.assert_allclose(np.linalg.norm(found.reshape(2, -1), order, axis=1), [0.1, 0.3], rtol=1e-5)


# --- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['pgd', 'apgd', 'fab', 'square', 'simba'])
def test_what_is_no_key(batch, name):
    for rng in (0, 'seed', np.float32(1), np.zeros(3, np.uint32), jnp.zeros(2)):
        with pytest.raises(UserError, match=r'expected a PRNG key, such as jax.random.key') as caught:
            ATTACKS[name](logits_fn, *batch, 0.05, rng=rng)
        assert '\n' not in str(caught.value)


def test_no_key_where_one_is_needed(batch):
    for attack in (apgd, square, simba):
        with pytest.raises(UserError, match='rng=None: expected a PRNG key'):
            attack(logits_fn, *batch, 0.05, rng=None)
    for rng in (None, 0):
        with pytest.raises(UserError, match=f'rng={rng}: expected a PRNG key'):
            ensemble(logits_fn, *batch, rng=rng)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize('generator', ['rbg', 'unsafe_rbg'])
@pytest.mark.parametrize('name', ['pgd', 'apgd', 'fab', 'square', 'simba'])
def test_no_generator_ties_an_image_to_its_batch(batch, name, generator):
    attack = lambda x, y: ATTACKS[name](logits_fn, x, y, 0.05, rng=jax.random.key(3, impl=generator))
    np.testing.assert_allclose(jax.jit(attack)(batch[0][:2], batch[1][:2]), jax.jit(attack)(*batch)[:2], atol=1e-6)


def test_a_key_an_image_of_another_generator(batch):
    keys = jax.random.split(jax.random.key(3, impl='rbg'), BATCH)
    attack = jax.jit(lambda x, y, keys: square(logits_fn, x, y, 0.05, rng=keys))
    np.testing.assert_allclose(attack(batch[0][2:], batch[1][2:], keys[2:]), attack(*batch, keys)[2:], atol=1e-6)


def test_keys_of_other_generators_differ_in_every_word():
    words = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 4, 4], [2, 2, 3, 4]], np.uint32)
    keys = inputs.typed_key(jax.random.wrap_key_data(words, impl='rbg'))
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 4
    plain = jax.random.key(7)
    assert inputs.typed_key(plain) is plain


@pytest.mark.slow
def test_the_ensemble_under_another_generator(batch):
    with jax.default_prng_impl('rbg'):
        key = jax.random.key(1)
    options = {'attacks': ('square',), 'queries': 20, 'rng': key, 'epsilon': 0.04}
    whole = ensemble(logits_fn, *batch, batch_size=4, **options)
    parted = ensemble(logits_fn, *batch, batch_size=3, **options)
    np.testing.assert_allclose(parted.images, whole.images, atol=1e-6)
    np.testing.assert_array_equal(parted.robust, whole.robust)


# --- outputs that are not finite -------------------------------------------------------------

BROKEN = {
    'NaN': lambda x: logits_fn(x).at[:, 3].set(jnp.nan),
    'inf': lambda x: logits_fn(x).at[:, 0].set(jnp.inf),
}


def test_what_is_not_finite_is_not_right():
    logits = np.array([[2, 1, 0], [np.nan, 1, 0], [np.inf, 1, 0], [2, -np.inf, 0], [1, 2, 0]], np.float32)
    expected = [True, False, False, False, False]
    np.testing.assert_array_equal(losses.correct(logits, np.zeros(5, int)), expected)
    np.testing.assert_array_equal(jax.jit(losses.correct)(logits, jnp.zeros(5, int)), expected)


@pytest.mark.covering(1)
@EACH
@pytest.mark.parametrize('kind', BROKEN)
def test_images_stay_images(batch, name, kind):
    """Whatever the net gives: finite, in [0, 1]."""
    found = np.asarray(ATTACKS[name](BROKEN[kind], batch[0], np.zeros(BATCH, int), 0.05))
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
    assert np.abs(found - batch[0]).max() <= 0.05 + 1e-6


@pytest.mark.parametrize('kind', BROKEN)
def test_a_net_that_gives_nan_is_not_robust(batch, kind):
    found = ensemble(BROKEN[kind], batch[0], np.zeros(BATCH, int))
    assert (found.clean_accuracy, found.robust_accuracy) == (0, 0) and not found.robust.any()
    assert found.warnings == ['the outputs are not all finite for 4 of 4 images, which count as wrong']
    assert attacks.square(BROKEN[kind], batch[0], np.zeros(BATCH, int), epsilon=0.05, queries=2, rng=KEY).fooled.all()
    assert attacks.simba(BROKEN[kind], batch[0], np.zeros(BATCH, int), steps=2, rng=KEY).success.all()


def breaks_off(images):
    """Class 0 everywhere, but NaN where the first pixel has left its place."""
    first = images[:, 0, 0, 0]
    logits = jnp.stack([1 - 0.1 * first, 0.1 * first, 0 * first, 0 * first], -1)
    return jnp.where(jnp.abs(first[:, None] - 0.5) > 0.01, jnp.nan, logits)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['apgd-ce', 'apgd-t', 'fab-t', 'square'])
def test_an_image_that_makes_a_net_give_nan_has_broken_it(name):
    images = np.full((2, 1, 1, 1), 0.5, np.float32)
    if name == 'fab-t':  # it goes as far as the linear boundary, however far
        found = attacks.fab(breaks_off, images, np.zeros(2, int), targets=np.ones(2, int), steps=2)
        assert np.isnan(breaks_off(found)).any(-1).all()
        return
    found = ensemble(breaks_off, images, np.zeros(2, int), attacks=(name,))
    assert found.clean_accuracy == 1 and found.robust_accuracy == 0
    assert np.isnan(breaks_off(found.images)).any(-1).all() and np.abs(found.images - 0.5).max() <= 0.0501


def test_simba_takes_a_step_that_makes_a_net_give_nan():
    found = attacks.simba(breaks_off, np.full((2, 1, 1, 1), 0.5, np.float32), np.zeros(2, int), step_size=0.1, rng=KEY)
    assert found.success.all() and np.isnan(breaks_off(found.images)).any(-1).all()


def test_restarts_of_pgd_are_not_held_up_by_a_loss_that_is_nan(batch):
    """A loss of the user's that is NaN at the first start: another start is taken."""
    first = pgd(logits_fn, *batch, 0.05)
    close = lambda logits: jnp.abs(logits - logits_fn(first)).max(-1) < 1e-4
    loss = lambda logits: jnp.where(close(logits), jnp.nan, losses.attack_loss(logits, batch[1], 'cross_entropy'))
    never_fooled = lambda x: logits_fn(x)
    found = pgd(never_fooled, *batch, 0.05, loss=loss, restarts=3)
    held = pgd(never_fooled, *batch, 0.05, loss=loss, restarts=1)
    fooled = ~np.asarray(losses.correct(logits_fn(held), batch[1]))
    assert not fooled.all()
    assert (np.abs(found - held).max((1, 2, 3)) > 1e-3)[~fooled].all()


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(('name', 'norm'), IN_BOTH_NORMS)
def test_narrow_dtypes(batch, name, norm, dtype):
    """Gradients of any size, none among them: finite images of the dtype, in the ball but for rounding."""
    images, labels = jnp.asarray(batch[0], dtype), jnp.asarray(batch[1])
    attack = jax.jit(
        lambda scale: ATTACKS[name](functools.partial(logits_fn, scale=scale), images, labels, RADII[norm], norm=norm)
    )
    found = {scale: attack(jnp.asarray(scale, dtype)) for scale in (1.0, 1e-5, 0.0, 2e3)}
    for images_of_it in found.values():
        assert images_of_it.dtype == dtype
        difference = np.asarray(images_of_it, np.float64) - np.asarray(images, np.float64)
        assert np.isfinite(difference).all() and images_of_it.min() >= 0 and images_of_it.max() <= 1
        length = np.linalg.norm(difference.reshape(BATCH, -1), np.inf if norm == 'linf' else 2, axis=1)
        assert name == 'fab' or (length <= RADII[norm] + 4 * float(jnp.finfo(dtype).eps)).all()
    if name == 'pgd':  # a small gradient moves the images as a large one does
        moved = np.abs(np.asarray(found[1e-5], np.float64) - np.asarray(found[0.0], np.float64))
        assert moved.max() > 0.01


def test_the_direction_of_a_gradient_whose_squares_underflow_or_overflow():
    direction = np.random.default_rng(0).normal(size=(3, 2, 2, 1))
    direction /= np.linalg.norm(direction.reshape(3, -1), axis=1).reshape(3, 1, 1, 1)
    for dtype, sizes in (
        (jnp.float16, (1e-4, 1, 3e4)),
        (jnp.bfloat16, (1e-30, 1, 1e30)),
        (jnp.float32, (1e-30, 1, 1e30)),
    ):
        gradient = jnp.asarray(direction * np.reshape(sizes, (3, 1, 1, 1)), dtype)
        found = projections.steepest(gradient, 'l2')
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), direction, atol=0.01)
        np.testing.assert_allclose(projections.l2_norm(gradient), sizes, rtol=0.01)
    odd = jnp.array([[jnp.nan, 1.0], [jnp.inf, 1.0], [-jnp.inf, 0.0], [0.0, 0.0]]).reshape(4, 2, 1, 1)
    np.testing.assert_allclose(
        projections.steepest(odd, 'l2').reshape(4, 2), [[0, 1], [1, 0], [-1, 0], [0, 0]], atol=1e-6
    )
    np.testing.assert_allclose(projections.steepest(odd, 'linf').reshape(4, 2), [[0, 1], [1, 1], [-1, 0], [0, 0]])


def test_a_ball_of_so_many_pixels_that_float16_overflows():
    images = jnp.full((1, 160, 160, 3), 0.5, jnp.float16)
    found = projections.project_l2(images + 1, images, 20) - images
    np.testing.assert_allclose(np.linalg.norm(np.asarray(found, np.float64)), 20, rtol=2e-3)
    noise = projections.uniform_start(KEY, images, 20.0, 'l2')
    assert noise.dtype == jnp.float16 and 19 < np.linalg.norm(np.asarray(noise, np.float64)) <= 20.1


STRICT = pytest.mark.parametrize(
    'context', [jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise')], ids=['dtypes', 'ranks']
)


@pytest.mark.covering(1)
@STRICT
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(('name', 'norm'), IN_BOTH_NORMS)
def test_strict_promotion(batch, name, norm, dtype, context):
    """Traced only: what strict promotion forbids is refused while tracing."""
    f = lambda x: jnp.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3)), x[:, 0, 0, 0]], -1)
    options = {'targets': jnp.ones(BATCH, int)} if name in ('pgd', 'apgd', 'fab') else {}
    attack = lambda x, epsilon: ATTACKS[name](f, x, jnp.zeros(BATCH, int), epsilon, norm=norm, **options)
    with context:
        found = jax.eval_shape(attack, jnp.asarray(batch[0], dtype), jnp.full(BATCH, RADII[norm], jnp.float32))
    assert found.shape == batch[0].shape and found.dtype == dtype


@pytest.mark.slow
@pytest.mark.covering(1)
@STRICT
@pytest.mark.parametrize('norm', inputs.NORMS)
def test_strict_promotion_in_the_ensemble(batch, norm, context):
    f = lambda x: x.reshape(-1, 6, 4)[:, :5].sum(1) - x.reshape(-1, 6, 4)[:, 1:].sum(1)
    labels = np.asarray(f(batch[0]).argmax(-1))
    names = ('apgd-dlr', 'apgd-t', 'fab-t', 'square')
    with context:
        found = ensemble(f, batch[0], labels, attacks=names, norm=norm, epsilon=0.001, batch_size=3, steps=2, queries=2)
    assert len(found.attacks) == 4


# --- nothing ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'norm'), IN_BOTH_NORMS)
def test_an_empty_batch(name, norm):
    images, labels = np.zeros((0, *SHAPE), np.float32), np.zeros(0, int)
    found = ATTACKS[name](logits_fn, images, labels, 0.05, norm=norm)
    assert found.shape == images.shape and found.dtype == np.float32
