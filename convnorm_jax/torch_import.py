"""Imports the weights of the published PyTorch implementation as variables of these nets."""

import argparse
import collections
import contextlib
import os
import pathlib
import re
import types
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from convnorm_jax.errors import UserError
from convnorm_jax.models.plain import PlainNet, SimpleCNN2
from convnorm_jax.models.resnet import ResNet

# The published names of each of our names within a convolution block; a state dict has at most one of them. {norm} is
# the published name of the normalization after the convolution.
_BLOCK_NAMES = {
    ('kernel',): '{conv}.weight',
    ('affine_kernel',): '{conv}.bpconv.weight',
    ('affine_bias',): '{conv}.bpconv.bias',
    ('batch_norm', 'scale'): '{conv}.batch_norm.weight',
    ('batch_norm', 'bias'): '{conv}.batch_norm.bias',
    ('batch_norm', 'mean'): '{conv}.batch_norm.running_mean',
    ('batch_norm', 'var'): '{conv}.batch_norm.running_var',
    ('preconditioner',): '{conv}.running_V',
    ('conv', 'kernel'): '{conv}.weight {conv}.conv.weight_orig {conv}.weight_v',
    ('conv', 'bias'): '{conv}.bias {conv}.conv.bias',
    ('conv', 'scale'): '{conv}.WNScale {conv}.weight_g',
    ('conv', 'u'): '{conv}.conv.weight_u',
    ('conv', 'v'): '{conv}.conv.weight_v',
    ('norm', 'scale'): '{norm}.weight',
    ('norm', 'bias'): '{norm}.bias',
    ('norm', 'mean'): '{norm}.running_mean',
    ('norm', 'var'): '{norm}.running_var',
    ('shift',): '{conv}.srelu_bias',
}
_OPTIONAL = re.compile(r'running_mean$|running_var$|running_V$|\.conv\.weight_[uv]$')
_IGNORED = re.compile(r'num_batches_tracked$')

# The keys under which checkpoints keep the state dict, next to epochs and arguments.
_CONTAINERS = ('state_dict', 'model_state_dict', 'model', 'net')
# The prefixes that DataParallel and torch.compile add to every name.
_WRAPPERS = re.compile(r'(module\.|_orig_mod\.)+')


def import_state_dict(model: nn.Module, state_dict: Mapping[str, Any], input_shape: Sequence[int]) -> dict[str, Any]:
    """Returns the variables of a net from a state dict of the published PyTorch implementation.

    Running statistics may be missing: those of BatchNorm then start at 0 and 1, and the spectrum of ConvNorm is that of
    the given kernel. The counters of BatchNorm are ignored. The update count of ConvNorm starts at 0, as the published
    code does when it restarts.

    Args:
      model: a net made by `create_model` with the layer that the weights were trained with.
      state_dict: a mapping of published names to arrays in PyTorch's layout, which may be NumPy arrays, torch tensors
        or torch parameters; or a checkpoint that holds such a mapping under 'state_dict', 'model_state_dict', 'model'
        or 'net'. Values that are no arrays are ignored, and the prefixes of DataParallel and torch.compile are removed.
      input_shape: shape of a batch of images, [B, H, W, C], or of one image, [H, W, C]. The running spectra are for
        this image size.

    Returns:
      {'params': ..., 'batch_stats': ...}, float32.

    Raises:
      ValueError: a state dict without arrays; names left over or missing, which are listed; an array of another shape.

    Example:
      >>> import numpy as np
      >>> from convnorm_jax.models import create_model
      >>> from convnorm_jax.torch_import import import_state_dict
      >>> model = create_model('simple_cnn', num_classes=10, layer='convnorm', depth=(1,))
      >>> state_dict = {
      ...     'features.0.weight': np.ones((8, 3, 3, 3)),
      ...     'features.0.bpconv.weight': np.ones((8, 1, 3, 3)),
      ...     'features.0.bpconv.bias': np.ones(8),
      ...     'features.0.batch_norm.weight': np.ones(8),
      ...     'features.0.batch_norm.bias': np.ones(8),
      ...     'classifier.weight': np.ones((10, 2048)),
      ...     'classifier.bias': np.ones(10),
      ... }
      >>> variables = import_state_dict(model, state_dict, (32, 32, 3))
      >>> variables['params']['conv1_1']['kernel'].shape
      (3, 3, 3, 8)
    """
    found = find_state_dict(state_dict)
    if found is None:
        raise UserError(f'state_dict: {_no_state_dict(state_dict)}')
    shape = tuple(input_shape) if len(input_shape) == 4 else (1, *input_shape)
    images = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)
    template = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    state_dict = {k: _to_numpy(v) for k, v in _unwrapped(found).items() if not _IGNORED.search(k)}
    wanted = {
        path: (published_name(model, path[1:], state_dict), leaf)
        for path, leaf in traverse_util.flatten_dict(template).items()
        if path[-1] != 'count'
    }
    # A layer that was never trained has a placeholder of one zero for its spectrum.
    state_dict = {k: v for k, v in state_dict.items() if not (k.endswith('running_V') and v.shape == (1,))}
    _check_names(wanted, state_dict)
    leaves = {
        path: _convert(name, state_dict[name], leaf) for path, (name, leaf) in wanted.items() if name in state_dict
    }
    _check_shapes(wanted, leaves, shape)
    params = traverse_util.unflatten_dict({p[1:]: v for p, v in leaves.items() if p[0] == 'params'})
    fresh = _fresh_statistics(model, params, images.shape)
    variables = traverse_util.flatten_dict({'params': params, **fresh})
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict({**variables, **leaves}))


