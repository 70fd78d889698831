"""The ensemble on classifiers whose true robustness is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convnorm_jax import attacks, mesh
from convnorm_jax.attacks.auto_attack import checks, ensemble, members, saved
from convnorm_jax.attacks.auto_attack.members import make_member
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation', 'short_programs')

SHAPE, CLASSES, N = (6, 6, 1), 5, 30
SMALL = {'steps': 20, 'queries': 200, 'batch_size': 8}


@pytest.fixture(scope='module')
def problem():
    """(images, labels, weights [D, K], distance to the nearest other class in both norms [N])."""
    random = np.random.default_rng(0)
    images = random.uniform(0.4, 0.6, (N, *SHAPE)).astype(np.float32)
    weights = random.normal(size=(np.prod(SHAPE), CLASSES)).astype(np.float32)
    logits = (images.reshape(N, -1) - 0.5).astype(np.float64) @ weights
    labels = logits.argmax(1)
    slopes = weights.T[labels][:, None] - weights.T[None]  # [N, K, D]
    gap = logits[np.arange(N), labels][:, None] - logits
    gap[np.arange(N), labels] = np.inf
    radius = {
        'linf': (gap / np.maximum(np.abs(slopes).sum(2), 1e-9)).min(1),
        'l2': (gap / np.maximum(np.linalg.norm(slopes, axis=2), 1e-9)).min(1),
    }
    return images, labels, weights, radius


def linear(weights, scale=1.0, transform=lambda x: x):
    def logits_fn(images):
        return (transform(images).reshape(len(images), -1) - 0.5) @ jnp.asarray(weights) * scale

    return logits_fn


def quiet(*_):
    pass


@pytest.fixture(scope='module')
def whole(problem):
    """One standard run, at a radius that breaks half of the examples."""
    images, labels, weights, radius = problem
    logits_fn, epsilon = linear(weights), float(np.median(radius['linf']))
    lines = []
    found = attacks.run_ensemble(
        logits_fn, images, labels, epsilon=epsilon, rng=jax.random.key(0), log=lines.append, **SMALL
    )
    return logits_fn, epsilon, found, lines


def test_breaks_just_what_can_be_broken(problem, whole):
    images, labels, _, radius = problem
    logits_fn, epsilon, found, lines = whole
    certain = np.abs(radius['linf'] / epsilon - 1) > 0.01
    np.testing.assert_array_equal(found.robust[certain], radius['linf'][certain] > epsilon)
    assert found.clean_accuracy == 1 and 0.4 < found.robust_accuracy < 0.6 and certain.sum() > N - 3
    predictions = np.asarray(logits_fn(found.images)).argmax(1)
    np.testing.assert_array_equal(predictions == labels, found.robust)
    assert np.abs(found.images - images).max() <= epsilon * 1.0001
    np.testing.assert_array_equal(found.images[found.robust], images[found.robust])
    assert not found.warnings
    names = [a['name'] for a in found.attacks]
    assert names == ['apgd-ce', 'apgd-t', 'fab-t', 'square']
    assert sum(a['broken'] for a in found.attacks) == (~found.robust).sum()
    for name in names:
        assert any(line.startswith(f'{name}: broke') for line in lines)


@pytest.mark.parametrize('norm', few(attacks.NORMS, 'linf'))
def test_minimal_perturbation_of_a_linear_classifier_to_one_percent(problem, norm):
    """Every example alone: safe at 99 % of its distance from the boundary, broken at 101 %."""
    images, labels, weights, radius = problem
    distance = radius[norm]
    # The same classifier for all: scaling a picture's offset from 0.5 scales its distance.
    unit = float(np.median(distance))
    scaled = 0.5 + (images - 0.5) * (unit / distance)[:, None, None, None].astype(np.float32)
    inside = (np.abs(scaled - 0.5) < 0.4).all((1, 2, 3))  # the walls of [0, 1] are out of reach
    assert inside.sum() > 15
    logits_fn = linear(weights)
    for factor, robust in ((0.99, True), (1.01, False)):
        found = attacks.run_ensemble(
            logits_fn, scaled[inside], labels[inside], epsilon=factor * unit, norm=norm,
            rng=jax.random.key(1), attacks=('apgd-ce', 'apgd-t', 'fab-t'), log=quiet, steps=40, batch_size=8,
        )  # fmt: skip
        assert (found.robust == robust).all(), (factor, found.robust)


@pytest.mark.slow
def test_a_staircase_in_front_of_the_net_masks_gradients_but_not_from_square(problem):
    """Rounding the pixels leaves no gradient; the true accuracy is known, for rounding is monotone."""
    images, labels, weights, _ = problem
    epsilon = 0.1

    def staircase(x):
        return jnp.round(x * 20) / 20

    logits_fn = linear(weights, transform=staircase)
    labels = np.asarray(logits_fn(images)).argmax(1)
    robust = np.ones(N, bool)
    for other in range(CLASSES):
        slopes = weights.T[other] - weights.T[labels]  # the best attack on this pair moves each pixel all the way
        worst = np.clip(images + epsilon * np.sign(slopes).reshape(images.shape), 0, 1)
        logits = np.asarray(logits_fn(worst), np.float64)
        robust &= (logits[np.arange(N), labels] >= logits[:, other]) | (labels == other)
    lines = []
    found = attacks.run_ensemble(
        logits_fn, images, labels, epsilon=epsilon, rng=jax.random.key(0), log=lines.append,
        **{**SMALL, 'queries': 1000},
    )  # fmt: skip
    by_gradient = found.attacks[2]['robust_accuracy']
    assert found.robust_accuracy == robust.mean() < by_gradient
    assert any('gradient of the cross-entropy vanishes' in w for w in found.warnings)
    assert any('attacks without gradients lowered' in w for w in found.warnings)
    for warning in found.warnings:
        assert f'warning: {warning}' in lines


def test_logits_so_large_that_the_cross_entropy_is_flat(problem, whole):
    """The DLR loss sees through the scale, the cross-entropy does not; AutoAttack's figure is the true one."""
    images, labels, weights, _ = problem
    logits_fn = linear(weights, scale=1e6)
    found = attacks.run_ensemble(
        logits_fn, images, labels, epsilon=whole[1], rng=jax.random.key(0), log=quiet,
        attacks=('apgd-ce', 'apgd-t'), steps=20, batch_size=8,
    )  # fmt: skip
    np.testing.assert_array_equal(found.robust, whole[2].robust)
    assert any('gradient of the cross-entropy vanishes' in w for w in found.warnings)
    assert found.attacks[1]['broken'] > 0


