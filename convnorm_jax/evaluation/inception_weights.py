"""The published weights of the 2015 Inception: found or downloaded once, read without torch.

A .pth file is a pickle, which could run arbitrary code when it is read. The reader here permits only
tensors and their containers.
"""

import hashlib
import http.client
import io
import math
import pickle
import struct
import urllib.request
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convnorm_jax.data.cache import cache_root
from convnorm_jax.errors import UserError
from convnorm_jax.evaluation.features import FeatureExtractor
from convnorm_jax.evaluation.inception import InceptionV3, check_convention, preprocess
from convnorm_jax.files import write_atomically

FILE_NAME = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}'
_SHA256 = '6726825d'  # the first digits, which are part of the file's name
_TIMEOUT = 10  # seconds without a response

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before torch 1.6
_STORAGES = {
    'DoubleStorage': '<f8',
    'FloatStorage': '<f4',
    'HalfStorage': '<f2',
    'LongStorage': '<i8',
    'IntStorage': '<i4',
    'ShortStorage': '<i2',
    'CharStorage': '<i1',
    'ByteStorage': '<u1',
    'BoolStorage': '|b1',
}
_LEAVES = {
    ('conv', 'kernel'): 'conv.weight',
    ('bn', 'scale'): 'bn.weight',
    ('bn', 'bias'): 'bn.bias',
    ('bn', 'mean'): 'bn.running_mean',
    ('bn', 'var'): 'bn.running_var',
    ('fc', 'kernel'): 'fc.weight',
    ('fc', 'bias'): 'fc.bias',
}


def inception_extractor(path: str | Path | None = None, preprocessing: str = 'tensorflow1') -> FeatureExtractor:
    """Makes the extractor of the 2015 Inception: its scores are FID, KID and IS as published.

    Args:
      path: of its weight file; None for the cached or downloaded one, see `find_weights`.
      preprocessing: see `convnorm_jax.evaluation.inception.preprocess`; the scores of the two differ slightly.

    Returns:
      A `FeatureExtractor` with the label 'inception'.

    Raises:
      ValueError: there is no weight file, or it is not the published one.
    """
    check_convention(preprocessing)  # before a download
    path, digest = find_weights(path)
    return inception_from_variables(import_weights(read_state_dict(path)), digest, preprocessing)


def inception_from_variables(variables: Any, digest: str, preprocessing: str = 'tensorflow1') -> FeatureExtractor:
    """Makes the extractor from variables that `import_weights` returned, and a digest of them."""
    model = InceptionV3()

    def features_fn(variables: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        found: Any = model.apply(variables, preprocess(pixels, preprocessing))
        return found

    name = f'inception2015-{preprocessing}'
    digest = hashlib.sha256(f'{name} {digest}'.encode()).hexdigest()
    return FeatureExtractor(name, digest, features_fn, variables, 'inception')


def find_weights(path: str | Path | None = None) -> tuple[Path, str]:
    """Finds the weight file of the 2015 Inception, or downloads it.

    Args:
      path: the user's file. None for the one in the cache ($CONVNORM_CACHE, else
        ~/.cache/convnorm_jax), which is downloaded if there is none.

    Returns:
      (path, its sha256 in hexadecimal).

    Raises:
      ValueError: there is no such file, it has another sha256, or it cannot be downloaded.
    """
    if path:
        path = Path(path).expanduser()
        digest = _sha256(path)
        if not digest.startswith(_SHA256):
            raise UserError(
                f'file={str(path)!r}: its sha256 begins with {digest[:8]}, expected {_SHA256}: scores of other weights '
                f'are not FID; download {URL} again'
            )
        return path, digest
    path = cache_root() / FILE_NAME
    if path.is_file():
        digest = _sha256(path)
        if digest.startswith(_SHA256):
            return path, digest
        warnings.warn(
            f'{path}: its sha256 begins with {digest[:8]}, expected {_SHA256}; it is downloaded again',
            RuntimeWarning,
            stacklevel=2,
        )
    return path, _download(path)


def _sha256(path: Path) -> str:
    try:
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise UserError(
            f'file={str(path)!r}: cannot be read ({error.strerror}); expected the weights of {URL}'
        ) from error


def _download(path: Path) -> str:
    by_hand = f'download {URL} on a machine with a network and copy it to {path}'
    try:
        with urllib.request.urlopen(URL, timeout=_TIMEOUT) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # no network, unknown host, refused, timeout, interrupted
        reason = ' '.join(str(getattr(error, 'reason', error)).split())
        raise UserError(f'the Inception weights cannot be downloaded ({reason}): {by_hand}') from error
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(_SHA256):
        raise UserError(
            f'the downloaded Inception weights have the sha256 {digest[:8]}..., expected {_SHA256}: {by_hand}'
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(
            f'file={str(path)!r}: cannot be written ({error.strerror}); set CONVNORM_CACHE to a writable folder'
        ) from error
    return digest


def import_weights(state_dict: Mapping[str, Any], model: InceptionV3 | None = None) -> dict[str, Any]:
    """Converts the state dict of the PyTorch port of the Inception to variables.

    Args:
      state_dict: published names -> NumPy arrays in PyTorch's layout. BatchNorm's counters are ignored, and so is
        the bias of the logits if the model has none.
      model: an `InceptionV3`; None for the default one.

    Returns:
      {'params': ..., 'batch_stats': ...}, float32.

    Raises:
      ValueError: names that are missing or left over, or arrays of another shape; all are listed.
    """
    model = model or InceptionV3()
    images = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    template = traverse_util.flatten_dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images))
    wanted = {path: '.'.join((*path[1:-2], _LEAVES[path[-2:]])) for path in template}
    ignored = ('num_batches_tracked',) if model.logits_bias else ('num_batches_tracked', 'fc.bias')
    state_dict = {name: a for name, a in state_dict.items() if not name.endswith(ignored)}
    missing, leftover = set(wanted.values()) - set(state_dict), set(state_dict) - set(wanted.values())
    if missing or leftover:
        raise UserError(
            f'state_dict does not fit the 2015 Inception: missing {_few(missing)}, left over {_few(leftover)}; '
            f'expected the contents of {FILE_NAME}'
        )
    leaves = {path: _convert(np.asarray(state_dict[name])) for path, name in wanted.items()}
    wrong = [
        f'{wanted[path]} as {leaf.shape}, expected {template[path].shape}'
        for path, leaf in leaves.items()
        if leaf.shape != template[path].shape
    ]
    if wrong:
        raise UserError(f'state_dict does not fit the 2015 Inception: {_few(wrong)} (in the order of axes here)')
    variables: dict[str, Any] = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(leaves))
    return variables


