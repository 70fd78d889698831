"""The plan for a lent GPU: its time-keeping, its worker, what it packs; and stages of it on the CPU."""

import inspect
import json
import os
import pathlib
import sys
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pack_gpu
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import free, golden, packed_data, packed_state, plan, speed, stages
from convnorm_jax.data import records
from convnorm_jax.data.sources import load_source

pytestmark = pytest.mark.usefixtures('quick_compilation')
ROOT = pathlib.Path(__file__).resolve().parents[2]

# Stages that a worker can be asked for.
STAGES = """
import os, time

def quick(report, number):
    report.row(number=number)
    report.say(f'number {number}')

def hangs(report):
    report.row(before='it hangs')
    time.sleep(100)

def dies(report):
    os.abort()

def raises(report):
    raise ValueError('this is\\nwrong')
"""


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def stage(name, seconds, family='one', **options):
    return plan.Stage(name, name, family, seconds, 'module:function', **options)


class Heard:
    """A report that keeps what it is given."""

    def __init__(self):
        self.rows, self.lines, self.cells = [], [], []

    def row(self, **values):
        self.rows.append(values)

    def say(self, text):
        self.lines.append(text)

    def show(self, cells):
        self.cells.append(cells)


# --- time-keeping --------------------------------------------------------------------------------


def test_stages_that_do_not_fit_are_left_out_and_later_ones_done():
    clock = Clock()
    kept = plan.Plan([stage('a', 30), stage('b', 60), stage('c', 20)], 60 + plan.RESERVE, clock)
    done = []
    for one in kept:
        done.append(one.name)
        clock.seconds += 30
    assert done == ['a', 'c']
    [(left_out, estimate, left)] = kept.left_out
    assert (left_out.name, estimate, left) == ('b', 60, 30)


def test_estimates_follow_what_was_measured():
    clock = Clock()
    kept = plan.Plan([], 1000, clock)
    slow, other, same = stage('a', 10), stage('b', 10, 'two'), stage('c', 20)
    assert kept.estimate(same) == 20
    kept.note(slow, 30)
    assert kept.estimate(same) == 60
    assert kept.estimate(other) == 30  # nothing is known of its family: as the last one
    kept.note(other, 10)
    assert (kept.estimate(other), kept.estimate(same)) == (10, 60)
    kept.note(slow, 10_000)  # one stage that hung does not speak for all
    assert kept.estimate(same) == 20 * plan.MOST_FACTOR


def test_a_stage_is_stopped_before_the_end():
    clock = Clock()
    kept = plan.Plan([], 200 + plan.RESERVE, clock)
    assert kept.limit(stage('a', 40)) == 120
    assert kept.limit(stage('a', 1)) == plan.LEAST_LIMIT
    clock.seconds += 150
    assert kept.limit(stage('a', 40)) == 50
    clock.seconds += 100
    assert kept.remaining() == 0


def test_the_last_stage_takes_what_is_left():
    clock = Clock()
    last = stage('free', 100, takes_what_is_left=True)
    kept = plan.Plan([last], 300 + plan.RESERVE, clock)
    kept.note(stage('a', 1, 'free'), 5)
    assert (list(kept), kept.limit(last)) == ([last], 300)
    clock.seconds += 201
    assert (list(kept), [one for one, *_ in kept.left_out]) == ([], [last])


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_keeps_what_stages_found_before_they_were_stopped(tmp_path, monkeypatch, capsys):
    (tmp_path / 'plan_test_stages.py').write_text(STAGES)
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{ROOT}')
    made = [
        plan.Stage(name, name, 'one', seconds, f'plan_test_stages:{name}', options)
        for name, seconds, options in (
            ('dies', 1, {}),
            ('quick', 1, {'number': 7}),
            ('raises', 1, {}),
            ('never', 100, {}),
            ('hangs', 1, {}),
        )
    ]
    monkeypatch.setattr(command, 'make_stages', lambda options: made)
    monkeypatch.setattr(sys, 'argv', ['gpu', '--minutes=0.15', f'--output={tmp_path / "out"}'])
    assert command.main() == 1
    found = json.loads((tmp_path / 'out' / 'results.json').read_text())
    of = {one['stage']: one for one in found['stages']}
    assert of['quick']['rows'] == [{'number': 7}] and not of['quick']['error']
    assert of['hangs']['rows'] == [{'before': 'it hangs'}] and 'killed' in of['hangs']['error']
    assert 'died (exit code -6)' in of['dies']['error']
    assert of['raises']['error'] == 'ValueError: this is wrong'
    assert [one['stage'] for one in found['left_out']] == ['never']
    text = (tmp_path / 'out' / 'table.txt').read_text()
    assert text == capsys.readouterr().out
    assert 'number 7' in text and 'LEFT OUT: never' in text
    assert sum(one['seconds'] for one in found['stages']) < 9