def same(a, b):
    np.testing.assert_array_equal(a.robust, b.robust)
    np.testing.assert_allclose(a.images, b.images, atol=1e-6)
    for one, other in zip(a.attacks, b.attacks, strict=True):
        assert {**one, 'seconds': 0} == {**other, 'seconds': 0}


@pytest.mark.slow
def test_neither_packing_nor_devices_change_anything(problem, whole):
    images, labels, *_ = problem
    logits_fn, epsilon, *_ = whole
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ('data',)), PartitionSpec('data'))
    options = {'epsilon': 0.6 * epsilon, 'rng': jax.random.key(0), 'log': quiet, 'attacks': ('square', 'apgd-ce')}
    expected = attacks.run_ensemble(logits_fn, images, labels, **options, **SMALL)
    found = attacks.run_ensemble(logits_fn, images, labels, sharding=sharding, **options, **{**SMALL, 'batch_size': 16})
    same(found, expected)
    assert 0 < sum(a['broken'] for a in found.attacks) < N


@pytest.mark.parametrize('moment', few([1, 5, 9, 16], 5))
def test_an_interrupted_run_goes_on(problem, whole, tmp_path, monkeypatch, moment):
    images, labels, *_ = problem
    logits_fn, epsilon, expected, _ = whole
    monkeypatch.setattr(ensemble, '_SAVE_EVERY', 0.0)
    path = str(tmp_path / 'state.npz')
    countdown = iter(range(moment, -1, -1))

    def interrupt(*_):
        if next(countdown, 0) == 0:
            raise KeyboardInterrupt

    options = {'epsilon': epsilon, 'rng': jax.random.key(0), 'state_path': path, **SMALL}
    with pytest.raises(KeyboardInterrupt):
        attacks.run_ensemble(logits_fn, images, labels, log=quiet, progress=interrupt, **options)
    lines, seen = [], []
    found = attacks.run_ensemble(
        logits_fn, images, labels, log=lines.append, progress=lambda *at: seen.append(at), **options
    )
    same(found, expected)
    assert (moment < 4) or lines[0].startswith('resuming from')
    again = attacks.run_ensemble(logits_fn, images, labels, log=quiet, progress=seen.clear, **options)
    same(again, expected)  # and without any attack: `clear` takes no arguments