def _fresh_statistics(model, params, shape):
    """Returns {'batch_stats': ...}, initialized from the given parameters."""

    def initialize(params):
        _, state = model.apply({'params': params}, jnp.zeros(shape), train=False, mutable=['batch_stats'])
        return state

    return jax.jit(initialize)(params)


def published_name(model: nn.Module, path: Sequence[str], given: Container[str] = ()) -> str:
    """Returns the published name of a parameter or statistic.

    Args:
      model: see `import_state_dict`.
      path: names of the modules around it, and its own name.
      given: the names in a state dict. If there are several published names, the one among these is returned.

    Raises:
      ValueError: the net or its layer has no published counterpart.
    """
    if not isinstance(model, (PlainNet, SimpleCNN2, ResNet)):
        raise UserError(
            f'a {type(model).__name__} was not published: there are weights of ResNets, VGGs and the SimpleCNNs'
        )
    *modules, block, leaf = path if len(path) > 1 else ('', *path)
    name: tuple[str, ...] = (leaf,)
    if (block, leaf) in _BLOCK_NAMES:
        block, name = modules.pop(), (block, leaf)
    if block == 'linear':
        prefix = 'linear' if isinstance(model, ResNet) else 'fc' if isinstance(model, SimpleCNN2) else 'classifier'
        return f'{prefix}.{"weight" if name == ("kernel",) else "bias"}'
    if name not in _BLOCK_NAMES:
        raise UserError(
            f'{"/".join(path)}: a {type(model).__name__} with this layer was not published; '
            'import into one of convnorm, batchnorm, none'
        )
    conv, norm = _published_modules(model, modules, block)
    names = _BLOCK_NAMES[name].format(conv=conv, norm=norm).split()
    return next((each for each in names if each in given), names[0])


def _published_modules(model, modules, block):
    """Returns the published names of a block's convolution (or activation) and of its normalization."""
    if isinstance(model, PlainNet):
        return _feature_names(model, block)
    prefix = ''.join(m.replace('_', '.') + '.' for m in modules)
    if block == 'shortcut':
        return f'{prefix}shortcut.0', f'{prefix}shortcut.1'
    return f'{prefix}{block}', f'{prefix}{block.replace("conv", "norm")}'


def _feature_names(model, block):
    """Returns the names features.N of a block named conv{stage}_{number} and of its normalization."""
    # The published VGG has an average pool of size one after every convolution with its ReLU, and after every max pool.
    per_conv, per_pool = (4, 2) if model.family == 'vgg' else (3, 1)
    kind, stage, number = re.fullmatch(r'(conv|relu)(\d+)_(\d+)', block).groups()
    before = sum(model.depth[: int(stage) - 1]) + int(number) - 1
    index = before * per_conv + (int(stage) - 1) * per_pool
    index += 2 if kind == 'relu' else 0
    return f'features.{index}', f'features.{index + 1}'


def _check_names(wanted, state_dict):
    names = {name for name, _ in wanted.values()}
    missing = sorted(n for n in names - set(state_dict) if not _OPTIONAL.search(n))
    leftover = sorted(set(state_dict) - names)
    if missing or leftover:
        raise UserError(
            f'state_dict does not fit the model: missing {missing or "nothing"}, left over {leftover or "nothing"}; '
            'give create_model the name, layer, width, depth and num_classes that the weights were trained with'
        )


def _convert(name, array, leaf):
    """Returns one array in the layout of this library."""
    if name.endswith('running_V') and array.ndim == 3:
        # Whether the width is even or odd is known from the leaf, not from half of the spectrum.
        array = _full_spectrum(array.transpose(1, 2, 0), leaf.shape[1])
    elif name.endswith(('srelu_bias', 'WNScale', 'weight_g')):
        array = array.reshape(-1)
    elif array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.T
    return np.asarray(array, np.float32)


def _check_shapes(wanted, leaves, input_shape):
    wrong = [
        f'{wanted[path][0]} gives {array.shape}, the model has {wanted[path][1].shape}'
        for path, array in leaves.items()
        if array.shape != wanted[path][1].shape
    ]
    if wrong:
        raise UserError(f'state_dict does not fit the model for images of {tuple(input_shape[1:])}: {"; ".join(wrong)}')