@pytest.mark.parametrize('rehearsal', [False, True])
def test_every_stage_can_be_called(rehearsal):
    options = types.SimpleNamespace(rehearsal=rehearsal, stages='', data='d', output='o', resume='')
    made = stages.make_stages(options)
    assert made[-1].takes_what_is_left and len({one.name for one in made}) == len(made) > 10
    for one in made:
        module, name = one.run.split(':')
        function = getattr(__import__(module, fromlist=[name]), name)
        given = json.loads(json.dumps(one.options))
        inspect.signature(function).bind('report', **given, **({'seconds': 1} if one.takes_what_is_left else {}))


def test_an_unknown_stage_is_said():
    options = types.SimpleNamespace(rehearsal=False, stages='nets,stets', data='', output='', resume='')
    with pytest.raises(SystemExit, match=r"--stages=nets,stets: 'stets' is none of machine, first, "):
        stages.make_stages(options)


# --- stages --------------------------------------------------------------------------------------


def test_golden_layers_on_this_device():
    report = Heard()
    golden.layers(report, ['layer_c'])
    assert not report.lines  # nothing failed
    errors = {(row['method'], row['setting']): max(row[part] for part in golden.PARTS) for row in report.rows}
    assert set(errors) == {(None, setting) for setting in golden.SETTINGS} | {
        (method, 'float32 highest') for method in golden.METHODS
    }
    assert all(value < 1e-5 for (_, setting), value in errors.items() if setting != 'bfloat16')
    assert 1e-5 < errors[None, 'bfloat16'] < 0.05


def test_products_on_this_device():
    report = Heard()
    golden.products(report, size=64, channels=8)
    assert all(0 < row[what] < 1e-5 for row in report.rows for what in ('product', 'convolution'))


def test_a_program_that_fails_leaves_the_others():
    found, failed = speed.in_threads({'good': lambda: 1, 'bad': lambda: 1 / 0})
    assert (found, failed) == ({'good': 1}, {'bad': 'ZeroDivisionError: division by zero'})


@pytest.mark.slow
def test_the_layer_table_sums_the_net():
    report = Heard()
    speed.layer_table(report, 'float32', 2, [[2, 2, 4, 1, 3]], repeats=1)
    row, total = report.cells
    assert not report.lines and row['conv + BN'] == total['conv + BN'] > 0


def test_an_interrupted_evaluation_is_not_the_end(tmp_path):
    assert not free.is_done(tmp_path)
    for result, done in (
        ({'autoattack_accuracy': 0.4, 'incomplete': 'stopped'}, False),
        ({'test_accuracy': 0.8}, False),
    ):
        (tmp_path / 'result.json').write_text(json.dumps(result))
        assert free.is_done(tmp_path) == done
    (tmp_path / 'result.json').write_text(json.dumps({'autoattack_accuracy': 0.4}))
    assert free.is_done(tmp_path)


# --- packing -------------------------------------------------------------------------------------


