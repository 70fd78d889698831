"""The published PyTorch weights, as variables of these nets. NumPy in, variables out."""

import argparse
import collections
import contextlib
import pathlib
import re
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convnorm_jax.errors import UserError
from convnorm_jax.models.plain import PlainNet, SimpleCNN2
from convnorm_jax.models.resnet import ResNet

# (our name within a convolution block, its published names, of which a state dict has
# one at most). {norm} is the published name of the normalization after the convolution.
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

# Where checkpoints keep the state dict, next to epochs and arguments.
_CONTAINERS = ('state_dict', 'model_state_dict', 'model', 'net')
# What DataParallel and torch.compile put before every name.
_WRAPPERS = re.compile(r'(module\.|_orig_mod\.)+')


def import_state_dict(model, state_dict, input_shape):
    """Variables of a net from the published implementation's state dict.

    Args:
      model: a net made by `create_model` with the layer the weights were trained with.
      state_dict: mapping of published names to arrays in PyTorch's layout: NumPy's, torch tensors or parameters. Or a
        checkpoint that holds one under 'state_dict', 'model_state_dict', 'model' or 'net'; what is no array is passed
        over. The prefixes of DataParallel and torch.compile are dropped. Running statistics may be absent: BatchNorm's
        then start at 0 and 1, ConvNorm's spectrum is that of the given kernel. BatchNorm's counters are ignored;
        ConvNorm's update count starts at 0, which is what the published code does at a restart.
      input_shape: NHWC shape of a batch of images, or HWC of one: the running spectra
        belong to that picture size.

    Returns:
      {'params': ..., 'batch_stats': ...}, float32.

    Raises:
      ValueError: no arrays; names left over or missing, listed; an array of another shape.
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
    """{'batch_stats': ...} initialized from the given parameters."""

    def initialize(params):
        _, state = model.apply({'params': params}, jnp.zeros(shape), train=False, mutable=['batch_stats'])
        return state

    return jax.jit(initialize)(params)


def published_name(model, path, given=()):
    """Published name of a parameter or statistic, from its path of module names.

    Args:
      model: see `import_state_dict`.
      path: names of modules, and of the leaf.
      given: the names in a state dict: of several published names that one counts which
        is among them.

    Raises:
      ValueError: the net or its layer has no published counterpart.
    """
    if not isinstance(model, (PlainNet, SimpleCNN2, ResNet)):
        raise UserError(
            f'a {type(model).__name__} was not published: there are weights of ResNets, VGGs and the SimpleCNNs'
        )
    *modules, block, leaf = path if len(path) > 1 else ('', *path)
    if (block, leaf) in _BLOCK_NAMES:
        block, leaf = modules.pop(), (block, leaf)
    else:
        leaf = (leaf,)
    if block == 'linear':
        prefix = 'linear' if isinstance(model, ResNet) else 'fc' if isinstance(model, SimpleCNN2) else 'classifier'
        return f'{prefix}.{"weight" if leaf == ("kernel",) else "bias"}'
    if leaf not in _BLOCK_NAMES:
        raise UserError(
            f'{"/".join(path)}: a {type(model).__name__} with this layer was not published; '
            'import into one of convnorm, batchnorm, none'
        )
    conv, norm = _published_modules(model, modules, block)
    names = _BLOCK_NAMES[leaf].format(conv=conv, norm=norm).split()
    return next((name for name in names if name in given), names[0])


def _published_modules(model, modules, block):
    """Published names of a block's convolution (or activation) and of its normalization."""
    if isinstance(model, PlainNet):
        return _feature_names(model, block)
    prefix = ''.join(m.replace('_', '.') + '.' for m in modules)
    if block == 'shortcut':
        return f'{prefix}shortcut.0', f'{prefix}shortcut.1'
    return f'{prefix}{block}', f'{prefix}{block.replace("conv", "norm")}'


def _feature_names(model, block):
    """`features.N` of the published sequence for the block named conv{stage}_{number}."""
    # VGG puts an average pool of size one after everything.
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
    """One array in this library's layout."""
    if name.endswith('running_V') and array.ndim == 3:
        # The half spectrum does not tell an even width from an odd one: the leaf does.
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
        raise UserError(
            f'state_dict does not fit the model for pictures of {tuple(input_shape[1:])}: {"; ".join(wrong)}'
        )


def _full_spectrum(half, width):
    """[Hf, Wf//2+1, C] -> [Hf, Wf, C], by V(w) = V(-w)."""
    if half.shape[1] != width // 2 + 1:
        return half  # of another picture size: the shape check says so
    mirrored = np.roll(np.flip(half, 0), 1, 0)[:, 1 : (width + 1) // 2][:, ::-1]
    return np.concatenate([half, mirrored], axis=1)


def find_state_dict(content):
    """{name: array} in a checkpoint: under one of `_CONTAINERS`, or by itself; None if there is none."""
    if not isinstance(content, Mapping):
        return None
    nested = (find_state_dict(content.get(key)) for key in _CONTAINERS)
    arrays = {name: value for name, value in content.items() if isinstance(name, str) and _is_array(value)}
    return next(filter(None, nested), None) or arrays or None


def _is_array(value):
    """Whether a value is an array or a tensor of numbers; NumPy's scalars are not."""
    if isinstance(value, np.generic) or not hasattr(value, 'shape'):
        return False
    return not isinstance(value, np.ndarray) or value.dtype.kind in 'biufc'


def _to_numpy(value):
    # A torch tensor may need a gradient, lie on a GPU, or have a dtype that NumPy lacks.
    return value.detach().cpu().float().numpy() if hasattr(value, 'detach') else np.asarray(value)


def _unwrapped(state_dict):
    """The names without the prefixes of wrappers."""
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


def load_pth(path):
    """The state dict in a `.pth` file, as NumPy arrays: one by itself, or in a checkpoint, see `import_state_dict`.

    Nothing in the file is executed: beside tensors only plain values, NumPy's and `argparse.Namespace` are read. Other
    classes must be allowed around the call, with `torch.serialization.safe_globals([...])`.

    Raises:
      ValueError: torch is not installed, or the file cannot be read so, or holds no state dict.
    """
    try:
        import torch  # only here: nothing else needs it
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
    """Context in which torch reads what often lies next to weights and cannot do anything."""
    # Before torch 2.6 a name of NumPy 1, which moved since, cannot be allowed.
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
    # Not those that the user has allowed: they would be forgotten at the end of the context.
    allowed = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([each for each in (*moved, *plain, *classes) if each not in allowed])


def _why_refused(torch, path, error):
    """Why `torch.load` does not read a file, in one sentence without colours."""
    said = ' '.join(re.sub(r'\x1b\[[0-9;]*m', '', str(error)).split())
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch before 2.6, or a file in its format of before 1.6
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