def test_a_state_of_something_else_is_refused(problem, whole, tmp_path):
    images, labels, *_ = problem
    logits_fn, epsilon, *_ = whole
    path = str(tmp_path / 'state.npz')
    options = {'rng': jax.random.key(0), 'state_path': path, 'log': quiet, 'attacks': ('apgd-ce',), **SMALL}
    attacks.run_ensemble(logits_fn, images, labels, epsilon=epsilon, **options)
    with pytest.raises(ValueError, match='a state of other epsilon; delete it'):
        attacks.run_ensemble(logits_fn, images, labels, epsilon=epsilon / 2, **options)
    with pytest.raises(ValueError, match='a state of other images, labels, predictions'):
        attacks.run_ensemble(logits_fn, images[::-1], labels[::-1], epsilon=epsilon, **options)
    with open(path, 'r+b') as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match='not a readable state'):
        attacks.run_ensemble(logits_fn, images, labels, epsilon=epsilon, **options)


def test_a_state_of_a_net_that_predicts_the_same_is_refused(problem, whole, tmp_path):
    """The other net's logits differ in the last bit of one image, or only next to the images."""
    images, labels, weights, _ = problem
    logits_fn, epsilon, expected, _ = whole
    path = str(tmp_path / 'state.npz')
    options = {'epsilon': epsilon, 'rng': jax.random.key(0), 'log': quiet, 'state_path': path, **SMALL}
    same(attacks.run_ensemble(logits_fn, images, labels, **options), expected)
    last = np.float32(images[-1, 0, 0, 0])

    def other_bit(x):
        logits = logits_fn(x)
        hit = (x[:, 0, 0, 0] == last)[:, None] & (jnp.arange(CLASSES) == 0)
        return jnp.where(hit, jnp.nextafter(logits, jnp.inf), logits)

    def broken_elsewhere(x):
        known = (x[:, None] == jnp.asarray(images)).all((2, 3, 4)).any(1)
        return jnp.where(known[:, None], logits_fn(x), jnp.eye(CLASSES)[0])

    for net, words in ((other_bit, 'other logits'), (broken_elsewhere, 'other logits next to the images')):
        with pytest.raises(ValueError, match='a state of another net') as caught:
            attacks.run_ensemble(net, images, labels, **options)
        assert words in str(caught.value) and '\n' not in str(caught.value)
    lines = []
    same(attacks.run_ensemble(linear(weights), images, labels, **{**options, 'log': lines.append}), expected)
    assert lines[0].startswith('resuming from')