def _full_spectrum(half, width):
    """Returns the full spectrum [Hf, Wf, C] from its half [Hf, Wf//2+1, C], by V(w) = V(-w)."""
    if half.shape[1] != width // 2 + 1:
        return half  # for another image size, which the check of shapes reports
    mirrored = np.roll(np.flip(half, 0), 1, 0)[:, 1 : (width + 1) // 2][:, ::-1]
    return np.concatenate([half, mirrored], axis=1)


def find_state_dict(content: Any) -> dict[str, Any] | None:
    """Returns the arrays of a checkpoint by name.

    Args:
      content: a state dict, or a checkpoint that holds one under 'state_dict', 'model_state_dict', 'model' or 'net'.

    Returns:
      {name: array}, or None if there are no arrays.
    """
    if not isinstance(content, Mapping):
        return None
    nested = (find_state_dict(content.get(key)) for key in _CONTAINERS)
    arrays = {name: value for name, value in content.items() if isinstance(name, str) and _is_array(value)}
    return next(filter(None, nested), None) or arrays or None


def _is_array(value):
    """Returns whether a value is an array or a tensor of numbers; a NumPy scalar does not count."""
    if isinstance(value, np.generic) or not hasattr(value, 'shape'):
        return False
    return not isinstance(value, np.ndarray) or value.dtype.kind in 'biufc'


def _to_numpy(value):
    # A torch tensor may require a gradient, be on a GPU, or have a dtype that NumPy lacks.
    return value.detach().cpu().float().numpy() if hasattr(value, 'detach') else np.asarray(value)


def _unwrapped(state_dict):
    """Returns the state dict without the prefixes of wrappers in its names."""
    names = {name: _WRAPPERS.sub('', name, count=1) if _WRAPPERS.match(name) else name for name in state_dict}
    for plain, count in collections.Counter(names.values()).items():
        if count > 1:
            given = sorted(name for name in names if names[name] == plain)
            raise UserError(f'state_dict: {" and ".join(given)} are both {plain!r}; give the weights of one net')
    return {names[name]: value for name, value in state_dict.items()}


def _no_state_dict(content):
    held = f'keys {sorted(map(str, content))}' if isinstance(content, Mapping) else f'a {type(content).__name__}'
    where = ', '.join(map(repr, _CONTAINERS))
    return f'expected a state dict of tensors, by itself or under one of {where}, got {held}'


def load_pth(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the state dict in a `.pth` file as NumPy arrays, for `import_state_dict`.

    Nothing in the file is executed: next to tensors only plain values, NumPy's and `argparse.Namespace` are read. Other
    classes must be allowed around the call, with `torch.serialization.safe_globals([...])`.

    Args:
      path: of a file that `torch.save` has written: a state dict, or a checkpoint that holds one, see
        `import_state_dict`.

    Returns:
      {published name: array}.

    Raises:
      ValueError: torch is not installed; the file cannot be read in this way; it holds no state dict.
    """
    try:
        import torch  # imported here, because nothing else needs it
    except ImportError as error:
        raise UserError(f'{path}: reading a .pth file needs torch (pip install torch), or save it as .npz') from error
    with _harmless_allowed(torch):
        try:
            content = torch.load(path, map_location='cpu', weights_only=True)
        except OSError as error:
            raise UserError(f'{path}: cannot be read ({error.strerror or error})') from error
        except Exception as error:
            raise UserError(f'{path}: {_why_refused(torch, path, error)}') from error
    state = find_state_dict(content)
    if state is None:
        raise UserError(f'{path}: {_no_state_dict(content)}')
    return {name: _to_numpy(tensor) for name, tensor in state.items()}


def _harmless_allowed(torch):
    """Returns a context in which torch reads harmless values that checkpoints often hold next to weights."""
    # Before torch 2.6 the names of NumPy 1, which have moved since, cannot be allowed.
    if not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):
        return contextlib.nullcontext()
    multiarray = getattr(np, '_core', None) or np.core
    moved = [
        (getattr(multiarray.multiarray, name), f'{package}.multiarray.{name}')
        for name in ('scalar', '_reconstruct')
        for package in ('numpy.core', 'numpy._core')
    ]
    plain = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in np.typecodes['All'] if kind != 'O'}]
    classes = [argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, collections.defaultdict, list, dict]
    # Without those that the user has allowed, because the end of the context would disallow them.
    allowed = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([each for each in (*moved, *plain, *classes) if each not in allowed])


def _why_refused(torch, path, error):
    """Returns why `torch.load` does not read a file, in one sentence without colour codes."""
    said = ' '.join(re.sub(r'\x1b\[[0-9;]*m', '', str(error)).split())
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch before 2.6, or a file in the format of torch before 1.6
        names = re.findall(r'Unsupported (?:global: GLOBAL|class) (\S+)', said)
    if names:
        named = ', '.join(sorted(names))
        return (
            f'the file holds more than plain tensors: {named}, which could run any code when it is loaded; if you '
            'trust whoever made it, save the weights alone with the program that it comes from, torch.save('
            f'model.state_dict(), PATH), or allow it: with torch.serialization.safe_globals([{named}]): load_pth(PATH)'
        )
    detail = said.split('WeightsUnpickler error: ')[-1].split(' Check the documentation')[0].split('. ')[0].rstrip('.')
    detail = type(error).__name__ + (f': {detail}' if detail else '')
    return f'torch cannot read it ({detail}); expected a file written by torch.save, whole'
