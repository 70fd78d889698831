"""Exports a trained net: StableHLO programs for several platforms and the weights, in one file.

The file holds the trained weights once, and programs that take them as arguments. Weights that were constants of the
programs would be stored once for each program, and would make the programs slow to read and to compile. A separate
program folds the ConvNorm layers when the file is loaded. The folded values depend on the platform, and on a CPU they
are many times larger than the weights (ResNet-18 on 32x32 images: 0.72 GB, where the file has 49 MB).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import export
from jax.typing import DTypeLike

from convnorm_jax.data.augment import normalize
from convnorm_jax.errors import UserError
from convnorm_jax.exported.container import write_container
from convnorm_jax.exported.serialization import check_installed, serialize
from convnorm_jax.files import check_place
from convnorm_jax.layers.folding import COLLECTION, fold_for_inference, is_foldable, without_originals
from convnorm_jax.layers.method import LEAST_BATCH
from convnorm_jax.mesh import fetch
from convnorm_jax.steps.gan import make_sampler
from convnorm_jax.version import __version__

PLATFORMS = ('cpu', 'cuda', 'tpu')
_KNOWN = (*PLATFORMS, 'rocm')


def save_exported(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: DTypeLike = 'float32',
    platforms: str | Sequence[str] = PLATFORMS,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes a net as a file that `load_exported` runs on any of `platforms`, without the code of the net.

    The program takes a batch of images, of any batch size, and returns the output of the net at inference. ConvNorm
    layers are folded, see `fold_for_inference`, so the file is for images of one size. A net without ConvNorm is
    exported as it is. Derivatives are not exported. `load_exported` has an example.

    Args:
      path: of the file; its folder must exist.
      model: a Linen module that takes images and `train`, as the nets of `convnorm_jax.models`.
      variables: of the trained net.
      image_shape: of an image, [H, W, C], or with as many axes as the net takes.
      mean, std: for each channel, of pixels in [0, 1]. With these the program takes such pixels and normalizes them, as
        `steps.classify.make_logits_fn` does for evaluation. With None it takes what the net takes.
      dtype: of the images.
      platforms: one or more of 'cpu', 'cuda', 'rocm' and 'tpu'.
      config: nested dicts to keep with the net, such as the config of a run.

    Raises:
      ValueError: an argument of another kind; a net that cannot take such images; flatbuffers is not installed.
    """
    shape = _image_shape(image_shape)
    if (mean is None) != (std is None):
        raise UserError(f'mean={mean}, std={std}: give both, or neither for images that are normalized already')
    name = _dtype(dtype)
    if mean is not None and std is not None:
        normalize(jnp.zeros((1, *shape), name), mean, std)  # raises for a mean or std that does not fit

    def run(variables, images):
        images = images if mean is None or std is None else normalize(images, mean, std)
        return model.apply(variables, images, train=False)

    inputs = [{'name': 'images', 'shape': shape, 'dtype': name}]
    _save(path, model, variables, run, inputs, kind='classifier', output='logits', platforms=platforms, config=config)


