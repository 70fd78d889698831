"""Checkpoints: which are kept, what comes back, what a damaged one says."""

import errno
import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.runs import digest
from convnorm_jax.runs.checkpoint import Checkpointer, Damaged


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
    with pytest.raises(Damaged, match='the checkpoint cannot be read') as error:
        checkpointer.restore(2, arrays(0))
    assert str(folder) in str(error.value) and '\n' not in str(error.value)
    assert checkpointer.restore(1, arrays(0))[1] == {'step': 1}


def test_another_structure_is_an_error_and_no_damage(make, tmp_path):
    checkpointer = make()
    checkpointer.save(1, arrays(1), {'step': 1})
    checkpointer.close()
    others = (
        {'a': jnp.zeros((3, 2)), 'c': jnp.zeros(3)},
        {'a': jnp.zeros((4, 4)), 'b': {'count': jnp.int32(0)}},
        {'a': jnp.zeros((3, 2)), 'b': {'count': jnp.float32(0)}},
    )
    for other in others:
        with pytest.raises(ValueError, match='checkpoints/1: the checkpoint is of another net') as error:
            make().resume(other)
        assert not isinstance(error.value, Damaged)
    assert steps_on_disk(make(read_only=True)) == [1] and not (tmp_path / 'damaged').exists()


def many(value):
    """Arrays of every kind that a state may hold."""
    numbers = jax.random.normal(jax.random.key(value), (64, 33))
    return {
        'float': numbers,
        'bfloat16': numbers.astype(jnp.bfloat16),
        'int': jnp.arange(-7, 50, dtype=jnp.int32),
        'byte': jnp.arange(9, dtype=jnp.uint8),
        'bool': numbers[0] > 0,
        'scalar': jnp.float32(value),
        'key': jax.random.key(value),
        'same': (numbers, numbers + 0),
    }