@pytest.mark.parametrize('damage', ['cut', 'text', 'pickle', 'empty', 'words', 'bytes'])
def test_a_damaged_state(tmp_path, damage):
    path = tmp_path / 'state.npz'
    saved.save_progress(path, {}, saved.Progress(np.ones((3, 2, 2, 1), np.float32), np.ones(3, bool)))
    content = path.read_bytes()
    if damage == 'words':
        with open(path, 'wb') as file:
            np.savez(file, words='{}', images=np.ones((3, 2, 2, 1)), robust=np.ones(3, bool))
    elif damage == 'bytes':
        place = content.index(b'PK', 10) - 20
        path.write_bytes(content[:place] + b'damage' + content[place + 6 :])
    else:
        path.write_bytes(
            {'cut': content[: len(content) // 2], 'text': b'text', 'pickle': b'\x80\x04K\x01.', 'empty': b''}[damage]
        )
    if damage == 'empty':
        assert path.stat().st_size == 0
    with pytest.raises(ValueError, match=r'not a readable state of an evaluation.*delete it to start again') as caught:
        saved.load_progress(path, {})
    assert 'allow_pickle' not in str(caught.value) and '\n' not in str(caught.value)


def test_the_place_of_the_state_is_looked_at_first(problem, tmp_path):
    images, labels, *_ = problem
    for path in (tmp_path / 'none' / 'state.npz', tmp_path):
        ran = []
        logits_fn = lambda x, ran=ran: ran.append(x) or x.reshape(len(x), -1)
        with pytest.raises(ValueError, match=r'state_path=.*cannot be written'):
            attacks.run_ensemble(
                logits_fn, images, labels, epsilon=0.1, rng=jax.random.key(0), state_path=str(path), log=quiet
            )
        assert not ran  # not even traced


def test_the_leader_reads_the_state_for_all(tmp_path, monkeypatch):
    """The others are told what it found: the bytes of the file, no file, or what is wrong with it."""
    path, identity = tmp_path / 'state.npz', {'epsilon': 0.1}
    told = []

    def as_process(number, messages):
        monkeypatch.setattr(mesh.jax, 'process_count', lambda: 2)
        monkeypatch.setattr(mesh.jax, 'process_index', lambda: number)
        broadcast = (lambda x: told.append(x) or x) if number == 0 else (lambda x: messages.pop(0))
        monkeypatch.setattr(mesh.multihost_utils, 'broadcast_one_to_all', broadcast)

    def outcomes(other_path):
        found = []
        for number, place in enumerate((path, other_path)):
            as_process(number, list(told))
            try:
                found.append(saved.load_progress(place, identity))
            except ValueError as error:
                found.append(str(error).removeprefix('process 0: '))
        told.clear()
        return found

    assert outcomes(tmp_path / 'elsewhere.npz') == [None, None]
    state = saved.Progress(np.ones((3, 2, 2, 1), np.float32), np.array([True, False, True]), turn=2)
    monkeypatch.undo()
    saved.save_progress(path, identity, state)
    for found in outcomes(tmp_path / 'elsewhere.npz'):  # not there for the other one
        assert found.turn == 2
        np.testing.assert_array_equal(found.robust, state.robust)
    saved.save_progress(path, {'epsilon': 0.2}, state)
    first, second = outcomes(tmp_path / 'elsewhere.npz')
    assert first == second and 'a state of other epsilon' in first


def test_a_prime_number_is_cut_into_few_programs():
    sizes = {'steps': 101, 'queries': 4999, 'targets': 1, 'restarts': 1}
    chunks = {name: make_member(name, 'linf', 10, **sizes).chunks for name in members.MEMBERS}
    assert chunks == {'apgd-ce': 51, 'apgd-dlr': 51, 'apgd-t': 51, 'fab-t': 51, 'square': 500}
    assert make_member('square', 'linf', 10, **sizes, platform='tpu').chunks == 50


@pytest.mark.slow
@pytest.mark.parametrize('name', ['apgd-ce', 'fab-t', 'square'])
def test_what_the_last_program_has_beyond_the_run_changes_nothing(problem, name, monkeypatch):
    """Seven iterations, in programs of 7 and of 3."""
    images, labels, weights, _ = problem
    logits_fn = jax.tree_util.Partial(linear(weights))
    common = [jax.tree_util.Partial(logits_fn), *map(jnp.asarray, (images, labels))]
    common += [jax.random.split(jax.random.key(0), N), jnp.asarray((labels + 1) % CLASSES), jnp.float32(0.001)]
    found = []
    for size in (7, 3):
        monkeypatch.setattr(members, '_CPU_CHUNK', dict.fromkeys(('apgd', 'fab', 'square'), size))
        make_member.cache_clear()
        member = make_member(name, 'linf', CLASSES, steps=7, queries=7, targets=1, restarts=1)
        assert member.chunks == {7: 1, 3: 3}[size]
        state = member.start(*common)
        for chunk in range(member.chunks):
            state = member.advance(*common, state, chunk)
        found.append(state)
    make_member.cache_clear()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *found)


def test_nothing_is_compiled_twice(problem):
    images, labels, weights, _ = problem
    traces = []

    def counted(x):
        traces.append(x.shape)
        return linear(weights)(x)

    def run(count, epsilon):
        before = len(traces)
        attacks.run_ensemble(
            fixed, images[:count], labels[:count], epsilon=epsilon, rng=jax.random.key(0), log=quiet,
            attacks=('apgd-ce', 'apgd-t'), steps=10, batch_size=8,
        )  # fmt: skip
        return len(traces) - before

    fixed = jax.tree_util.Partial(counted)
    first = run(30, 0.01)
    assert set(traces) == {(8, *SHAPE)} and first > 0
    # Another number of examples, another radius: only the passes that each run jits for itself.
    assert run(17, 0.02) < 5


def test_members():
    sizes = {'steps': 30, 'queries': 130, 'targets': 9, 'restarts': 2}
    targeted = make_member('apgd-t', 'linf', 4, **sizes)
    assert targeted.rounds == 3 and targeted.chunks == 15
    assert make_member('apgd-ce', 'linf', 10, **sizes).rounds == 2
    assert make_member('square', 'linf', 10, **sizes).chunks == 13
    with pytest.raises(ValueError, match='at least three classes'):
        make_member('apgd-dlr', 'linf', 2, **sizes)
    with pytest.raises(ValueError, match="'pgd', expected some of apgd-ce"):
        make_member('pgd', 'linf', 10, **sizes)


def test_warnings_about_outputs():
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(8, 4, 4, 1)), jnp.float32)
    weights = np.random.default_rng(1).normal(size=(16, 3))
    plain = lambda x: x.reshape(len(x), -1) @ weights
    random = np.random.default_rng(2)
    assert checks.check_outputs(plain, images) == []
    cases = {
        'random': lambda x: plain(x) + 0.01 * random.normal(size=(len(x), 3)),
        'rest of its batch': lambda x: plain(x - x.mean(0)),
        'probabilities': lambda x: jax.nn.softmax(plain(x)),
        'not all finite': lambda x: plain(x) / 0 * 0,
    }
    for words, predict in cases.items():
        (warning,) = checks.check_outputs(predict, images)
        assert words in warning


