"""A net's name -> the classifier. Models are given their layers by name or constructor."""

import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.layers.activations import make_activation
from convnorm_jax.layers.factory import LAYERS, make_layer
from convnorm_jax.models import mobilenet, sequence
from convnorm_jax.models.plain import PlainNet, SimpleCNN2
from convnorm_jax.models.resnet import STEMS, BasicBlock, BottleneckBlock, ResNet
from convnorm_jax.models.sizes import is_whole_number, plain_options, whole_number

_RESNETS = {
    'resnet18': (BasicBlock, (2, 2, 2, 2)),
    'resnet34': (BasicBlock, (3, 4, 6, 3)),
    'resnet50': (BottleneckBlock, (3, 4, 6, 3)),
    'resnet101': (BottleneckBlock, (3, 4, 23, 3)),
    'resnet152': (BottleneckBlock, (3, 8, 36, 3)),
}
_PLAIN = {  # (width of each stage over that of the first, first width, depth)
    'vgg11': ((1, 2, 4, 8, 8), 64, (1, 1, 2, 2, 2)),
    'vgg13': ((1, 2, 4, 8, 8), 64, (2, 2, 2, 2, 2)),
    'vgg16': ((1, 2, 4, 8, 8), 64, (2, 2, 3, 3, 3)),
    'vgg19': ((1, 2, 4, 8, 8), 64, (2, 2, 4, 4, 4)),
    'simple_cnn': ((1, 2, 4), 8, (2, 2, 2)),
}
_CHAINS = {  # (net, depth)
    'mobilenet': (mobilenet.MobileNet, mobilenet.DEPTH),
    'sequence_cnn': (sequence.SequenceCNN, sequence.DEPTH),
}
MODELS = (*_RESNETS, *_PLAIN, 'simple_cnn2', *_CHAINS)
DTYPES = ('float32', 'bfloat16')


def create_model(
    name, *, num_classes, layer, width=None, depth=None, stem=None, activation='relu', dtype='float32', **layer_options
):
    """A classifier: `model.apply(variables, images, train=False)` gives float32 logits.

    Args:
      name: one of `MODELS`.
      num_classes: number of logits.
      layer: one of `layers.factory.LAYERS`, or a constructor as `make_layer` returns.
      width: channels of the first stage, of a MobileNet of its stem (the later ones keep their
        proportion); None is the published net's.
      depth: blocks (ResNet), convolutions (VGG, SimpleCNN, SequenceCNN) or pairs of convolutions
        (MobileNet) of each stage; a shorter tuple leaves the last stages out. None is the published net's.
      stem: ResNet's first layer, 'cifar' (None too) or 'imagenet'.
      activation: 'relu' or 'shifted_relu'.
      dtype: 'float32' or 'bfloat16', of the computation; parameters and statistics are float32.
      **layer_options: see `layers.factory.LAYER_OPTIONS`.

    Returns:
      A Linen module taking images [B, H, W, C], normalized.

    Raises:
      ValueError: an unknown name or option, or a width or depth the net can not have.
    """
    if name not in MODELS:
        raise UserError(f'model.name={name!r}: expected one of {MODELS}')
    num_classes = whole_number('num_classes', num_classes, 2)
    width = whole_number('model.width', width, 1, 'the published width')
    depth = _checked_depth(name, depth)
    if stem is not None and (stem not in STEMS or name not in _RESNETS):
        raise UserError(f'model.stem={stem!r} with model.name={name!r}: a ResNet takes one of {STEMS}, other nets None')
    dtype = _dtype(dtype)
    if not isinstance(layer, str) and (not callable(layer) or layer_options):
        raise UserError(
            f'layer={layer!r} with options {sorted(layer_options)}: expected one of {LAYERS}, '
            'or a constructor without options'
        )
    common = dict(
        num_classes=num_classes,
        activation=make_activation(activation),
        dtype=dtype,
        layer=make_layer(layer, dtype=dtype, **plain_options(layer_options)) if isinstance(layer, str) else layer,
    )
    if name in _RESNETS:
        block, stages = _RESNETS[name]
        return ResNet(block=block, depth=depth or stages, width=width or 64, stem=stem or 'cifar', **common)
    if name in _CHAINS:
        net, stages = _CHAINS[name]
        return net(depth=depth or stages, **({'width': width} if width else {}), **common)
    if name == 'simple_cnn2':
        return SimpleCNN2(widths=tuple((width or 6) * w // 6 for w in (6, 16, 20, 32)), **common)
    ratios, first, stages = _PLAIN[name]
    widths = tuple((width or first) * r for r in ratios)
    return PlainNet(widths=widths, depth=depth or stages, family=name.rstrip('0123456789'), **common)


def _dtype(dtype):
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise UserError(f'model.dtype={name!r}: expected one of {DTYPES}')
    return jnp.dtype(name)


def _checked_depth(name, depth):
    """A depth as a tuple of int; None stays None."""
    if depth is None:
        return None
    stages = 0 if name == 'simple_cnn2' else len((_RESNETS | _PLAIN | _CHAINS)[name][-1])
    if not stages:
        raise UserError(f'model.depth={depth!r}: {name} has one depth only; leave it None')
    given = tuple(depth) if isinstance(depth, (tuple, list, np.ndarray)) else ()
    if not 1 <= len(given) <= stages or not all(is_whole_number(number) and number >= 1 for number in given):
        raise UserError(f'model.depth={depth!r}: expected 1 to {stages} whole numbers of 1 or more for {name}')
    return tuple(map(int, given))
