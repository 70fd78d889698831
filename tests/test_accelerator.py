"""The project's programs compile for GPUs and TPUs, and what they do is counted right.

The compilers are pyproject's extra `aot`. Without it those tests are skipped, unless CONVNORM_REQUIRE_AOT is set, as
.ci/run does after it has installed the extra.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accelerator, aot, hlo
from convnorm_jax import save_exported
from convnorm_jax.models import create_model

ROOT = pathlib.Path(__file__).parent.parent
REQUIRED = bool(os.environ.get('CONVNORM_REQUIRE_AOT'))


def need(target):
    package = aot.missing(target)
    if package and REQUIRED:
        pytest.fail(f"CONVNORM_REQUIRE_AOT is set, but {package} is not installed; pip install -e '.[aot]'")
    if package:
        pytest.skip(f"{package} is not installed; pip install -e '.[aot]'")


def case(target, what, **changes):
    net, size, width = ('dcgan', 8, 4) if what in aot.GAN_PROGRAMS else ('simple_cnn', 16, 4)
    found = aot.Case(target, 1, net, 'convnorm', what, 'bfloat16', 8, size, width, None)
    return found._replace(**changes)


def compiled(of):
    need(of.target)
    found = accelerator.compile_apart(of)
    assert found['status'] == 'compiled', found['message']
    return found


@pytest.mark.parametrize('what', aot.PROGRAMS)
@pytest.mark.parametrize('target', aot.TARGETS)
def test_a_small_net_compiles(target, what):
    of = case(target, what)
    found = compiled(of)
    images = of.batch_size * of.size**2 * 3
    assert found['bytes'] > images  # it reads its pictures at least
    assert found['kernels'] > 5
    assert found['argument_bytes'] > images
    assert found['collectives'] == {}
    assert found['unknown_loops'] == 0
    assert found['largest'][0][0] >= found['largest'][-1][0] > 0


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_strided_shortcut_compiles_for_a_gpu(dtype):
    # XLA of jax 0.10 and 0.11 aborts where a product reads a strided slice of a ReLU: benchmarks/README.md.
    compiled(case('h100', 'step', net='resnet18', dtype=dtype, width=8, size=32))


def test_chips_tell_each_other_sums_only():
    found = compiled(case('v5e', 'step', chips=4))
    assert set(found['collectives']) == {'all-reduce'}


def test_a_compiler_that_ends_the_process_is_a_row(monkeypatch):
    def abort(*args, **kwargs):
        code = "import os, sys; print('F1127 xla.cc:1] Check failed: a == b', file=sys.stderr, flush=True); os.abort()"
        return subprocess_run([sys.executable, '-c', code], capture_output=True, text=True)

    subprocess_run = subprocess.run
    monkeypatch.setattr(accelerator.subprocess, 'run', abort)
    found = accelerator.compile_apart(case('h100', 'step'))
    assert found == {'status': 'aborted', 'message': 'SIGABRT: F1127 xla.cc:1] Check failed: a == b'}


def test_an_error_is_a_row():
    need('h100')
    found = accelerator.compile_apart(case('h100', 'step', net='nonet'))
    assert found['status'] == 'failed'
    assert found['message'].startswith('convnorm_jax.errors.UserError: model.name=')


def test_the_table_and_the_file(tmp_path, monkeypatch, capsys):
    figures = {
        'bytes': 3e9, 'kernels': 10, 'temporary_bytes': 2e6, 'argument_bytes': 1, 'collectives': {'all-reduce': 2},
        'unknown_loops': 0, 'compile_seconds': 1.0, 'largest': [[2e6, 1, 'fusion', 'f', 'f32[2]']],
    }  # fmt: skip
    rows = {
        'convnorm': {'status': 'compiled', **figures, 'bytes': 6e9},
        'batchnorm': {'status': 'compiled', **figures},
        'oni': {'status': 'aborted', 'message': 'SIGABRT: Check failed'},
    }
    monkeypatch.setattr(accelerator, 'compile_apart', lambda case, folder: rows[case.layer])
    monkeypatch.setattr(aot, 'missing', lambda target: None)
    monkeypatch.setitem(aot.PACKAGES, 'h100', ())
    output = tmp_path / 'found.json'
    arguments = ['--targets=h100', '--layers=convnorm,batchnorm,oni', '--top=1', f'--output={output}']
    monkeypatch.setattr(sys, 'argv', ['accelerator', *arguments])
    with pytest.raises(SystemExit, match='1 of 3 programs did not compile'):
        accelerator.main()
    printed = capsys.readouterr().out
    assert '| convnorm | bfloat16 | 6.00 | 2.00 | 10 | 1.00 | 2.00 | 1.00 | 2 all-reduce |' in printed
    assert '| oni | bfloat16 | aborted |' in printed
    assert 'SIGABRT: Check failed' in printed
    saved = json.loads(output.read_text())
    assert [row.get('bytes_ratio') for row in saved['rows']] == [2.0, 1.0, None]


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(aot, 'missing', lambda target: 'libtpu')
    monkeypatch.setattr(sys, 'argv', ['accelerator', '--targets=v5e'])
    with pytest.raises(SystemExit, match=r"--targets=v5e: libtpu is not installed; pip install -e '\.\[aot\]'"):
        accelerator.main()


@pytest.mark.parametrize('option', ['--targets=h200', '--what=train', '--chips=3', '--targets='])
def test_a_mistaken_option_is_one_line(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, 'argv', ['accelerator', option])
    with pytest.raises(SystemExit):
        accelerator.main()
    assert 'expected some of' in capsys.readouterr().err


def test_size():
    assert hlo.size('f32[2,3]{1,0}') == 24
    assert hlo.size('(bf16[4]{0}, pred[3], s32[])') == 8 + 3 + 4
    assert hlo.size('f8e4m3fn[5]') == 5
    assert hlo.size('token[]') == 0
    assert hlo.size('(f32[8]{0:T(128)S(1)}, f32[2]{0:T(128)})') == 40
    assert hlo.size('(f32[8]{0:T(128)S(1)}, f32[2]{0:T(128)})', on_chip=False) == 8


# The forms of a GPU's and a TPU's compiled program, shortened.
LOOPS = """HloModule loops

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %sine = f32[100]{0} sine(%p)
}

