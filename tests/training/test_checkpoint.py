"""Checkpoints: which are kept, what comes back, what a damaged one says."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.training.checkpoint import Checkpointer


def arrays(value):
    return {'a': jnp.full((3, 2), value, jnp.float32), 'b': {'count': jnp.int32(value)}}


@pytest.fixture
def make(tmp_path):
    """Checkpointers of one folder, closed at the end."""
    made = []

    def build(**options):
        made.append(Checkpointer(str(tmp_path), **options))
        return made[-1]

    yield build
    for checkpointer in made:
        checkpointer.close()


def steps_on_disk(checkpointer):
    return sorted(int(name) for name in os.listdir(checkpointer.folder) if name.isdigit())


def test_arrays_and_progress_come_back(make):
    checkpointer = make()
    assert checkpointer.latest_step is None and checkpointer.best_step is None
    checkpointer.save(7, arrays(7), {'step': 7, 'best_accuracy': 0.1 + 0.2, 'stopped': False}, 0.5)
    checkpointer.close()
    found, progress = make(read_only=True).restore(7, jax.eval_shape(lambda: arrays(0)))
    jax.tree.map(np.testing.assert_array_equal, found, arrays(7))
    assert found['b']['count'].dtype == jnp.int32
    assert progress == {'step': 7, 'best_accuracy': 0.1 + 0.2, 'stopped': False}


@pytest.mark.parametrize('reopened', [False, True])
def test_the_latest_and_the_first_best_are_kept(make, reopened):
    checkpointer = make(keep=2)
    accuracies = {1: 0.2, 2: 0.9, 3: None, 4: 0.9, 5: 0.3, 6: None, 7: 0.1}
    for step, accuracy in accuracies.items():
        if reopened and step > 1:
            checkpointer.close()
            checkpointer = make(keep=2)
        checkpointer.save(step, arrays(step), {'step': step}, accuracy)
    checkpointer.close()
    checkpointer = make(read_only=True)
    assert steps_on_disk(checkpointer) == [2, 6, 7]  # 4 is as good as 2, but later
    assert (checkpointer.latest_step, checkpointer.best_step) == (7, 2)
    for step in (2, 6, 7):
        found, progress = checkpointer.restore(step, arrays(0))
        assert progress['step'] == step and float(found['a'][0, 0]) == step


def test_without_ratings_there_is_no_best(make):
    checkpointer = make(keep=1)
    for step in (1, 2, 3):
        checkpointer.save(step, arrays(step), {'step': step})
    checkpointer.close()
    checkpointer = make(read_only=True)
    assert steps_on_disk(checkpointer) == [3] and checkpointer.best_step is None


def test_arrays_may_be_donated_right_after_save(make):
    checkpointer = make(keep=30)
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((256, 1024), jnp.float32)
    for step in range(1, 9):
        x = advance(x)
        checkpointer.save(step, {'x': x}, {'step': step})
        for _ in range(3):  # overwrites the memory while the writing goes on
            x = advance(x)
    checkpointer.close()
    checkpointer = make(read_only=True)
    for step in range(1, 9):
        found, _ = checkpointer.restore(step, {'x': x})
        np.testing.assert_array_equal(found['x'], np.full(x.shape, 4 * step - 3, np.float32))


def test_an_unfinished_save_is_not_a_checkpoint(make, tmp_path):
    checkpointer = make()
    checkpointer.save(1, arrays(1), {'step': 1}, 0.5)
    checkpointer.close()
    # What a kill in the middle of a save leaves.
    unfinished = tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp'
    (unfinished / 'arrays.orbax-checkpoint-tmp').mkdir(parents=True)
    checkpointer = make()
    assert checkpointer.latest_step == 1
    checkpointer.save(2, arrays(2), {'step': 2}, 0.6)
    checkpointer.close()
    assert not unfinished.exists()
    assert make(read_only=True).restore(2, arrays(0))[1] == {'step': 2}


def files_of(folder):
    return sorted(p for p in folder.rglob('*') if p.is_file())


@pytest.mark.parametrize('damage', ['emptied', 'deleted'])
def test_a_damaged_checkpoint_names_its_folder(make, tmp_path, damage):
    checkpointer = make()
    for step in (1, 2):
        checkpointer.save(step, arrays(step), {'step': step}, 0.5)
    checkpointer.close()
    folder = tmp_path / 'checkpoints' / '2'
    for path in files_of(folder / 'arrays'):
        path.write_bytes(b'') if damage == 'emptied' else path.unlink()
    checkpointer = make(read_only=True)
    with pytest.raises(ValueError, match='the checkpoint can not be read') as error:
        checkpointer.restore(2, arrays(0))
    assert str(folder) in str(error.value) and '\n' not in str(error.value)
    assert checkpointer.restore(1, arrays(0))[1] == {'step': 1}


def test_another_structure_is_an_error(make):
    checkpointer = make()
    checkpointer.save(1, arrays(1), {'step': 1})
    checkpointer.close()
    with pytest.raises(ValueError, match='checkpoints/1: the checkpoint can not be read'):
        make(read_only=True).restore(1, {'a': jnp.zeros((3, 2)), 'c': jnp.zeros(3)})
    with pytest.raises(ValueError, match='checkpoints/1: the checkpoint can not be read'):
        make(read_only=True).restore(1, {'a': jnp.zeros((4, 4)), 'b': {'count': jnp.int32(0)}})
