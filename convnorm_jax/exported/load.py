"""Running an exported net: needs JAX, and none of the net's code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.exported.container import read_container
from convnorm_jax.exported.serialization import deserialize


def load_exported(path) -> 'Exported':
    """The net in a file of `save_exported` or `save_exported_generator`, on this process's default device.

    Args:
      path: of the file.

    Returns:
      An `Exported`: call it with a batch.

    Raises:
      ValueError: no file of this kind; a damaged one; one of a newer format, of another JAX, or for other platforms
        than this process computes on.
    """
    return Exported(path, *read_container(path))


class Exported:
    """An exported net.

        net = load_exported('net.exported')
        logits = net(images)  # float32 [B, H, W, C] in [0, 1] -> [B, classes]

    Of a generator `net(z)`, or `net(z, labels)` of one that is conditional: images in [0, 1].
    Every new batch size is compiled once. It can be called within `jax.jit`, and has no derivatives.

    Attributes:
      path: of the file.
      kind: 'classifier' or 'generator'.
      inputs, outputs: ({'name', 'shape', 'dtype'}, ...), without the batch axis.
      image_shape: [H, W, C] of the images, put in or drawn, a tuple.
      dtype: of the first input.
      platforms: that it was exported for.
      folded: whether it has ConvNorm layers, which are folded.
      config: of the run it is from, nested dicts; None for no run.
      versions: {'convnorm_jax', 'jax'} that exported it.
      parameters: numbers in its weights.
    """

    def __init__(self, path, header: dict, blocks: dict[str, Any]):
        self.path = str(path)
        self.kind, self.config, self.folded = header['kind'], header['config'], header['folded']
        self.inputs, self.outputs = tuple(header['inputs']), tuple(header['outputs'])
        self.platforms, self.versions = tuple(header['platforms']), header['versions']
        self.dtype = np.dtype(self.inputs[0]['dtype'])
        self.image_shape = tuple((self.outputs if self.kind == 'generator' else self.inputs)[0]['shape'])
        weights = [block for block in blocks.values() if isinstance(block, np.ndarray)]
        self.parameters = header['parameters']
        number = self._program_number(header['programs'], platform())
        self._check_dtypes(weights)
        program = self._program(blocks[f'program {number}'])
        weights = [jnp.asarray(array) for array in weights]
        if self.folded:
            weights = self._result(jax.jit(self._program(blocks[f'folding {number}']).call), weights)
        self._weights, self._run = weights, jax.jit(program.call)

    def __call__(self, *inputs):
        """What the net makes of a batch; see the class.

        Raises:
          ValueError: an input of another shape or dtype than the net takes.
        """
        if len(inputs) != len(self.inputs):
            names = ', '.join(about['name'] for about in self.inputs)
            raise UserError(f'{self.path}: takes {len(self.inputs)} arrays ({names}), got {len(inputs)}')
        inputs = [array if hasattr(array, 'dtype') else np.asarray(array) for array in inputs]
        for array, about in zip(inputs, self.inputs):
            self._check(array, about)
        if len({array.shape[0] for array in inputs}) > 1:
            batches = ' and '.join(f'{array.shape[0]} {about["name"]}' for array, about in zip(inputs, self.inputs))
            raise UserError(f'{self.path}: got {batches}; expected as many of each')
        return self._result(self._run, self._weights, *inputs)

    def __repr__(self):
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
        except jax.errors.JaxRuntimeError as error:  # a program is parsed when it is first called
            if 'Failed to deserialize' not in str(error):
                raise
            raise self._unreadable(error) from error

    def _unreadable(self, error):
        # JAX promises to read programs of the last six months, and those of a JAX that is three weeks newer.
        words = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        return UserError(
            f'{self.path}: jax {jax.__version__} cannot read this program of jax {self.versions["jax"]} ({words}); '
            'install that version, or export the net again with this one'
        )


def platform() -> str:
    """'cpu', 'cuda', 'rocm' or 'tpu': of the device that arrays are put on."""
    device = next(iter(jnp.zeros(()).devices()))
    if device.platform != 'gpu':
        return device.platform
    return 'rocm' if 'rocm' in device.client.platform_version.lower() else 'cuda'