%body (t: (s32[], f32[100])) -> (s32[], f32[100]) {
  %t = (s32[], f32[100]{0}) parameter(0)
  %a = f32[100]{0} get-tuple-element(%t), index=1
  %f = f32[100]{0} fusion(%a), kind=kLoop, calls=%fused
  %r = f32[100]{0} all-reduce(%f), replica_groups={{0,1}}, to_apply=%add
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %out = (s32[], f32[100]{0}) tuple(%i, %r)
}

%condition (t.1: (s32[], f32[100])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %t.1 = (s32[], f32[100]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a.1: f32[100]) -> f32[100] {
  %a.1 = f32[100]{0} parameter(0)
  %zero = s32[] constant(0)
  %s = (f32[100]{0}, f32[100]{0}, u32[]) copy-start(%a.1)
  %d = f32[100]{0} copy-done(%s)
  %start = (s32[], f32[100]{0}) tuple(%zero, %d)
  %loop = (s32[], f32[100]{0}) while(%start), condition=%condition, body=%bodyKNOWN
  ROOT %last = f32[100]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    'known, trips, unknown',
    [(', backend_config={"known_trip_count":{"n":"5"}}', 5, 0), ('', 7, 0), (None, 1, 1)],
    ids=['told', 'by the condition', 'unknown'],
)
def test_a_loop_counts_as_often_as_it_runs(known, trips, unknown):
    text = LOOPS.replace('KNOWN', known or '')
    if known is None:
        text = text.replace('direction=LT', 'direction=NE')
    found = hlo.Program(text)
    assert found.bytes == 800 + trips * 2 * 800  # a copy; a fusion and a sum, each reads and writes 400 bytes
    assert found.bytes_once == 3 * 800
    assert found.kernels == 1 + 2 * trips
    assert found.collectives == {'all-reduce': trips}
    assert found.unknown_loops == unknown
    assert found.largest(1)[0].bytes == max(800, 800 * trips)


def test_of_a_conditional_the_larger_branch_counts():
    text = """HloModule branches

%less (p: f32[100]) -> f32[100] {
  ROOT %p = f32[100]{0} parameter(0)
}

%more (q: f32[100]) -> f32[100] {
  %q = f32[100]{0} parameter(0)
  ROOT %sine = f32[100]{0} sine(%q)
}

ENTRY %main (which: pred[], a: f32[100]) -> f32[100] {
  %which = pred[] parameter(0)
  %a = f32[100]{0} parameter(1)
  ROOT %c = f32[100]{0} conditional(%which, %a, %a), true_computation=%less, false_computation=%more
}
"""
    found = hlo.Program(text)
    assert (found.bytes, found.kernels) == (800, 1)


def test_what_jax_compiles_is_counted():
    def f(x):
        return jax.lax.fori_loop(0, 6, lambda i, x: jnp.sort(jnp.sin(x)), x)

    found = hlo.Program(jax.jit(f).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile().as_text())
    assert found.unknown_loops == 0
    assert found.bytes - found.bytes_once == pytest.approx(5 * found.bytes_once, rel=0.6)
    assert found.bytes >= 6 * 8000


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match='no ENTRY computation'):
        hlo.Program('module @jit_f {}')


EXPORTED = """
import sys
from benchmarks import aot
device = aot.devices(sys.argv[1])[0]
import jax
from jax import export
from convnorm_jax.exported.container import read_container
header, blocks = read_container(sys.argv[2])
number = next(i for i, group in enumerate(header['programs']) if 'cuda' in group and 'tpu' in group)
there = jax.sharding.SingleDeviceSharding(device)
for name in (f'folding {number}', f'program {number}'):
    program = export.deserialize(bytearray(blocks[name]))
    shapes = [[n if isinstance(n, int) else 16 for n in aval.shape] for aval in program.in_avals]
    avals = [jax.ShapeDtypeStruct(s, a.dtype, sharding=there) for s, a in zip(shapes, program.in_avals)]
    arguments, _ = jax.tree.unflatten(program.in_tree, avals)
    print(jax.jit(program.call).lower(*arguments).compile().out_info)
"""


@pytest.mark.parametrize('target', aot.TARGETS)
def test_an_exported_net_compiles(target, tmp_path):
    need(target)
    model = create_model('simple_cnn', num_classes=7, layer='convnorm', width=16, depth=(1, 1))
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(jnp.zeros((1, 16, 16, 3)))
    save_exported(tmp_path / 'net', model, variables, (16, 16, 3))
    command = [sys.executable, '-c', EXPORTED, target, str(tmp_path / 'net')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 'shape=(16, 7), dtype=float32' in done.stdout.splitlines()[-1]
