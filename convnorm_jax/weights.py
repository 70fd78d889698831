"""Saves and loads the variables of a net as safetensors, under flat names such as 'params/conv1/kernel'."""

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convnorm_jax.errors import UserError
from convnorm_jax.files import check_place, read_whole, write_atomically
from convnorm_jax.mesh import fetch

SEPARATOR = '/'

# The dtypes of arrays, by their names in the format.
_DTYPES = {'BOOL': 'bool', 'BF16': 'bfloat16'}
_DTYPES |= {f'F{bits}': f'float{bits}' for bits in (16, 32, 64)}
_DTYPES |= {
    f'{letter}{bits}': f'{kind}{bits}' for letter, kind in (('I', 'int'), ('U', 'uint')) for bits in (8, 16, 32, 64)
}


def save_weights(
    path: str | os.PathLike[str], variables: Mapping[str, Any], config: dict[str, Any] | None = None
) -> None:
    """Writes variables as a safetensors file.

    The config goes into the metadata of the file and, for people to read, into `path`.json.

    Args:
      path: of the file; its folder must exist.
      variables: nested dicts of arrays, parameters and every other collection.
      config: nested dicts of JSON values, or None.

    Raises:
      ValueError: safetensors is not installed; a tree that is not made of dicts; a dtype that the format does not have.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from convnorm_jax import load_weights, save_weights
      >>> path = tempfile.mkdtemp() + '/net.safetensors'
      >>> save_weights(path, {'params': {'conv1': {'kernel': jnp.ones((3, 3, 3, 8))}}}, {'seed': 0})
      >>> variables, config = load_weights(path)
      >>> variables['params']['conv1']['kernel'].shape, config
      ((3, 3, 3, 8), {'seed': 0})
    """
    library, arrays = check_installed(), _flat(variables)
    check_place(path, 'path')
    # Metadata values must be strings.
    metadata = {'format': 'flax', 'convnorm_jax_config': json.dumps(config), 'convnorm_jax_digest': _digest(arrays)}
    content = library.numpy.save(arrays, metadata)
    write_atomically(path, lambda file: file.write(content))
    if config is not None:
        text = json.dumps(config, indent=2) + '\n'
        write_atomically(f'{path}.json', lambda file: file.write(text.encode()))


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the variables and the config in a safetensors file; `save_weights` has an example.

    Args:
      path: of a file that `save_weights` or another program has written.

    Returns:
      Nested dicts of NumPy arrays with the dtypes that were saved, and the config from the metadata of the file, None
      if there is none.

    Raises:
      ValueError: safetensors is not installed; the file does not exist or is damaged.
    """
    library = check_installed()
    content = read_whole(path)
    try:
        tensors = library.deserialize(content)
    except library.SafetensorError as error:
        raise UserError(f'{path}: is not a safetensors file, or a damaged one ({error}); copy it again') from error
    length = int.from_bytes(content[:8], 'little')
    metadata = json.loads(content[8 : 8 + length]).get('__metadata__', {})
    arrays = {name: _array(path, name, **tensor) for name, tensor in tensors}
    if metadata.get('convnorm_jax_digest', _digest(arrays)) != _digest(arrays):
        raise UserError(f'{path}: is damaged (its digest differs); copy it again')
    return traverse_util.unflatten_dict(arrays, sep=SEPARATOR), json.loads(metadata.get('convnorm_jax_config', 'null'))


def check_installed() -> ModuleType:
    """Returns the package safetensors; raises UserError if it is not installed."""
    try:
        importlib.import_module('safetensors.numpy')
        return importlib.import_module('safetensors')
    except ImportError as error:
        raise UserError(
            "weights as safetensors need the package of that name: pip install 'convnorm_jax[safetensors]'"
        ) from error


def _flat(variables):
    """The arrays by their flat names, each contiguous."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    if not leaves:
        raise UserError('variables: there is no array in it, nothing to save')
    flat = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=SEPARATOR)
        keys = [getattr(entry, 'key', None) for entry in path]
        if not all(isinstance(key, str) and key and SEPARATOR not in key for key in keys):
            raise UserError(f'variables: {name!r} is not in nested dicts whose keys are texts without {SEPARATOR!r}')
        array = np.asarray(fetch(leaf), order='C')
        if array.dtype.name not in _DTYPES.values():
            raise UserError(f'variables: {name!r} is of {array.dtype}, which safetensors does not have')
        flat[name] = array
    return flat


def _array(path, name, dtype, shape, data):
    if dtype not in _DTYPES:
        raise UserError(f'{path}: {name!r} is of {dtype}; expected one of {", ".join(_DTYPES)}')
    return np.frombuffer(bytearray(data), jnp.dtype(_DTYPES[dtype])).reshape(shape)


def _digest(arrays):
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f'{name} {array.dtype.name} {array.shape}'.encode() + array.tobytes())
    return found.hexdigest()
