"""A net's variables as safetensors: flat names such as 'params/conv1/kernel', with the config next to them."""

import hashlib
import importlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convnorm_jax.errors import UserError
from convnorm_jax.files import check_place, read_whole, write_atomically
from convnorm_jax.mesh import fetch

SEPARATOR = '/'

# Of the arrays, by the format's names.
_DTYPES = {'BOOL': 'bool', 'BF16': 'bfloat16'}
_DTYPES |= {f'F{bits}': f'float{bits}' for bits in (16, 32, 64)}
_DTYPES |= {
    f'{letter}{bits}': f'{kind}{bits}' for letter, kind in (('I', 'int'), ('U', 'uint')) for bits in (8, 16, 32, 64)
}


def save_weights(path, variables, config: dict | None = None):
    """Writes variables as a safetensors file; the config goes into its metadata, and into `path`.json to be read.

    Args:
      path: of the file; its folder must exist.
      variables: nested dicts of arrays: parameters and every other collection.
      config: nested dicts that JSON can say, or None.

    Raises:
      ValueError: safetensors is missing; a tree that is not made of dicts, or a dtype that the format does not have.
    """
    library, arrays = check_installed(), _flat(variables)
    check_place(path, 'path')
    # Its values are texts.
    metadata = {'format': 'flax', 'convnorm_jax_config': json.dumps(config), 'convnorm_jax_digest': _digest(arrays)}
    content = library.numpy.save(arrays, metadata)
    write_atomically(path, lambda file: file.write(content))
    if config is not None:
        text = json.dumps(config, indent=2) + '\n'
        write_atomically(f'{path}.json', lambda file: file.write(text.encode()))


def load_weights(path) -> tuple[dict[str, Any], dict | None]:
    """(variables, config) of a file of `save_weights`; of another safetensors file the config is None.

    Args:
      path: of the file.

    Returns:
      Nested dicts of NumPy arrays with the dtypes that were saved; the config, from the file itself.

    Raises:
      ValueError: safetensors is missing; no such file, or a damaged one.
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


def check_installed():
    """The package safetensors; raises UserError where it is missing."""
    try:
        importlib.import_module('safetensors.numpy')
        return importlib.import_module('safetensors')
    except ImportError as error:
        raise UserError(
            "weights as safetensors need the package of that name: pip install 'convnorm_jax[safetensors]'"
        ) from error


def _flat(variables):
    """{name: array}, each contiguous."""
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
