"""Writing files: whole or not at all, by several processes at a time, and which errors came from it."""

import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from convnorm_jax import files
from convnorm_jax.attacks import run_ensemble
from convnorm_jax.attacks.auto_attack.saved import Progress, load_progress, save_progress
from convnorm_jax.errors import UserError
from convnorm_jax.files import write_text
from convnorm_jax.runs import workdir as workdir_lib


def at_once(number, work):
    """Runs `work(i)` in so many threads, which begin together; raises what one of them raised."""
    barrier, errors = threading.Barrier(number), []

    def run(i):
        barrier.wait()
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize('how', ['atomically', 'text', 'state'])
def test_many_write_one_file(tmp_path, how):
    path, progress = tmp_path / 'file', Progress(np.zeros((1, 2, 2, 1), np.float32), np.ones(1, bool))
    write = {
        'atomically': lambda i: files.write_atomically(path, lambda file: file.write(bytes([i]) * 100_000)),
        'text': lambda i: write_text(str(path), chr(65 + i) * 100_000),
        'state': lambda i: save_progress(str(path), {'run': 1}, progress),
    }[how]

    def many(i):
        for _ in range(10):
            write(i)

    at_once(8, many)
    assert os.listdir(tmp_path) == ['file']
    if how == 'state':
        assert load_progress(str(path), {'run': 1}).robust.all()
    else:
        assert len(set(path.read_bytes())) == 1 and path.stat().st_size == 100_000


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')

    def fail(file):
        file.write(b'new')
        raise OSError(errno.ENOSPC, 'full')

    for write in (files.write_atomically, files.write_new):
        with pytest.raises(OSError, match='full') as error:
            write(path, fail)
        assert files.unwritten(error.value) == str(path)
        assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('links', [True, False])
def test_a_new_file_takes_no_others_place(tmp_path, monkeypatch, links):
    def unsupported(*_):
        raise OSError(errno.EPERM, 'Operation not permitted')

    if not links:
        monkeypatch.setattr(files.os, 'link', unsupported)
    path = tmp_path / 'file'
    files.write_new(path, lambda file: file.write(b'first'))
    with pytest.raises(FileExistsError):
        files.write_new(path, lambda file: file.write(b'second'))
    assert path.read_bytes() == b'first' and os.listdir(tmp_path) == ['file']


def test_who_could_not_be_written():
    assert files.unwritten(OSError()) is None
    with pytest.raises(RuntimeError) as error:
        try:
            with files.written('a/b'), files.written('c'):
                raise KeyError(1)
        except KeyError as cause:
            raise RuntimeError('later') from cause
    assert files.unwritten(error.value) == 'c'


def test_results_of_evaluations_at_the_same_time_are_all_kept(tmp_path):
    workdir, number = str(tmp_path), 12
    at_once(number, lambda i: workdir_lib.write_result(workdir, {'test_accuracy': i}))
    names = sorted(os.listdir(workdir))
    assert 'result.json' in names and len(names) == number
    found = [json.loads((tmp_path / name).read_text())['test_accuracy'] for name in names]
    assert sorted(found) == list(range(number))


def test_an_earlier_result_is_kept_once(tmp_path):
    """Of many processes that all want to keep the same one, one does; the others find it gone."""
    (tmp_path / 'result.json').write_text('{"a": 1}')
    at_once(12, lambda i: workdir_lib.keep_earlier_result(str(tmp_path)))
    assert [(tmp_path / name).read_text() for name in os.listdir(tmp_path)] == ['{"a": 1}']


def test_an_incomplete_result_takes_no_complete_ones_place(tmp_path):
    write = lambda **figures: os.path.basename(workdir_lib.write_result(str(tmp_path), figures))
    assert write(a=1, incomplete='why') == 'result.json'
    assert write(a=2) == 'result.json'
    assert write(a=3, incomplete='why') == 'result-incomplete.json'
    assert workdir_lib.read_result(str(tmp_path)) == {'a': 2}
    assert json.loads((tmp_path / 'result-1.json').read_text()) == {'a': 1, 'incomplete': 'why'}


def test_a_place_is_looked_at_before_the_work(tmp_path):
    files.check_place(tmp_path / 'state.npz', 'path')
    for path in (tmp_path / 'nowhere' / 'state.npz', tmp_path, '/proc/state.npz'):
        with pytest.raises(UserError, match=f"^path='{path}': cannot be written "):
            files.check_place(path, 'path')
    assert os.listdir(tmp_path) == []


def test_a_state_path_in_a_folder_that_is_not_there(tmp_path):
    def never(images):
        raise AssertionError

    path, images = tmp_path / 'nowhere' / 's.npz', np.zeros((1, 2, 2, 1), np.float32)
    with pytest.raises(UserError, match=r"state_path='.*nowhere/s.npz': cannot be written \(No such file"):
        run_ensemble(never, images, np.zeros(1, int), epsilon=0.1, rng=None, state_path=str(path))


def test_errors_are_had_without_jax():
    """What a command needs to say what is wrong with it."""
    code = (
        'import sys, convnorm_jax.errors, convnorm_jax.files, convnorm_jax.cli.sweep, convnorm_jax\n'
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        'assert set(convnorm_jax.__all__) <= set(dir(convnorm_jax))\n'
        'from convnorm_jax import *\n'
        "assert ConvNorm.__name__ == 'ConvNorm' and ConvNormTranspose and fold_for_inference and __version__\n"
        'assert convnorm_jax.layers.convnorm.ConvNorm is ConvNorm\n'
        "assert not hasattr(convnorm_jax, 'nothing')"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
