"""Huge pages for a command: fewer page faults, a process that starts anew once, with the same arguments."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments import huge_pages

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Page faults of each of the last calls of a program of 84 MB of temporaries.
FAULTS = """
import os, sys
from experiments.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
import resource
import jax
kernels = jax.random.normal(jax.random.key(0), (4, 3, 3, 64, 64))
def loss(kernels, x):
    for kernel in kernels:
        layout = 'NHWC', 'HWIO', 'NHWC'
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=layout))
    return x.mean()
x = jax.random.normal(jax.random.key(1), (32, 32, 32, 64))
step = jax.jit(jax.grad(loss))
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(kernels, x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(os.getpid(), os.environ['GLIBC_TUNABLES'], *sys.argv[1:], sorted(faults[-5:])[2])
"""
here = pytest.mark.skipif(
    not (huge_pages._glibc_asks() and huge_pages._kernel_waits_to_be_asked()), reason='no huge pages for those who ask'
)


def run(program, *arguments, **variables):
    """(process id, words that it printed) of a program."""
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', **variables}
    process = subprocess.Popen(
        [sys.executable, '-c', program, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    words = process.communicate(timeout=200)[0].split()
    assert process.returncode == 0
    return process.pid, words


@here
def test_a_program_has_few_page_faults_and_the_same_process():
    pid, (own, tunables, word, few) = run(FAULTS, 'word', GLIBC_TUNABLES='glibc.malloc.tcache_count=7')
    assert pid == int(own)
    assert tunables == 'glibc.malloc.tcache_count=7:glibc.malloc.hugetlb=1' and word == 'word'
    _, (*_, many) = run(FAULTS, CONVNORM_RESTARTED='1', GLIBC_TUNABLES='glibc.malloc.hugetlb=0')
    assert int(many) > 5000 and int(few) < int(many) / 5


@pytest.mark.parametrize(
    ('environment', 'glibc', 'kernel'),
    [
        ({'CONVNORM_RESTARTED': '1'}, True, True),
        ({'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}, True, True),
        ({}, False, True),
        ({}, True, False),
    ],
)
def test_where_it_is_no_use_nothing_is_started(monkeypatch, environment, glibc, kernel):
    def execve(*_):
        raise AssertionError('started anew')

    for name in ('CONVNORM_RESTARTED', 'GLIBC_TUNABLES'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huge_pages, '_glibc_asks', lambda: glibc)
    monkeypatch.setattr(huge_pages, '_kernel_waits_to_be_asked', lambda: kernel)
    monkeypatch.setattr(os, 'execve', execve)
    huge_pages.restart_with_huge_pages()


@pytest.mark.parametrize(('version', 'asks'), [('glibc 2.35', True), ('glibc 2.31', False), (None, False)])
def test_the_version_of_glibc(monkeypatch, version, asks):
    monkeypatch.setattr(os, 'confstr', lambda name: version)
    assert huge_pages._glibc_asks() == asks


def test_the_command_goes_on_where_no_process_can_be_started(monkeypatch):
    def execve(*_):
        raise PermissionError

    for name in ('CONVNORM_RESTARTED', 'GLIBC_TUNABLES'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huge_pages, '_glibc_asks', lambda: True)
    monkeypatch.setattr(huge_pages, '_kernel_waits_to_be_asked', lambda: True)
    monkeypatch.setattr(os, 'execve', execve)
    huge_pages.restart_with_huge_pages()