def test_warning_about_a_black_box_that_leads():
    order = {'apgd-ce': 0.5, 'square': 0.49}
    assert 'by 1.00%' in checks.check_black_box(order, ['apgd-ce'], ['square'])
    assert checks.check_black_box({'apgd-ce': 0.5, 'square': 0.499}, ['apgd-ce'], ['square']) is None
    assert checks.check_black_box({'square': 0.1}, [], ['square']) is None


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'epsilon': 8.0}, 'epsilon=8.0: expected 0 to 1'),
        ({'norm': 'l1'}, "norm='l1'"),
        ({'attacks': ('apgd',)}, "'apgd', expected some of"),
        ({'attacks': 'apgd-ce'}, r"attacks='apgd-ce': expected a sequence of names, such as \('apgd-ce',\)"),
        ({'batch_size': 0}, 'batch_size=0'),
        ({'steps': 0}, 'steps=0'),
        ({'images': np.full((2, *SHAPE), 255.0)}, 'pixels between 255 and 255, expected 0 to 1'),
        ({'images': np.zeros((2, *SHAPE), np.uint8)}, 'images.dtype=uint8'),
        ({'labels': np.zeros(3, int)}, r'labels.shape=\(3,\)'),
    ],
)
def test_what_a_user_gets_wrong(problem, change, message):
    arguments = {'images': problem[0][:2], 'labels': problem[1][:2], 'epsilon': 0.1, 'rng': jax.random.key(0)}
    with pytest.raises(ValueError, match=message) as caught:
        attacks.autoattack(linear(problem[2]), **{**arguments, **change})
    assert '\n' not in str(caught.value)


def test_a_state_survives_its_file(tmp_path):
    path = str(tmp_path / 'state')
    kept = [np.arange(3.0), np.array(7, np.int32)]
    state = saved.Progress(np.ones((3, 2, 2, 1), np.float32), np.array([True, False, True]), turn=2, chunk=3, kept=kept)
    identity = {'epsilon': 0.1, 'labels': np.arange(3)}
    assert saved.load_progress(path, identity) is None
    saved.save_progress(path, identity, state)
    back = saved.load_progress(path, identity)
    assert (back.turn, back.chunk, back.attacked) == (2, 3, None)
    np.testing.assert_array_equal(back.robust, state.robust)
    for a, b in zip(back.kept, kept, strict=True):
        np.testing.assert_array_equal(a, b)
