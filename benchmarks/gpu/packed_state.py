"""The runs of the last stage, small enough to travel: their files, and the checkpoint of the one that is going on.

A checkpoint of ResNet-18 is 90 MB, parameters and momentum in float32; what may travel with all else is less than half
of it. So large arrays are rounded, parameters and statistics to 12 bits behind the leading one (bfloat16 computes with
7), momentum to 4, and written as entropy codes of their bytes: exponents, which are much alike, then the bits of the
mantissas, then signs. A run goes on from parameters that differ by 1.2e-4 of each at most. In parts of 15 MiB: larger
files do not come back.
"""

import concurrent.futures
import glob
import io
import json
import os
import shutil
import zipfile
import zlib

import jax
import numpy as np

PART_BYTES = 15 << 20
_PART = 'runs.part{:02d}'
_KEPT_BITS = {'opt_state': 4, 'params': 12, 'batch_stats': 12}
_LEAST_SIZE = 4096  # of an array that is rounded
_MOST_FILE_BYTES = 24 << 20
_MANTISSA, _STATE = 23, 'state.json'


def save(folder, runs, layer=None, arrays=None, progress=None):
    """Writes parts into a folder, in place of those that are there.

    Args:
      folder: of the plan's results.
      runs: holds a folder for each run; left out are their checkpoints, and files too large to travel, such as the
        state in the middle of some attacks, which then begin again.
      layer: the run that `arrays` and `progress` are of, see `training.checkpoint.Checkpointer.save`; None for none.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_STORED) as archive:
        for where, folders, names in os.walk(runs):
            folders[:] = [name for name in folders if name not in ('checkpoints', 'damaged')]
            for name in names:
                path = os.path.join(where, name)
                if os.path.getsize(path) > _MOST_FILE_BYTES:
                    continue
                archive.write(path, os.path.join('runs', os.path.relpath(path, runs)), zipfile.ZIP_DEFLATED)
        if layer is not None:
            facts, planes = _encode(arrays)
            archive.writestr(_STATE, json.dumps({'layer': layer, 'progress': progress, 'leaves': facts}))
            for name, plane in planes.items():
                archive.writestr(name, plane)
    content = buffer.getvalue()
    for path in _parts(folder):
        os.remove(path)
    for i, start in enumerate(range(0, len(content), PART_BYTES)):
        with open(os.path.join(folder, _PART.format(i)), 'wb') as file:
            file.write(content[start : start + PART_BYTES])
    return len(content)


def load(folder, runs):
    """Puts the files of the runs back.

    Returns:
      (layer, function like -> arrays, progress) of the run that has a checkpoint, or None.

    Raises:
      ValueError: no parts, or not all of them.
    """
    content = b''.join(open(path, 'rb').read() for path in _found(folder))  # noqa: SIM115
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile as error:  # the last part is missing, or one is of another run
        raise ValueError(
            f'--resume={folder}: expected all parts {_PART.format(0)}, ... of one run ({error})'
        ) from error
    os.makedirs(runs, exist_ok=True)
    names = archive.namelist()
    for name in names:
        if name.startswith('runs/'):
            path = os.path.join(runs, os.path.relpath(name, 'runs'))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'wb') as file:
                file.write(archive.read(name))
    if _STATE not in names:
        return None
    stored = json.loads(archive.read(_STATE))
    planes = {name: archive.read(name) for name in names if name.startswith('planes/')}
    return stored['layer'], lambda like: _decode(stored['leaves'], planes, like), stored['progress']


def copy(folder, target):
    """Copies the parts of a folder into a new one.

    Raises:
      ValueError: there are none.
    """
    os.makedirs(target)
    for path in _found(folder):
        shutil.copy(path, target)


def _parts(folder):
    return sorted(glob.glob(os.path.join(folder, 'runs.part*')))


def _found(folder):
    found = _parts(folder)
    if not found:
        raise ValueError(f'--resume={folder}: expected {_PART.format(0)} in it, as an earlier run leaves it')
    for i, path in enumerate(found):
        if os.path.basename(path) != _PART.format(i):
            raise ValueError(f'--resume={folder}: expected all parts of one run, but {_PART.format(i)} is missing')
    return found


# --- arrays --------------------------------------------------------------------------------------


def _encode(arrays):
    """(JSON data of each leaf, {name: compressed bytes})."""
    facts, exact, rounded = [], [], {kind: [] for kind in _KEPT_BITS}
    for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        kind = next((kind for kind in _KEPT_BITS if kind in name), None)
        if leaf.dtype != np.float32 or leaf.size < _LEAST_SIZE:
            kind = None
        facts.append({'name': name, 'shape': leaf.shape, 'dtype': str(leaf.dtype), 'kind': kind})
        (rounded[kind] if kind else exact).append(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    planes = {'planes/exact': b''.join(map(bytes, exact))}
    for kind, leaves in rounded.items():
        words = np.concatenate(leaves or [np.zeros(0, np.uint8)]).view(np.uint32)
        # Exponent, mantissa, sign, each as whole bytes as can be.
        words = _round(words, _KEPT_BITS[kind])
        words = (words << 1) | (words >> 31)
        for i, plane in enumerate(words.astype('>u4').view(np.uint8).reshape(-1, 4).T):
            planes[f'planes/{kind}{i}'] = np.ascontiguousarray(plane)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return facts, dict(zip(planes, pool.map(_compress, planes.values())))


def _round(words, bits):
    """Bits of float32, rounded to the nearest with so many bits of the mantissa, halves up; infinities stay."""
    drop = _MANTISSA - bits
    finite = (words >> _MANTISSA) & 0xFF != 0xFF
    up = words.astype(np.uint64) + (1 << (drop - 1))
    kept = (up >> drop << drop).astype(np.uint32)
    return np.where(finite, kept, words).astype(np.uint32)


def _compress(plane):
    """Of bytes that are independent of each other Huffman's codes are all there is to gain; else they repeat."""
    constant = isinstance(plane, np.ndarray) and plane.size and not np.any(plane != plane[0])
    strategy = zlib.Z_DEFAULT_STRATEGY if constant or isinstance(plane, bytes) else zlib.Z_HUFFMAN_ONLY
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    return compressor.compress(bytes(plane)) + compressor.flush()


def _decode(facts, planes, like):
    """Arrays of the structure, dtypes and shardings of `like`."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        planes = dict(zip(planes, pool.map(zlib.decompress, planes.values())))
    flat = {None: planes['planes/exact']}
    for kind in _KEPT_BITS:
        columns = [np.frombuffer(planes[f'planes/{kind}{i}'], np.uint8) for i in range(4)]
        words = np.ascontiguousarray(np.stack(columns, 1)).view('>u4').reshape(-1).astype(np.uint32)
        flat[kind] = ((words >> 1) | (words << 31)).tobytes()
    leaves, places = [], dict.fromkeys(flat, 0)
    found = jax.tree_util.tree_flatten_with_path(like)[0]
    expected = [(jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)) for path, leaf in found]
    if expected != [(fact['name'], fact['shape'], fact['dtype']) for fact in facts]:
        raise ValueError('the packed checkpoint is of another net or optimizer; train again, without --resume')
    for fact, (_, leaf) in zip(facts, found):
        size = int(np.prod(fact['shape'])) * np.dtype(fact['dtype']).itemsize
        start = places[fact['kind']]
        places[fact['kind']] += size
        array = np.frombuffer(flat[fact['kind']][start : start + size], fact['dtype']).reshape(fact['shape'])
        leaves.append(jax.device_put(array, leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
