"""Loads and runs an exported net, with JAX and without the code of the net."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.exported.container import read_container
from convnorm_jax.exported.serialization import deserialize


def load_exported(path: str | os.PathLike[str]) -> 'Exported':
    """Returns an exported net, loaded on the default device.

    Args:
      path: of a file that `save_exported` or `save_exported_generator` has written.

    Returns:
      An `Exported`; call it with a batch.

    Raises:
      ValueError: the file does not exist, is of another kind or damaged; it has a newer format, was written by a JAX
        whose programs this JAX cannot read, or is for other platforms than the default device's.

    Example:
      >>> import tempfile
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from convnorm_jax import load_exported, save_exported
      >>> from convnorm_jax.models import create_model
      >>> model = create_model('simple_cnn', num_classes=10, layer='convnorm', depth=(1,))
      >>> images = jnp.ones((8, 8, 8, 1))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> path = tempfile.mkdtemp() + '/net.exported'
      >>> save_exported(path, model, variables, (8, 8, 1), platforms='cpu')
      >>> net = load_exported(path)
      >>> net(images).shape
      (8, 10)
    """
    return Exported(path, *read_container(path))


class Exported:
    """A loaded exported net, a function of batches.

    A classifier maps images to logits::

        net = load_exported('net.exported')
        logits = net(images)  # float32 [B, H, W, C] in [0, 1] -> [B, classes]

    A generator maps latents to images in [0, 1]: `net(z)`, or `net(z, labels)` if it is conditional. Each batch size is
    compiled on its first call. The net can be called within `jax.jit` and has no derivatives.

    Args:
      path: of the file.
      header, blocks: as `container.read_container` returns them.

    Attributes:
      path: of the file.
      kind: 'classifier' or 'generator'.
      inputs, outputs: a tuple of {'name', 'shape', 'dtype'}, without the batch axis.
      image_shape: [H, W, C] of the images that it takes or generates, a tuple.
      dtype: of the first input.
      platforms: for which it was exported, a tuple.
      folded: whether it has ConvNorm layers, which are folded.
      config: of the training run, nested dicts, or None.
      versions: {'convnorm_jax', 'jax'}, with which it was exported.
      parameters: number of its parameters.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any], blocks: Mapping[str, Any]) -> None:
        self.path = str(path)
        self.kind, self.config, self.folded = header['kind'], header['config'], header['folded']
        self.inputs, self.outputs = tuple(header['inputs']), tuple(header['outputs'])
        self.platforms, self.versions = tuple(header['platforms']), header['versions']
        self.dtype = np.dtype(self.inputs[0]['dtype'])
        self.image_shape = tuple((self.outputs if self.kind == 'generator' else self.inputs)[0]['shape'])
        stored = [block for block in blocks.values() if isinstance(block, np.ndarray)]
        self.parameters = header['parameters']
        number = self._program_number(header['programs'], platform())
        self._check_dtypes(stored)
        program = self._program(blocks[f'program {number}'])
        weights = [jnp.asarray(array) for array in stored]
        if self.folded:
            weights = self._result(jax.jit(self._program(blocks[f'folding {number}']).call), weights)
        self._weights, self._run = weights, jax.jit(program.call)

    def __call__(self, *inputs: Any) -> jax.Array:
        """Returns the output of the net for a batch.

        Args:
          *inputs: arrays with a batch axis, in the order, shapes and dtypes of the attribute `inputs`.

        Raises:
          ValueError: an input of another shape or dtype, or inputs of different batch sizes.
        """
        if len(inputs) != len(self.inputs):
            names = ', '.join(about['name'] for about in self.inputs)
            raise UserError(f'{self.path}: takes {len(self.inputs)} arrays ({names}), got {len(inputs)}')
        arrays = [array if hasattr(array, 'dtype') else np.asarray(array) for array in inputs]
        for array, about in zip(arrays, self.inputs):
            self._check(array, about)
        if len({array.shape[0] for array in arrays}) > 1:
            batches = ' and '.join(f'{array.shape[0]} {about["name"]}' for array, about in zip(arrays, self.inputs))
            raise UserError(f'{self.path}: got {batches}; expected as many of each')
        return self._result(self._run, self._weights, *arrays)

    def __repr__(self) -> str:
        taken = ', '.join(f'{about["name"]} {about["dtype"]}{["B", *about["shape"]]}' for about in self.inputs)
        return f'Exported({self.path!r}, {self.kind} of {taken}, platforms={self.platforms})'.replace("'B'", 'B')

    def _check(self, array, about):
        name, shape, dtype = about['name'], tuple(about['shape']), about['dtype']
        if array.shape[1:] != shape or len(array.shape) != len(shape) + 1:
            expected = f'[B, {", ".join(map(str, shape))}]' if shape else '[B]'
            advice = f'; {name}[None] makes a batch of one' if array.shape == shape else ''
            raise UserError(f'{self.path}: {name}.shape={tuple(array.shape)}, expected {expected}{advice}')
        if array.shape[0] == 0:
            raise UserError(f'{self.path}: {name}.shape={tuple(array.shape)} is an empty batch; expected one or more')
        if str(array.dtype) != dtype:
            whole = np.issubdtype(np.dtype(array.dtype), np.integer) and name == 'images'
            scale = ', and / 255 of bytes, for pixels are in [0, 1]' if whole else ''
            raise UserError(
                f'{self.path}: {name}.dtype={array.dtype}, expected {dtype}; convert by {name}.astype({dtype!r}){scale}'
            )

    def _program_number(self, programs, here):
        for number, platforms in enumerate(programs):
            if here in platforms:
                return number
        raise UserError(
            f'{self.path}: was exported for {", ".join(self.platforms)}, and this process computes on {here}; '
            f'export it with platforms={(*self.platforms, here)!r}, or choose another by the variable JAX_PLATFORMS'
        )

    def _check_dtypes(self, weights):
        dtypes = {array.dtype.name for array in weights} | {about['dtype'] for about in (*self.inputs, *self.outputs)}
        if any(name.endswith('64') for name in dtypes) and not jax.config.jax_enable_x64:
            raise UserError(f"{self.path}: computes in 64 bits; call jax.config.update('jax_enable_x64', True) first")

    def _program(self, content):
        try:
            return deserialize(content)
        except UserError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def _result(self, run, *arguments):
        try:
            return run(*arguments)
        except jax.errors.JaxRuntimeError as error:  # JAX parses a program on its first call
            if 'Failed to deserialize' not in str(error):
                raise
            raise self._unreadable(error) from error

    def _unreadable(self, error):
        # JAX promises to read programs of the last six months, and of a JAX up to three weeks newer.
        words = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        return UserError(
            f'{self.path}: jax {jax.__version__} cannot read this program of jax {self.versions["jax"]} ({words}); '
            'install that version, or export the net again with this one'
        )


def platform() -> str:
    """Returns the platform of the default device, 'cpu', 'cuda', 'rocm' or 'tpu'."""
    device = next(iter(jnp.zeros(()).devices()))
    if device.platform != 'gpu':
        return device.platform
    return 'rocm' if 'rocm' in device.client.platform_version.lower() else 'cuda'
