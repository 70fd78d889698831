"""Weights as safetensors: what is saved comes back, bit for bit, with its config."""

import json
import os
import sys

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convnorm_jax import load_weights, save_weights
from convnorm_jax.errors import UserError
from convnorm_jax.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        b = np.asarray(b)
        assert isinstance(a, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def test_the_variables_of_a_net(tmp_path):
    model = create_model('simple_cnn', num_classes=5, layer='convnorm', width=4, depth=(1,))
    x = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3), np.float32))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    path, config = tmp_path / 'net.safetensors', {'model': {'depth': (1, 2), 'stem': None}, 'seed': 3}
    save_weights(path, variables, config)
    found, found_config = load_weights(path)
    assert_same(found, dict(variables))
    assert found['batch_stats']['conv1_1']['count'].shape == ()
    assert found_config == {'model': {'depth': [1, 2], 'stem': None}, 'seed': 3}
    assert json.loads((tmp_path / 'net.safetensors.json').read_text()) == found_config
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(found, x), apply(variables, x))
    # Any reader of safetensors finds flat names.
    names = safetensors.numpy.load_file(path)
    assert names['params/conv1_1/kernel'].shape == variables['params']['conv1_1']['kernel'].shape
    # FrozenDict, and weights without a config.
    save_weights(tmp_path / 'frozen', flax.core.freeze(variables))
    assert_same(load_weights(tmp_path / 'frozen')[0], dict(variables))
    assert load_weights(tmp_path / 'frozen')[1] is None and not (tmp_path / 'frozen.json').exists()


DTYPES = [
    'bool',
    'uint8',
    'int8',
    'uint16',
    'int16',
    'uint32',
    'int32',
    'uint64',
    'int64',
    'float16',
    'float32',
    'float64',
]


@pytest.mark.parametrize('dtype', [*DTYPES, ml_dtypes.bfloat16], ids=str)
def test_every_dtype(dtype, tmp_path):
    values = np.random.default_rng(0).integers(0, 2**7, 12).astype(dtype)
    tree = {'a': {'b': values.reshape(3, 4).T, 'scalar': values[0], 'empty': values[:0]}, 'c': values[::2]}
    save_weights(tmp_path / 'w', tree)
    assert_same(load_weights(tmp_path / 'w')[0], tree)


def test_a_file_of_another_program(tmp_path):
    safetensors.numpy.save_file({'conv.weight': np.ones((2, 3), np.float32)}, tmp_path / 'w')
    found, config = load_weights(tmp_path / 'w')
    assert_same(found, {'conv.weight': np.ones((2, 3), np.float32)})
    assert config is None


def test_damage_is_refused(tmp_path):
    path = tmp_path / 'w'
    save_weights(path, {'params': {'kernel': np.arange(1000.0)}})
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for place in [*random.integers(len(content) - 8000, len(content), 20), len(content) - 1, 3]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match='damaged'):
            load_weights(path)
    for length in (len(content) - 1, 50, 4, 0):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match='not a safetensors file, or a damaged one'):
            load_weights(path)
    with pytest.raises(UserError, match='cannot be read'):
        load_weights(tmp_path / 'nowhere')


@pytest.mark.parametrize(
    ('tree', 'words'),
    [
        ({}, 'there is no array in it'),
        ({'a': [np.ones(2)]}, "'a/0' is not in nested dicts"),
        ({'a/b': np.ones(2)}, "'a/b' is not in nested dicts whose keys are texts without '/'"),
        ({'a': np.ones(2, complex)}, "'a' is of complex128, which safetensors does not have"),
    ],
)
def test_trees_that_it_cannot_hold(tree, words, tmp_path):
    with pytest.raises(UserError) as caught:
        save_weights(tmp_path / 'w', tree)
    assert words in str(caught.value) and not os.listdir(tmp_path)


def test_without_the_package(tmp_path, monkeypatch):
    save_weights(tmp_path / 'w', {'a': np.ones(2)})
    for name in [name for name in sys.modules if name.split('.')[0] == 'safetensors']:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: load_weights(tmp_path / 'w'), lambda: save_weights(tmp_path / 'v', {'a': np.ones(2)})):
        with pytest.raises(UserError, match=r"package of that name: pip install 'convnorm_jax\[safetensors\]'"):
            call()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match='cannot be written'):
        save_weights(tmp_path / 'nowhere' / 'w', {'a': np.ones(2)})
