"""Exports a trained net: StableHLO programs for several platforms and the weights, in one file.

A file holds the weights once, as they were trained, and programs that take them as arguments: as constants inside the
programs they would be there once for each program, and the programs slow to read and to compile. ConvNorm layers are
folded by a program of their own, once when the file is loaded. What they are folded into depends on the platform, and
on a CPU it is many times larger than the weights (ResNet-18 on 32x32 images: 0.72 GB, where the file has 49 MB).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

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
    path,
    model,
    variables,
    image_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype='float32',
    platforms: Sequence[str] = PLATFORMS,
    config: dict | None = None,
):
    """Writes a net as a file that `load_exported` runs, on any of `platforms`, without the net's code.

    The program takes images [B, *image_shape], for any B, and gives what the net gives for them at inference. ConvNorm
    layers are folded, see `fold_for_inference`: the file is for images of this size. A net without any is exported as
    it is. Derivatives are not exported.

    Args:
      path: of the file; its folder must exist.
      model: a Linen module that takes images and `train`, as the nets of `convnorm_jax.models`.
      variables: of the trained net.
      image_shape: [H, W, C], or as many axes as the net takes.
      mean, std: for each channel, of pixels in [0, 1]: the program then takes such pixels and normalizes them as
        `steps.classify.make_logits_fn` does for evaluation. None: it takes what the net takes.
      dtype: of the images.
      platforms: of 'cpu', 'cuda', 'rocm', 'tpu'.
      config: nested dicts to keep with the net, such as a run's config.

    Raises:
      ValueError: an argument of another kind; a net that cannot take such images; flatbuffers is missing.
    """
    shape = _image_shape(image_shape)
    if (mean is None) != (std is None):
        raise UserError(f'mean={mean}, std={std}: give both, or neither for images that are normalized already')
    name = _dtype(dtype)
    if mean is not None:
        normalize(np.zeros((1, *shape), name), mean, std)  # which says what is wrong with them

    def run(variables, images):
        images = images if mean is None else normalize(images, mean, std)
        return model.apply(variables, images, train=False)

    inputs = [{'name': 'images', 'shape': shape, 'dtype': name}]
    _save(path, model, variables, run, inputs, kind='classifier', output='logits', platforms=platforms, config=config)


def save_exported_generator(
    path,
    generator,
    variables,
    latent: int,
    *,
    num_classes: int = 0,
    platforms: Sequence[str] = PLATFORMS,
    config: dict | None = None,
):
    """Writes a GAN's generator as a file that `load_exported` runs.

    The program takes latents float32 [B, latent], drawn from a standard normal distribution, and where there are
    classes labels int32 [B]; it gives images, float32 in [0, 1].

    Args:
      path, platforms, config: see `save_exported`.
      generator: a Linen module called as those of `convnorm_jax.models.gan`.
      variables: of the trained generator.
      latent: size of the latents.
      num_classes: of a conditional generator; 0 for one without labels.

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
    # Folded as for large batches.
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
    """[(platforms that are folded into the same values, these values as shapes and dtypes), ...]."""
    shapes, groups = {}, []
    for platform in platforms:
        kind = platform == 'cpu'  # see `folding.method`
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
    """The function with a list of leaves in place of its variables: a file need not know how these are nested."""
    return lambda leaves, *inputs: function(jax.tree.unflatten(structure, leaves), *inputs)


def _program(function, platforms, *arguments):
    return serialize(export.export(jax.jit(function), platforms=platforms)(*arguments))


def _symbolic(inputs):
    """The inputs with one batch dimension for all of them."""
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
    """The platforms as a list.

    Raises:
      ValueError: one that is not known, or none, or one twice; `argument` is what the message calls them.
    """
    platforms = [platforms] if isinstance(platforms, str) else list(platforms)
    unknown = [name for name in platforms if name not in _KNOWN]
    if unknown or not platforms or len(set(platforms)) < len(platforms):
        raise UserError(f'{argument}={",".join(map(str, platforms))}: expected some of {", ".join(_KNOWN)}, each once')
    return platforms
