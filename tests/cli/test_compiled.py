"""Compiled programs from one command to the next: found again, the user's settings, a folder that fails."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Compiles one program by way of the command's own setting; says where the cache is, and what was found in it.
PROGRAM = """
import jax, resource, sys, warnings
from convnorm_jax.cli import compiled
compiled.keep_programs()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name.split('/')[-1]))
warnings.warn('of something else')
assert jax.jit(lambda x: x * 2 + 1)(3) == 7
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
print('cache_hits' in found, 'cache_misses' in found)
"""
KEPT, FOUND, NEITHER = 'False True', 'True False', 'False False'


@pytest.fixture
def compile_once(tmp_path):
    """Function of environment variables -> (folder, threshold, KEPT, FOUND or NEITHER, what stderr says of it)."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith('JAX_')}

    def run(cache=tmp_path, largest_file=1_000_000, **variables):
        environment = {'JAX_PLATFORMS': 'cpu', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', **variables}
        environment = {name: value for name, value in environment.items() if value is not None}
        done = subprocess.run(
            [sys.executable, '-c', PROGRAM, str(largest_file)],
            cwd=ROOT,
            env=inherited | {'CONVNORM_CACHE': str(cache)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert 'of something else' in done.stderr
        settings, outcome = done.stdout.splitlines()
        said = [line for line in done.stderr.splitlines() if re.search('cache|compil', line) and 'warn' not in line]
        return *settings.rsplit(' ', 1), outcome, said

    return run


def test_the_second_command_finds_what_the_first_compiled(compile_once, tmp_path):
    folder = tmp_path / 'xla'
    assert compile_once() == (str(folder), '0.0', KEPT, [])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert compile_once() == (str(folder), '0.0', FOUND, [])


@pytest.mark.slow
def test_the_settings_of_the_user_hold(compile_once, tmp_path):
    other = str(tmp_path / 'other')
    assert compile_once(JAX_COMPILATION_CACHE_DIR=other)[::2] == (other, KEPT)
    assert compile_once(JAX_COMPILATION_CACHE_DIR='')[::2] == ('', NEITHER)
    assert compile_once(JAX_ENABLE_COMPILATION_CACHE='0')[::2] == ('None', NEITHER)
    assert not (tmp_path / 'xla').exists()
    # Small programs are not worth a file.
    assert compile_once(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=None)[1:3] == ('0.5', NEITHER)


@pytest.mark.slow
def test_a_file_in_place_of_the_folder_is_one_line(compile_once, tmp_path):
    (tmp_path / 'xla').write_text('')
    folder, _, outcome, said = compile_once()
    assert (folder, outcome) == ('None', NEITHER)
    assert said == [f'compiled programs are not kept in {tmp_path / "xla"} (File exists); the run compiles instead']
    assert len(compile_once(cache=tmp_path / 'xla' / 'below')[3]) == 1


def test_a_folder_of_another_user_is_not_used(monkeypatch, tmp_path):
    from convnorm_jax.cli import compiled

    monkeypatch.setattr(os, 'getuid', lambda: 12345)
    with pytest.raises(OSError, match='another user'):
        compiled._prepare(tmp_path)


def test_damaged_programs_are_compiled_again_and_kept(compile_once, tmp_path):
    compile_once()
    for entry in (tmp_path / 'xla').iterdir():
        entry.write_bytes(entry.read_bytes()[:-100])
    _, _, outcome, said = compile_once()
    assert outcome == KEPT and len(said) == 1 and f'{tmp_path / "xla"} are damaged' in said[0]
    assert compile_once()[2:] == (FOUND, [])


@pytest.mark.slow
def test_only_the_damaged_program_is_compiled_again(compile_once, tmp_path):
    """Two sweeps share the folder: what one finds damaged must not cost the other its programs."""
    compile_once()
    folder = tmp_path / 'xla'
    entry = next(folder.glob('*lambda*-cache'))
    others = [folder / f'jit_other-{"0" * 64}-cache', folder / f'{entry.name.split("-")[0]}2-{"0" * 64}-cache']
    for other in others:
        other.write_bytes(b'of another process')
    entry.write_bytes(entry.read_bytes()[:-100])
    _, _, outcome, said = compile_once()
    assert (
        outcome == 'True True' and len(said) == 1 and 'are damaged' in said[0] and entry.name.split('-')[0] in said[0]
    )
    assert all(other.read_bytes() == b'of another process' for other in others)
    assert compile_once()[2:] == (FOUND, [])


def test_an_entry_that_goes_between_two_looks_is_no_trouble(monkeypatch, tmp_path):
    from convnorm_jax.cli import compiled

    class Folder(type(tmp_path)):
        def glob(self, pattern):
            return [*super().glob(pattern), self / 'gone-cache']

    (tmp_path / 'a-cache').write_bytes(b'a')
    compiled._prepare(Folder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['a-cache']


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line(compile_once, tmp_path):
    _, _, _, said = compile_once(largest_file=100)
    assert len(said) == 1 and 'are not kept' in said[0] and 'File too large' in said[0]
    # What was written of the program is gone.
    assert compile_once()[2:] == (KEPT, [])
    assert compile_once()[2:] == (FOUND, [])


def test_the_folder_is_bounded_and_the_oldest_go_first(monkeypatch, tmp_path):
    from convnorm_jax.cli import compiled

    monkeypatch.setattr(compiled, 'MAX_BYTES', 250)
    for age, name in enumerate('abcd'):
        (tmp_path / f'{name}-cache').write_bytes(bytes(100))
        os.utime(tmp_path / f'{name}-cache', (1e9 - age, 1e9 - age))
    compiled._prepare(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a-cache', 'b-cache']