def save_exported_generator(
    path: str | os.PathLike[str],
    generator: nn.Module,
    variables: Mapping[str, Any],
    latent: int,
    *,
    num_classes: int = 0,
    platforms: str | Sequence[str] = PLATFORMS,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes the generator of a GAN as a file that `load_exported` runs.

    The program takes latents, float32 [B, latent], drawn from a standard normal distribution, and with classes also
    labels, int32 [B]. It returns images, float32 in [0, 1].

    Args:
      path, platforms, config: see `save_exported`.
      generator: a Linen module called as those of `convnorm_jax.models.gan`.
      variables: of the trained generator.
      latent: length of a latent.
      num_classes: number of classes of a conditional generator; 0 for a generator without labels.

    Raises:
      ValueError: see `save_exported`.
    """
    for name, value, least in (('latent', latent, 1), ('num_classes', num_classes, 0)):
        if not isinstance(value, int) or value < least:
            raise UserError(f'{name}={value!r}: expected an int of at least {least}')
    sample = make_sampler(generator)
    inputs = [{'name': 'z', 'shape': [latent], 'dtype': 'float32'}]
    if num_classes:
        inputs.append({'name': 'labels', 'shape': [], 'dtype': 'int32'})
    run = lambda variables, z, labels=None: sample(variables, z, labels)
    _save(
        path, generator, variables, run, inputs, kind='generator', output='images', platforms=platforms, config=config
    )


def _save(path, model, variables, run, inputs, *, kind, output, platforms, config):
    """Exports `run(variables, *inputs)`, with the ConvNorms of `model` folded."""
    check_installed()
    check_place(path, 'path')
    platforms = check_platforms(platforms)
    variables = {name: tree for name, tree in variables.items() if name != COLLECTION}
    named, structure = jax.tree_util.tree_flatten_with_path(fetch(variables))
    weights = [np.asarray(jnp.asarray(leaf)) for _, leaf in named]
    abstract = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in weights])
    # Folded for large batches.
    batch = [jax.ShapeDtypeStruct((LEAST_BATCH, *about['shape']), about['dtype']) for about in inputs]
    folded = is_foldable(model, abstract, *batch)
    groups = _groups(model, abstract, batch, platforms) if folded else [(platforms, abstract)]
    blocks = {_name(place): array for (place, _), array in zip(named, weights)}
    symbolic = _symbolic(inputs)
    for number, (group, prepared) in enumerate(groups):
        if folded:
            fold = lambda variables, platform=group[0]: jax.tree.leaves(_fold(model, variables, batch, platform))
            blocks[f'folding {number}'] = _program(_on_leaves(fold, structure), group, jax.tree.leaves(abstract))
        leaves, prepared_structure = jax.tree.flatten(prepared)
        blocks[f'program {number}'] = _program(_on_leaves(run, prepared_structure), group, leaves, *symbolic)
    found = jax.eval_shape(run, abstract, *batch)
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise UserError(f'{type(model).__name__} returns a {type(found).__name__}, expected one array')
    header = {
        'kind': kind,
        'versions': {'convnorm_jax': __version__, 'jax': jax.__version__},
        'inputs': inputs,
        'outputs': [{'name': output, 'shape': found.shape[1:], 'dtype': found.dtype.name}],
        'platforms': platforms,
        'programs': [group for group, _ in groups],
        'folded': folded,
        'parameters': sum(np.size(leaf) for leaf in jax.tree.leaves(variables.get('params', {}))),
        'config': config,
    }
    write_container(path, header, blocks)


def _groups(model, variables, inputs, platforms):
    """Returns groups of platforms with the same structure of folded values, each with that structure."""
    shapes, groups = {}, []
    for platform in platforms:
        kind = platform == 'cpu'  # see `folding.choose_folded_method`
        if kind not in shapes:
            shapes[kind] = jax.eval_shape(lambda v, platform=platform: _fold(model, v, inputs, platform), variables)
        prepared = shapes[kind]
        same = [group for group, other in groups if other == prepared]
        if same:
            same[0].append(platform)
        else:
            groups.append(([platform], prepared))
    return groups


def _fold(model, variables, inputs, platform):
    return without_originals(fold_for_inference(model, variables, *inputs, platform=platform))


def _on_leaves(function, structure):
    """Returns the function with a list of leaves in place of its variables, so that a file need not store nesting."""
    return lambda leaves, *inputs: function(jax.tree.unflatten(structure, leaves), *inputs)


def _program(function, platforms, *arguments):
    return serialize(export.export(jax.jit(function), platforms=platforms)(*arguments))


def _symbolic(inputs):
    """Returns the inputs with one symbolic batch dimension for all of them."""
    scope = export.SymbolicScope()
    shape = lambda about: export.symbolic_shape(', '.join(['batch', *map(str, about['shape'])]) + ',', scope=scope)
    return [jax.ShapeDtypeStruct(shape(about), about['dtype']) for about in inputs]


def _name(path):
    return 'weights/' + jax.tree_util.keystr(path, simple=True, separator='/')


def _image_shape(shape):
    shape = list(shape) if isinstance(shape, Sequence) else [shape]
    if len(shape) < 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in shape):
        raise UserError(f'image_shape={shape}: expected positive ints [H, W, C], without the batch')
    return [int(n) for n in shape]


def _dtype(dtype):
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f'dtype={dtype.name}: expected that of floats, for pixels are in [0, 1]')
    if dtype.itemsize == 8 and not jax.config.jax_enable_x64:
        raise UserError(f"dtype={dtype.name}: call jax.config.update('jax_enable_x64', True) first")
    return dtype.name


def check_platforms(platforms: str | Sequence[str], argument: str = 'platforms') -> list[str]:
    """Returns the platforms as a list.

    Args:
      platforms: a name, or a sequence of names.
      argument: what an error message calls them.

    Raises:
      ValueError: no platform, an unknown one, or one given twice.
    """
    platforms = [platforms] if isinstance(platforms, str) else list(platforms)
    unknown = [name for name in platforms if name not in _KNOWN]
    if unknown or not platforms or len(set(platforms)) < len(platforms):
        raise UserError(f'{argument}={",".join(map(str, platforms))}: expected some of {", ".join(_KNOWN)}, each once')
    return platforms