def _convert(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    return np.asarray(array.T if array.ndim == 2 else array, np.float32)


def _few(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more if names else 'nothing'


class _Storage(NamedTuple):
    key: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    """Replaces `torch._utils._rebuild_tensor_v2`: in an older file the numbers come after the pickle."""
    return _Tensor(storage, offset, shape, strides)


class _TensorUnpickler(pickle.Unpickler):
    """Loads tensors, their storages and OrderedDict only: any other pickle could run arbitrary code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return _rebuild_tensor
        if (module, name) == ('collections', 'OrderedDict'):
            return OrderedDict
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is not permitted')

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != 'storage' or dtype not in _STORAGES.values() or any(v is not None for v in view):
            raise pickle.UnpicklingError(f'it asks for {kind!r}, which is not permitted')
        return _Storage(str(key), dtype, count)


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a .pth file, without torch and without running any code in the file.

    Reads what `torch.save(net.state_dict(), path)` writes, as the zip file of torch 1.6 and later or as
    the earlier series of pickles. The file must be little-endian, as nearly all are.

    Args:
      path: of the file.

    Returns:
      Names -> NumPy arrays, writable copies.

    Raises:
      ValueError: the file cannot be read, is damaged, or holds anything but named tensors.
    """
    try:
        content = Path(path).read_bytes()
        read = _read_zip if content[:2] == b'PK' else _read_pickles
        tensors, storages = read(content)
        if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, _Tensor) for t in tensors.values()):
            raise pickle.UnpicklingError('it holds no dict of tensors')
        return {str(name): _materialize(tensor, storages) for name, tensor in tensors.items()}
    except Exception as error:  # a damaged pickle can raise almost any exception
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(
            f'file={str(path)!r}: expected a state dict saved by torch, but {reason}; download or save it again'
        ) from error


def _read_zip(content: bytes) -> tuple[Any, dict[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name.endswith('/data.pkl') and name.count('/') == 1]
        if len(names) != 1:
            raise pickle.UnpicklingError('the zip file has no single data.pkl')
        folder = names[0].removesuffix('data.pkl')
        if f'{folder}byteorder' in archive.namelist() and archive.read(f'{folder}byteorder') != b'little':
            raise pickle.UnpicklingError('it is not little-endian')
        tensors = _TensorUnpickler(io.BytesIO(archive.read(names[0]))).load()
        data = {name.removeprefix(f'{folder}data/'): name for name in archive.namelist() if f'{folder}data/' in name}
        return tensors, {key: archive.read(name) for key, name in data.items()}


def _read_pickles(content: bytes) -> tuple[Any, dict[str, bytes]]:
    file = io.BytesIO(content)
    magic, _, system, tensors, keys = (_TensorUnpickler(file).load() for _ in range(5))
    if magic != _MAGIC or not system['little_endian']:
        raise pickle.UnpicklingError('it is not a little-endian file of torch')
    dtypes = {t.storage.key: t.storage.dtype for t in tensors.values() if isinstance(t, _Tensor)}
    storages = {}
    for key in keys:
        (count,) = struct.unpack('<q', file.read(8))
        storages[key] = file.read(count * np.dtype(dtypes[key]).itemsize)
    return tensors, storages


def _materialize(tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    storage, offset, shape, strides = tensor
    integers = (storage.size, offset, *shape, *strides)
    if any(type(i) is not int or i < 0 for i in integers) or len(shape) != len(strides):
        raise pickle.UnpicklingError('a tensor has no proper shape')
    dtype = np.dtype(storage.dtype)
    numbers = np.frombuffer(storages[storage.key], dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    if math.prod(shape) > numbers.size or (math.prod(shape) and last >= numbers.size) or numbers.size < storage.size:
        raise pickle.UnpicklingError(f'a tensor of shape {tuple(shape)} is larger than its {numbers.size} numbers')
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    steps = [s * dtype.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps).copy()
