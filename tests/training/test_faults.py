"""What a run meets in its folder: another run, a full disk, no permission, a signal at a bad moment."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import JsonCheckpointHandler

from convnorm_jax.errors import UserError
from convnorm_jax.files import write_atomically, written
from convnorm_jax.runs import disk, lock, metrics
from convnorm_jax.runs.checkpoint import Checkpointer
from convnorm_jax.runs.metrics import MetricWriter, read_rows
from convnorm_jax.training import loop
from tests.selection import few

pytestmark = pytest.mark.usefixtures('quick_compilation')
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def experiment(tiny_experiment):
    return tiny_experiment()


@pytest.fixture(scope='module')
def whole(experiment, tmp_path_factory):
    """Folder of an uninterrupted run."""
    workdir = str(tmp_path_factory.mktemp('whole'))
    loop.train(experiment, workdir)
    return workdir


def state(experiment, workdir):
    return loop.restore_state(experiment, workdir, 'latest')[0]


def rows(workdir):
    return [{k: v for k, v in r.items() if k != 'examples_per_second'} for r in read_rows(f'{workdir}/metrics.csv')]


def ends_as(experiment, workdir, whole):
    """Whether the same command, given again, ends as the uninterrupted run."""
    loop.train(experiment, str(workdir))
    jax.tree.map(np.testing.assert_array_equal, state(experiment, str(workdir)), state(experiment, whole))
    return rows(workdir) == rows(whole)


def contents(folder):
    return {p: p.read_bytes() for p in pathlib.Path(folder).rglob('*') if p.is_file()}


HOLD = (
    'import sys, time\nfrom convnorm_jax.runs.lock import locked\n'
    "with locked(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
)


def test_two_trainings_in_a_folder(experiment, tmp_path):
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == 'held\n'
        before = contents(tmp_path)
        with pytest.raises(ValueError, match='is training there; wait for it, or give another folder') as error:
            loop.train(experiment, str(tmp_path))
        assert f'--workdir={tmp_path}: another run (process {holder.pid} on ' in str(error.value)
        assert ', since 20' in str(error.value)
        assert contents(tmp_path) == before
    finally:
        holder.kill()
        holder.wait()
    with lock.locked(str(tmp_path)):  # a dead process holds nothing
        assert f'{os.getpid()} on ' in (tmp_path / lock.NAME).read_text()
    with lock.locked(str(tmp_path)):  # nor one that is done
        pass


def test_a_run_in_training_can_be_evaluated(experiment, whole):
    with lock.locked(whole):
        assert int(state(experiment, whole).step) == experiment.total_steps


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(file, how):
        raise OSError(errno.EOPNOTSUPP, 'Operation not supported')

    monkeypatch.setattr(lock.fcntl, 'flock', unsupported)
    with lock.locked(str(tmp_path / 'run')):
        pass
    assert (
        capsys.readouterr().err
        == f'warning: --workdir={tmp_path}/run: the file system has no locks (Operation not supported)\n'
    )


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_config(workdir, config):
    write_atomically(os.path.join(workdir, 'config.json'), full)


# Where the disk is full: whose write fails, and which checkpoint is there by then.
WRITES = {
    'splits': ('convnorm_jax.runs.workdir.splits.save_record', 'there is no checkpoint yet'),
    'config': ('convnorm_jax.training.loop.save_config', 'there is no checkpoint yet'),
    'a row': ('convnorm_jax.runs.metrics.os.fsync', 'there is no checkpoint yet'),
    'events': ('convnorm_jax.runs.metrics.EventsWriter.flush', 'there is no checkpoint yet'),
    'closing': ('convnorm_jax.runs.metrics.EventsWriter.close', 'the last good checkpoint is of step 10'),
}


@pytest.mark.parametrize('what', few(WRITES, 'config', 'closing'))
def test_a_full_disk_is_one_line_and_costs_nothing(experiment, whole, tmp_path, monkeypatch, what):
    name, kept = WRITES[what]
    with monkeypatch.context() as patch, pytest.raises(disk.DiskTrouble) as error:
        patch.setattr(name, full_config if what == 'config' else full)
        loop.train(experiment, str(tmp_path))
    words = str(error.value)
    assert words.startswith(f'--workdir={tmp_path}: no space left on the device; ')
    assert words.endswith('; free some space and rerun the same command') and '\n' not in words
    assert kept in words or what in ('a row', 'events')
    assert ends_as(experiment, tmp_path, whole)


@pytest.mark.slow
def test_a_full_disk_under_a_checkpoint(experiment, whole, tmp_path, monkeypatch):
    original, files = JsonCheckpointHandler._save_fn, []

    def fails_later(self, x, directory):
        files.append(directory)
        if len(files) > 2:
            pathlib.Path('/dev/full').write_text('x')  # in Orbax's thread
        return original(self, x, directory)

    with monkeypatch.context() as patch:
        patch.setattr(JsonCheckpointHandler, '_save_fn', fails_later)
        with pytest.raises(disk.DiskTrouble, match=r'no space left on the device; the last good .* is of step 5; free'):
            loop.train(experiment, str(tmp_path))
    assert any('tmp' in name for name in os.listdir(tmp_path / 'checkpoints'))
    before = None
    while before != (before := contents(tmp_path)):  # its other threads would have died with the process
        time.sleep(0.3)
    assert ends_as(experiment, tmp_path, whole)


@pytest.mark.parametrize(
    'error, words',
    [
        (OSError(errno.EDQUOT, 'x'), 'quota'),
        (PermissionError(errno.EACCES, 'x'), 'no permission'),
        (OSError(errno.EROFS, 'x'), 'read-only'),
        (ValueError('RESOURCE_EXHAUSTED: Failed to write: No space left on device [x]'), 'no space left'),
        (ValueError('PERMISSION_DENIED: Permission denied'), 'no permission'),
    ],
)
def test_the_reason_is_found_wherever_it_is(error, words):
    try:
        try:
            with written('runs/a/b'):
                raise error
        except Exception as cause:
            assert words in disk.reason(cause)
            raise RuntimeError('in the background') from cause
    except RuntimeError as outer:
        assert words in disk.reason(outer)
    with pytest.raises(disk.DiskTrouble, match=f'--workdir=runs/a: .*{words}'), disk.explained('runs/a'):
        raise error
    # Elsewhere, the cache for one, another folder is to blame.
    with pytest.raises(disk.DiskTrouble, match=f'^{os.getcwd()}/runs/a/b: .*{words}'), disk.explained('runs/ab'):
        raise error


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_an_error_while_reading_is_not_blamed_on_the_run_folder(number):
    """An image without permission, or a full /dev/shm of the data workers."""
    error = OSError(number, os.strerror(number), '/data/x.jpg')
    assert disk.reason(error) is None
    with pytest.raises(OSError) as raised, disk.explained('runs/a'):
        raise error
    assert raised.value is error
    with pytest.raises(UserError) as raised, disk.explained('runs/a'):
        try:
            raise error
        except OSError as cause:
            raise UserError('/data/x.jpg: cannot be read') from cause
    assert str(raised.value) == '/data/x.jpg: cannot be read'


def test_a_folder_that_cannot_be_written_is_told_before_hours_of_work(tmp_path, monkeypatch):
    disk.check_writable(str(tmp_path))
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(disk.tempfile, 'TemporaryFile', full)
    with pytest.raises(disk.DiskTrouble, match=f'^--workdir={tmp_path}: no space left on the device; '):
        disk.check_writable(str(tmp_path))


def test_other_errors_pass():
    assert disk.reason(KeyError('x')) is None and disk.reason(FileNotFoundError(errno.ENOENT, 'x')) is None
    with pytest.raises(KeyError), disk.explained('runs/a'):
        raise KeyError('x')


@pytest.mark.parametrize('end', ['1,5,0.1', '1,5,0.1,0.', '1,5,0.1,0.5,1e-', '1,5,\0\0\0,0.5,0.25', '\xff\xfe', ''])
def test_a_row_cut_short_is_no_row(tmp_path, end):
    columns = ('epoch', 'step', 'learning_rate', 'train_loss', 'train_accuracy')
    path = tmp_path / 'metrics.csv'
    path.write_bytes(f'{",".join(columns)}\n0,3,0.1,0.7,0.5\n{end}'.encode('latin-1'))
    writer = MetricWriter(str(tmp_path), 3, columns)
    writer.close()
    assert [row['step'] for row in read_rows(writer.path)] == [3]


def test_events_are_what_tensorboard_reads(tmp_path):
    writer = MetricWriter(str(tmp_path), 7, ('epoch', 'step', 'train_loss'))
    writer.write({'epoch': 1, 'step': 8, 'train_loss': 0.25})
    writer.close()
    (path,) = tmp_path.glob('events.out.tfevents.*')
    events, content = [], path.read_bytes()
    while content:  # TFRecord: length, its checksum, content, its checksum
        length = int.from_bytes(content[:8], 'little')
        events.append(metrics.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[0].file_version == 'brain.Event:2'
    assert any(e.step == 8 and e.session_log.status == metrics.SessionLog.START for e in events)  # 7 stands
    ((step, value),) = [(e.step, e.summary.value[0]) for e in events if e.summary.value]
    assert (step, value.tag, value.simple_value) == (8, 'train_loss', 0.25)


@pytest.mark.parametrize('moment', few(['compilation', 'evaluation', 'writing', 'the end'], 'writing'))
def test_a_signal_at_any_moment(experiment, whole, tmp_path, monkeypatch, moment):
    """Noted, not died of; and everything done is saved."""
    place, at, saved = {
        'compilation': (jax, 'block_until_ready', 1),
        'evaluation': (type(experiment), 'validate', 5),
        'writing': (Checkpointer, 'save', 4),
        'the end': (Checkpointer, 'wait', 10),
    }[moment]
    original, told = getattr(place, at), []

    def signalled(*args, **options):
        if not told:
            told.append(None)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(loop.Stopped) as stopped:
        patch.setattr(place, at, signalled)
        loop.train(experiment, str(tmp_path))
    assert stopped.value.signal == signal.SIGTERM and f'saved at step {saved};' in str(stopped.value)
    assert int(state(experiment, str(tmp_path)).step) == saved
    assert ends_as(experiment, tmp_path, whole)
