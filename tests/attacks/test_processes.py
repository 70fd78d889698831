"""A saved state in a run of two processes, of which one sees the file."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from convnorm_jax import attacks

sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ('data',)), PartitionSpec('data'))
images = np.random.default_rng(0).uniform(0.3, 0.7, (8, 3, 3, 1)).astype(np.float32)
weights = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
net = lambda x: (x.reshape(len(x), 9) - 0.5) @ weights
labels = np.asarray(net(images)).argmax(-1)

def run(net, path):
    lines = []
    try:
        found = attacks.run_ensemble(
            net, images, labels, epsilon=0.03, rng=jax.random.key(0), steps=2, batch_size=4, sharding=sharding,
            attacks=('apgd-ce',), state_path=path, log=lines.append,
        )
        print(found.robust_accuracy, lines[0].startswith('resuming'))
    except ValueError as error:
        print(type(error).__name__, 'another net' in str(error), 'cannot be written' in str(error))

here = sys.argv[3] if sys.argv[1] == '0' else '/not/there/state.npz'
run(net, here)
run(net, here)
run(lambda x: 1.001 * net(x), here)
run(net, '/not/there/state.npz')
"""


@pytest.mark.slow
def test_the_leader_decides_about_a_saved_state(tmp_path):
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        address = f'localhost:{listener.getsockname()[1]}'
    environment = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'NPROC')}
    environment |= {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROGRAM, str(i), address, str(tmp_path / 'state.npz')],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        found = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [[line for line in out.splitlines() if 'Gloo' not in line] for out, _ in found]
    assert lines[0] == lines[1], found
    accuracy = lines[0][0].split()[0]
    assert 0 <= float(accuracy) < 1
    assert lines[0] == [f'{accuracy} False', f'{accuracy} True', 'UserError True False', 'UserError False True']
