"""Runs of several processes of this machine, joined by JAX's own means, beside a run of one."""

import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from convnorm_jax.cli.command_line import read_config
from convnorm_jax.runs.metrics import read_rows
from convnorm_jax.training import loop, setup

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
    '--config.model.width=4',
    '--config.model.convnorm.use_affine=False',
    '--config.data.batch_size=64',
    '--config.train.epochs=2',
    '--config.checkpoint.every_steps=8',
    '--config.log.every_steps=4',
    '--config.attack.pgd_steps=2',
    '--config.eval.examples=100',
    '--noconfig.plots',
)
CLEAN = ('--config=configs/digits_convnorm.py', *SMALL)


@pytest.fixture(scope='module')
def environment(quick_environment, tmp_path_factory):
    """Of the processes: one CPU device each, and one compilation cache for all."""
    return quick_environment | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '1',
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('compiled')),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


@pytest.fixture
def together(environment):
    """Function of arguments -> the processes of one run; what is left of them at the end is killed."""
    started = []

    def start(*arguments, processes=2, devices=1, extra=((), ())):
        port, command = free_port(), [sys.executable, '-m', 'convnorm_jax.cli.run', *arguments]
        joined = lambda i: [f'--coordinator=localhost:{port}', f'--num_processes={processes}', f'--process_id={i}']
        found = [
            subprocess.Popen(
                [*command, *(joined(i) if processes > 1 else []), *(extra[i] if processes > 1 else [])],
                cwd=ROOT,
                env=environment | {'JAX_NUM_CPU_DEVICES': str(devices)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]
        started.extend(found)
        return found

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(processes):
    """[(exit code, stdout, stderr)] of processes, when all have ended."""
    return [(p.returncode, *said) for p, said in zip(processes, [p.communicate(timeout=240) for p in processes])]


def final_state(workdir):
    """The state a run ended with, leaf by leaf, as NumPy."""
    config = read_config(['--config=configs/digits_convnorm.py', *SMALL])
    state, _, _ = loop.restore_state(setup.build(config, jax.devices()[:1]), str(workdir), 'latest')
    leaves = jax.tree_util.tree_leaves_with_path(state.replace(rng=jax.random.key_data(state.rng)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def rows(workdir):
    """metrics.csv without the speed."""
    found = read_rows(str(workdir / 'metrics.csv'))
    return [{name: value for name, value in row.items() if name != 'examples_per_second'} for row in found]


def stop(processes, which, workdir):
    """Sends SIGTERM to one of the processes as soon as there is a checkpoint."""
    end = time.monotonic() + 200
    while not list((workdir / 'checkpoints').glob('[0-9]*')) and time.monotonic() < end:
        time.sleep(0.05)
    processes[which].send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_go_on_on_another_number(together, tmp_path):
    both, one, moved = (tmp_path / name for name in ('both', 'one', 'moved'))
    (code, table, said), (other_code, other_table, other_said) = ended(together(*CLEAN, f'--workdir={both}'))
    assert (code, other_code) == (0, 0), said + other_said
    assert '| clean ' in table and 'on 2 x cpu' in table
    assert not [line for line in other_table.splitlines() if not line.startswith('[Gloo]')]  # one of them speaks
    assert ended(together(*CLEAN, f'--workdir={one}', processes=1, devices=2))[0][0] == 0
    # One of two is asked to stop: both save and stop. One process goes on, on two devices.
    processes = together(*CLEAN, f'--workdir={moved}')
    stop(processes, 1, moved)
    codes = [code for code, _, _ in ended(processes)]
    assert codes == [143, 143]
    assert ended(together(*CLEAN, f'--workdir={moved}', processes=1, devices=2))[0][0] == 0

    want = final_state(one)
    for workdir in both, moved:
        found = final_state(workdir)
        assert found.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-4, err_msg=name)
        assert len(rows(workdir)) == len(rows(one)) == 2
        for row, wanted in zip(rows(workdir), rows(one)):
            assert row == pytest.approx(wanted, rel=1e-3)


def test_one_process_given_another_config_is_said_by_all(together, tmp_path):
    extra = (), ('--config.seed=7',)
    for code, _, said in ended(together(*CLEAN, f'--workdir={tmp_path / "run"}', extra=extra)):
        assert code == 2
        assert 'error: processes 1 were given another config, --workdir or --mode than process 0' in said
        assert 'Traceback' not in said
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_two_processes_train_a_gan_as_one_does(together, tmp_path):
    tiny = (
        '--config=configs/digits_gan.py',
        '--config.model.width=4',
        '--config.gan.generator_width=4',
        '--config.gan.latent=4',
        '--config.gan.score_examples=0',
        '--config.gan.passes=1',
        '--config.data.subset_fraction=0.2',
        '--config.train.steps=6',
        '--config.eval.features=()',
        '--config.eval.samples=40',
        '--noconfig.plots',
    )
    for workdir, options in (('two', {}), ('one', {'processes': 1, 'devices': 2})):
        for code, _, said in ended(together(*tiny, f'--workdir={tmp_path / workdir}', **options)):
            assert code == 0, said
    found, wanted = rows(tmp_path / 'two'), rows(tmp_path / 'one')
    assert [row['step'] for row in found] == [row['step'] for row in wanted] == [4, 6]
    for row, want in zip(found, wanted):
        assert row == pytest.approx(want, rel=1e-3, abs=1e-4)
    pictures = [np.load(tmp_path / name / 'samples' / '00000006.npz')['images'].astype(int) for name in ('two', 'one')]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