def test_images_travel_without_their_head_and_come_back(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in (('train', 12), ('test', 3))}
    encode = lambda image: cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 75])[1].tobytes()
    rows = {part: [{'image': encode(a), 'label': i % 10} for i, a in enumerate(of)] for part, of in images.items()}
    monkeypatch.setattr(records, 'TFDSRecords', lambda folder, part: types.SimpleNamespace(records=rows[part]))
    prepared = tmp_path / 'tfds' / 'cifar10' / '3.0.2'
    prepared.mkdir(parents=True)
    (prepared / 'dataset_info.json').write_text('{}')
    (prepared / 'label.labels.txt').write_text('\n'.join(f'class{i}' for i in range(10)))
    (prepared / 'PROVENANCE.md').write_text('lossy JPEG copies (quality 75)')
    path = tmp_path / 'cifar10.npz'
    packed_data.pack(tmp_path / 'tfds', path)
    assert path.stat().st_size < sum(len(row['image']) for part in rows.values() for row in part)
    packed_data.unpack(path, tmp_path / 'there')
    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'cache'))
    source = load_source('cifar10', tmp_path / 'there')
    assert source.description == 'CIFAR-10 (JPEG q75)' and source.class_names[3] == 'class3'
    for part in rows:
        split = getattr(source, part)
        expected = [
            cv2.imdecode(np.frombuffer(row['image'], np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for row in rows[part]
        ]
        np.testing.assert_array_equal(split.images, expected)
        np.testing.assert_array_equal(split.labels, [row['label'] for row in rows[part]])
    rows['test'][1]['image'] = cv2.imencode('.png', images['test'][1])[1].tobytes()
    with pytest.raises(ValueError, match='expected JPEG images of one head'):
        packed_data.pack(tmp_path / 'tfds', path)


def test_a_checkpoint_travels_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_state, 'PART_BYTES', 100_000)
    runs, out = tmp_path / 'runs', tmp_path / 'out'
    for name, text in (('convnorm/metrics.csv', 'epoch'), ('convnorm/checkpoints/7/data', 'large')):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text(text)
    out.mkdir()
    (out / 'runs.part07').write_text('of before')
    keys = jax.random.split(jax.random.key(0), 3)
    values = jax.random.normal(keys[0], (300, 300)).at[0, :4].set(jnp.array([0.0, -0.0, jnp.inf, -jnp.inf]))
    arrays = {
        'state': {
            'params': {'kernel': values, 'bias': values[0]},
            'opt_state': {'trace': 1e-3 * jax.random.normal(keys[1], (300, 300))},
            'totals': jax.random.normal(keys[2], (80, 80)),
            'rng': jnp.array([1, 2], jnp.uint32),
            'step': jnp.int32(5),
        }
    }
    size = packed_state.save(out, runs, 'convnorm', jax.device_get(arrays), {'step': 5})
    parts = sorted(os.listdir(out))
    assert parts == [f'runs.part{i:02d}' for i in range(len(parts))] and len(parts) > 1
    assert size < 0.7 * sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    layer, decode, progress = packed_state.load(out, tmp_path / 'there')
    assert (layer, progress) == ('convnorm', {'step': 5})
    assert [str(p.relative_to(tmp_path / 'there')) for p in (tmp_path / 'there').rglob('*.*')] == [
        'convnorm/metrics.csv'
    ]
    found, expected = decode(arrays)['state'], arrays['state']
    for name in ('totals', 'rng', 'step'):
        jax.tree.map(np.testing.assert_array_equal, found[name], expected[name])
    np.testing.assert_array_equal(found['params']['bias'], expected['params']['bias'])  # small: as it is
    np.testing.assert_allclose(found['params']['kernel'], values, rtol=2.0**-13)
    np.testing.assert_allclose(found['opt_state']['trace'], expected['opt_state']['trace'], rtol=2.0**-5)
    assert np.any(found['params']['kernel'] != values)
    # What was rounded once stays as it is: an evaluation that goes on is of the same net.
    packed_state.save(out, runs, 'convnorm', jax.device_get({'state': found}), {'step': 5})
    again = packed_state.load(out, tmp_path / 'again')[1](arrays)
    jax.tree.map(np.testing.assert_array_equal, again['state'], found)
    with pytest.raises(ValueError, match='of another net or optimizer'):
        decode({'state': {**expected, 'step': jnp.zeros(2)}})
    for missing in (len(os.listdir(out)) - 1, 0):
        os.remove(out / f'runs.part{missing:02d}')
        with pytest.raises(ValueError, match=f'--resume={out}: expected all parts'):
            packed_state.load(out, tmp_path / 'more')
    with pytest.raises(ValueError, match=f'--resume={runs}: expected runs.part00 in it'):
        packed_state.load(runs, tmp_path / 'more')


def test_the_command_of_the_packing_fits():
    options = types.SimpleNamespace(folder='.gpu', resume='somewhere', stages='machine,layers', minutes=9.0)
    given = pack_gpu.make_command(options)
    assert len(given) < pack_gpu.MOST_CHARACTERS
    assert '--minutes=9 --output=$OUT --data=.gpu/cifar10.npz --resume=.gpu/resume --stages=machine,layers' in given
    assert pack_gpu.timeout(9.0) > 540 and pack_gpu.timeout(10.0) == 600
