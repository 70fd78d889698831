"""The file of an exported net: a header and named blocks of bytes, under one digest.

::

    convnorm_jax exported net 1
    SHA-256 of all that follows, hexadecimal
    the header, one line of JSON, with the name and length of each block
    the blocks, one after another

A block may be an array, with a dtype and a shape. The first three lines are text: `head -n 3 FILE` shows them.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16 by its name)
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.files import read_whole, write_atomically

MAGIC = b'convnorm_jax exported net '
FORMAT = 1


def write_container(
    path: str | os.PathLike[str], header: Mapping[str, Any], blocks: Mapping[str, bytes | np.ndarray]
) -> None:
    """Writes a file, atomically.

    Args:
      path: of the file; its folder must exist.
      header: JSON values by name.
      blocks: bytes or arrays by name, in their order in the file.
    """
    described, contents = [], []
    for name, block in blocks.items():
        about: dict[str, Any] = {'name': name}
        if isinstance(block, np.ndarray):
            about |= {'dtype': block.dtype.name, 'shape': list(block.shape)}
            block = np.ascontiguousarray(block).tobytes()
        described.append({**about, 'bytes': len(block)})
        contents.append(bytes(block))
    line = json.dumps({**header, 'blocks': described}).encode() + b'\n'
    start = b'%s%d\n%s\n' % (MAGIC, FORMAT, _digest(line, *contents).encode())
    write_atomically(path, lambda file: file.writelines([start, line, *contents]))


def read_container(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, bytes | np.ndarray]]:
    """Returns the header and the blocks of a file, after checking its digest.

    Raises:
      ValueError: the file does not exist, is of another kind, is damaged, or has a newer format.
    """
    content = read_whole(path)
    first, _, rest = content.partition(b'\n')
    if not first.startswith(MAGIC):
        raise UserError(f'{path}: is not an exported net; expected a file that save_exported has written')
    number = first[len(MAGIC) :]
    if number.isdigit() and int(number) > FORMAT:
        raise UserError(
            f'{path}: is of format {int(number)}, this version reads up to {FORMAT}; install a newer convnorm_jax'
        )
    digest, _, rest = rest.partition(b'\n')
    if number != b'%d' % FORMAT or digest != _digest(rest).encode():
        raise UserError(f'{path}: is damaged or incomplete (its digest differs); copy or export it again')
    line, _, rest = rest.partition(b'\n')
    header = json.loads(line)
    blocks, start = {}, 0
    for about in header.pop('blocks'):
        end = start + about['bytes']
        blocks[about['name']] = _block(rest[start:end], about)
        start = end
    return header, blocks


def _block(content, about):
    if 'dtype' not in about:
        return content
    count = math.prod(about['shape'])
    return np.frombuffer(content, np.dtype(about['dtype']), count).reshape(about['shape'])


def _digest(*parts):
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