def test_the_digest_knows_every_bit():
    tree = many(1)
    leaves, treedef = jax.tree.flatten(tree)
    whole, rng = digest.digest(tree), np.random.default_rng(0)
    assert whole == digest.digest(many(1)) and 0 <= whole < 2**32
    for i, leaf in enumerate(leaves):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        host = np.array(jax.random.key_data(leaf) if typed else leaf)
        for place in rng.choice(8 * host.nbytes, min(4, 8 * host.nbytes), replace=False):
            changed = host.copy()
            bit = 0 if host.dtype == bool else place % 8  # of a bool there is but one
            changed.reshape(-1).view(np.uint8)[place // 8] ^= np.uint8(1 << bit)
            new = jax.random.wrap_key_data(changed) if typed else jnp.asarray(changed)
            assert (
                host.size and digest.digest(jax.tree.unflatten(treedef, [*leaves[:i], new, *leaves[i + 1 :]])) != whole
            )


def test_the_digest_knows_places_and_names():
    tree = {'a': jnp.arange(6.0), 'b': jnp.ones(6)}
    whole = digest.digest(tree)
    assert digest.digest({'a': tree['b'], 'b': tree['a']}) != whole
    assert digest.digest({'a': tree['a'][::-1], 'b': tree['b']}) != whole
    assert digest.digest({'a': tree['a'], 'c': tree['b']}) != whole
    assert digest.structure(tree) == digest.structure(jax.eval_shape(lambda: tree))
    assert digest.structure({'a': jnp.arange(6.0), 'b': jnp.ones(6, jnp.int32)}) != digest.structure(tree)


def test_the_digest_does_not_depend_on_the_devices():
    tree = {'x': jax.random.normal(jax.random.key(0), (8, 5)), 'n': jnp.int32(3)}
    mesh = mesh_lib.create_mesh()
    assert mesh.size == 4
    cut = {'x': mesh_lib.cut_batch(mesh, tree['x']), 'n': mesh_lib.replicate(mesh, tree['n'])}
    assert digest.digest(tree) == digest.digest(cut) == digest.digest(mesh_lib.replicate(mesh, tree))


def test_a_digest_holds_on_other_devices(make):
    mesh = mesh_lib.create_mesh()
    checkpointer = make()
    checkpointer.save(1, {'x': jnp.arange(8.0)}, {'step': 1})
    checkpointer.save(2, {'x': mesh_lib.cut_batch(mesh, jnp.arange(8.0))}, {'step': 2})
    checkpointer.close()
    checkpointer = make(read_only=True)
    for like in (jnp.zeros(8), mesh_lib.cut_batch(mesh, jnp.zeros(8)), mesh_lib.replicate(mesh, jnp.zeros(8))):
        for step in (1, 2):
            found = checkpointer.restore(step, {'x': like})[0]['x']
            assert found.sharding == like.sharding
            np.testing.assert_array_equal(found, np.arange(8.0))


def saved_steps(make, ratings=(0.1, 0.9, 0.3)):
    """Steps 1, 2, ... saved with these ratings."""
    checkpointer = make(keep=len(ratings))
    for step, rating in enumerate(ratings, 1):
        checkpointer.save(step, many(step), {'step': step}, rating)
    checkpointer.close()


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_whatever_bit_flips_a_resume_finds_what_was_saved(make, tmp_path, capsys):
    saved_steps(make)
    kept, rng, moved = tmp_path / 'kept', random.Random(0), 0
    shutil.copytree(tmp_path / 'checkpoints', kept)
    paths = [p.relative_to(kept) for p in files_of(kept / '3') if p.stat().st_size]
    for path in paths:
        shutil.rmtree(tmp_path / 'checkpoints')
        shutil.rmtree(tmp_path / 'damaged', ignore_errors=True)
        shutil.copytree(kept, tmp_path / 'checkpoints')
        broken = tmp_path / 'checkpoints' / path
        flip(broken, rng.randrange(broken.stat().st_size), rng.randrange(8))
        checkpointer = make(keep=3)
        step, found, progress = checkpointer.resume(many(0))
        checkpointer.close()
        err = capsys.readouterr().err
        # Some of Orbax's files are not needed for reading; what is read is right in any case.
        assert step in (2, 3) and progress == {'step': step}
        for name, leaf in many(step).items():
            if name == 'key':
                leaf, found[name] = jax.random.key_data(leaf), jax.random.key_data(found[name])
            jax.tree.map(np.testing.assert_array_equal, found[name], leaf)
        if step == 2:
            moved += 1
            assert 'checkpoint of step 3 is damaged (' in err and 'resuming from step 2' in err
            assert f'kept in {tmp_path}/damaged/3;' in err and len(err.splitlines()) == 1
            assert len(files_of(tmp_path / 'damaged' / '3')) == len(files_of(kept / '3'))
            assert steps_on_disk(checkpointer) == [1, 2]
        else:
            assert not err and not (tmp_path / 'damaged').exists()
    assert moved >= len(paths) // 3


def test_damage_that_orbax_reads_is_noticed(make, tmp_path):
    saved_steps(make, (0.1, 0.2))
    # The arrays of another step in this one's folder: all of it can be read.
    for path in ('arrays', 'progress'):
        folder = tmp_path / 'checkpoints' / '2' / path
        kept = tmp_path / path
        shutil.copytree(folder, kept)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / 'checkpoints' / '1' / path, folder)
        with pytest.raises(Damaged, match='its arrays are not those that were saved'):
            make(read_only=True).restore(2, many(0))
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    progress = tmp_path / 'checkpoints' / '2' / 'progress' / 'metadata'
    progress.write_text(progress.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(Damaged, match='its progress: ValueError: it is not what was saved'):
        make(read_only=True).restore(2, many(0))


def test_when_all_are_damaged(make, tmp_path, capsys):
    saved_steps(make)
    for step in (1, 2, 3):
        (tmp_path / 'checkpoints' / str(step) / 'progress' / 'metadata').write_text('{')
    with pytest.raises(ValueError, match='all of them are damaged') as error:
        make(read_only=True).restore_one('best', many(0))
    assert not isinstance(error.value, Damaged) and '\n' not in str(error.value)
    assert steps_on_disk(make(read_only=True)) == [1, 2, 3]
    with pytest.raises(ValueError, match=r'all checkpoints were damaged, .*/damaged; .*start from step'):
        make().resume(many(0))
    assert sorted(os.listdir(tmp_path / 'damaged')) == ['1', '2', '3']
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert make().resume(many(0)) is None
    saved_steps(make)
    (tmp_path / 'checkpoints' / '3' / 'progress' / 'metadata').write_text('{')
    assert make(keep=3).resume(many(0))[0] == 2
    assert sorted(os.listdir(tmp_path / 'damaged')) == ['1', '2', '3', '3-1']


def test_an_evaluation_moves_nothing_and_says_what_it_uses(make, tmp_path, capsys):
    saved_steps(make)
    (tmp_path / 'checkpoints' / '2' / 'progress' / 'metadata').write_text('{')
    checkpointer = make(read_only=True)
    assert checkpointer.restore_one('latest', many(0))[1:] == ({'step': 3}, {'step': 3})
    assert capsys.readouterr().err == ''
    # The best cannot be read: the next best.
    shutil.rmtree(tmp_path / 'checkpoints' / '1' / 'arrays')
    assert checkpointer.restore_one('best', many(0))[1] == {'step': 3}
    shutil.rmtree(tmp_path / 'checkpoints' / '3' / 'arrays')
    with pytest.raises(ValueError, match='all of them are damaged'):
        checkpointer.restore_one('best', many(0))
    assert steps_on_disk(checkpointer) == [1, 2, 3] and not (tmp_path / 'damaged').exists()


def test_the_next_best_is_said(make, tmp_path, capsys):
    saved_steps(make)
    shutil.rmtree(tmp_path / 'checkpoints' / '2' / 'arrays')
    found = make(read_only=True).restore_one('best', many(0))
    assert found[1:] == ({'step': 3}, {'step': 3})
    err = capsys.readouterr().err
    assert err.startswith('checkpoint of step 2 is damaged (') and 'using that of step 3 instead' in err


def test_checkpoints_from_before_the_digests(make, tmp_path):
    # As they were written then: the progress alone, and the rating in a file of its own.
    saved_steps(make)
    for step, rating in ((1, 0.9), (2, 0.2), (3, 0.3)):
        folder = tmp_path / 'checkpoints' / str(step)
        (folder / 'progress' / 'metadata').write_text(json.dumps({'step': step}))
        (folder / 'metrics').mkdir()
        (folder / 'metrics' / 'metrics').write_text(json.dumps({'rating': rating, 'step': step}))
    checkpointer = make(read_only=True)
    assert checkpointer.best_step == 1 and checkpointer.restore_one('best', many(0))[1] == {'step': 1}
    with pytest.raises(ValueError, match='is of another net'):
        checkpointer.restore(1, arrays(0))
    (tmp_path / 'checkpoints' / '1' / 'metrics' / 'metrics').write_text('{"rati')
    checkpointer = make(keep=3)
    assert checkpointer.best_step == 3
    assert checkpointer.resume(many(0))[0] == 3


def test_trouble_of_our_own_is_no_damage(make, tmp_path, monkeypatch):
    saved_steps(make, (0.1,))
    for trouble in (MemoryError('no memory'), OSError(errno.EMFILE, 'too many files')):
        checkpointer = make()

        def fails(*args, trouble=trouble, **options):
            raise trouble

        monkeypatch.setattr(checkpointer._manager, 'restore', fails)
        with pytest.raises(ValueError, match='cannot be read') as error:
            checkpointer.resume(many(0))
        assert not isinstance(error.value, Damaged)
    assert steps_on_disk(make(read_only=True)) == [1]
