"""Checkpoints of PyTorch: where their weights are, and what may lie next to them."""

import argparse
import builtins
import pathlib

import jax
import numpy as np
import pytest

from convnorm_jax.models import create_model
from convnorm_jax.torch_import import import_state_dict, load_pth

INPUT = (1, 32, 32, 3)


@pytest.fixture(scope='module')
def small(load_golden, golden_weights):
    """(model, its state dict with parameters only)."""
    return create_model('simple_cnn', num_classes=10, layer='convnorm'), golden_weights(load_golden('simplecnn_attack'))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_load_pth_without_torch(monkeypatch):
    real_import = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == 'torch':
            raise ImportError('no torch')
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', no_torch)
    with pytest.raises(ValueError, match=r'model\.pth.*pip install torch'):
        load_pth('model.pth')


_CONTAINERS = 'state_dict', 'model_state_dict', 'model', 'net'
CHECKPOINTS = {
    'plain': lambda state: state,
    **{key: lambda state, key=key: {'epoch': 3, key: state} for key in _CONTAINERS},
    'twice': lambda state: {'state_dict': {'net': state}},
    'with_args': lambda state: {'net': state, 'args': argparse.Namespace(lr=0.1, name='a', path=pathlib.Path('b'))},
    'with_numpy': lambda state: {'net': state, 'acc': np.float64(93.5), 'epoch': np.int64(3), 'all': np.arange(3.0)},
    'among_the_weights': lambda state: {**state, 'args': argparse.Namespace(lr=0.1), 'acc': np.float32(93.5)},
    'beside_a_tensor': lambda state: {'best': next(iter(state.values())) * 0, 'net': state},
}


@pytest.mark.parametrize('wrap', CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_is_imported(small, wrap):
    model, parameters = small
    equal(import_state_dict(model, wrap(parameters), INPUT), import_state_dict(model, parameters, INPUT))


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_prefixes_of_wrappers(small, prefix):
    model, parameters = small
    renamed = {prefix + name: array for name, array in parameters.items()}
    equal(import_state_dict(model, renamed, INPUT), import_state_dict(model, parameters, INPUT))
    name = next(iter(parameters))
    with pytest.raises(ValueError, match=f"are both '{name}'"):
        import_state_dict(model, {**renamed, name: parameters[name]}, INPUT)


@pytest.mark.parametrize('given', [3, None, {}, {'epoch': 3, 'net': [1, 2]}, {'acc': np.float64(3)}])
def test_nothing_to_import(small, given):
    with pytest.raises(ValueError, match=r"state_dict: expected a state dict of tensors.*'net', got"):
        import_state_dict(small[0], given, INPUT)


def test_torch_parameters_are_imported(small):
    torch = pytest.importorskip('torch')
    model, parameters = small
    given = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in parameters.items()}
    equal(import_state_dict(model, given, INPUT), import_state_dict(model, parameters, INPUT))
    halves = {name: torch.tensor(array).bfloat16() for name, array in parameters.items()}
    kernel = import_state_dict(model, halves, INPUT)['params']['conv1_1']['kernel']
    np.testing.assert_allclose(kernel, parameters['features.0.weight'].transpose(2, 3, 1, 0), rtol=0.01)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('wrap', CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_load_pth(tmp_path, wrap, zipped):
    torch = pytest.importorskip('torch')
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    state = {'a.weight': weight, 'a.num_batches_tracked': torch.tensor(4)}
    torch.save(wrap(state), tmp_path / 'model.pth', _use_new_zipfile_serialization=zipped)
    loaded = load_pth(tmp_path / 'model.pth')
    assert set(loaded) == set(state)
    assert all(isinstance(array, np.ndarray) for array in loaded.values())
    np.testing.assert_array_equal(loaded['a.weight'], np.arange(6.0).reshape(2, 3))


class Unknown:
    """Of a class that torch does not know."""


@pytest.mark.parametrize('zipped', [True, False])
def test_load_pth_of_a_class_says_how_to_allow_it(tmp_path, zipped):
    torch = pytest.importorskip('torch')
    path = tmp_path / 'model.pth'
    torch.save({'net': {'a': torch.ones(2)}, 'mine': Unknown()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf'safe_globals\(\[{__name__}.Unknown\]\)') as error:
        load_pth(path)
    assert '\x1b' not in str(error.value) and '\n' not in str(error.value)
    assert str(error.value).startswith(str(path)) and str(error.value).endswith('load_pth(PATH)')
    with torch.serialization.safe_globals([Unknown]):
        np.testing.assert_array_equal(load_pth(path)['a'], np.ones(2))


@pytest.mark.parametrize('content', [3, {}, {'epoch': 3}, {'state_dict': [1, 2]}])
def test_load_pth_without_a_state_dict(tmp_path, content):
    torch = pytest.importorskip('torch')
    torch.save(content, tmp_path / 'model.pth')
    with pytest.raises(ValueError, match=r'model\.pth'):
        load_pth(tmp_path / 'model.pth')


@pytest.mark.parametrize('damage', ['text', 'empty', 'cut', 'folder', 'missing'])
def test_load_pth_of_what_is_no_checkpoint(tmp_path, damage):
    torch = pytest.importorskip('torch')
    path = tmp_path / 'model.pth'
    torch.save({'a': torch.ones(100)}, tmp_path / 'whole.pth')
    if damage == 'folder':
        path.mkdir()
    elif damage != 'missing':
        whole = (tmp_path / 'whole.pth').read_bytes()
        path.write_bytes({'text': b'no checkpoint', 'empty': b'', 'cut': whole[: len(whole) // 2]}[damage])
    with pytest.raises(ValueError, match=r'model\.pth: (torch )?cannot (be )?read') as error:
        load_pth(path)
    text = str(error.value)
    assert '\x1b' not in text and '\n' not in text and text.endswith((')', 'whole'))
    assert text.count('(') == text.count(')')
