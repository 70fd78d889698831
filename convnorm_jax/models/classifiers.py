"""Makes a classifier from the name of a net and the name or constructor of its layers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from convnorm_jax.errors import UserError
from convnorm_jax.layers.activations import make_activation
from convnorm_jax.layers.factory import LAYERS, make_layer
from convnorm_jax.models import mobilenet, sequence
from convnorm_jax.models.plain import PlainNet, SimpleCNN2
from convnorm_jax.models.resnet import STEMS, BasicBlock, BottleneckBlock, ResNet
from convnorm_jax.models.sizes import is_whole_number, plain_options, whole_number

_RESNETS: dict[str, tuple[Any, tuple[int, ...]]] = {  # (block, depth)
    'resnet18': (BasicBlock, (2, 2, 2, 2)),
    'resnet34': (BasicBlock, (3, 4, 6, 3)),
    'resnet50': (BottleneckBlock, (3, 4, 6, 3)),
    'resnet101': (BottleneckBlock, (3, 4, 23, 3)),
    'resnet152': (BottleneckBlock, (3, 8, 36, 3)),
}
_PLAIN: dict[str, tuple[tuple[int, ...], int, tuple[int, ...]]] = {
    # (width of each stage over that of the first, first width, depth)
    'vgg11': ((1, 2, 4, 8, 8), 64, (1, 1, 2, 2, 2)),
    'vgg13': ((1, 2, 4, 8, 8), 64, (2, 2, 2, 2, 2)),
    'vgg16': ((1, 2, 4, 8, 8), 64, (2, 2, 3, 3, 3)),
    'vgg19': ((1, 2, 4, 8, 8), 64, (2, 2, 4, 4, 4)),
    'simple_cnn': ((1, 2, 4), 8, (2, 2, 2)),
}
_CHAINS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {  # (net, depth)
    'mobilenet': (mobilenet.MobileNet, mobilenet.DEPTH),
    'sequence_cnn': (sequence.SequenceCNN, sequence.DEPTH),
}
MODELS = (*_RESNETS, *_PLAIN, 'simple_cnn2', *_CHAINS)
DTYPES = ('float32', 'bfloat16')


def create_model(
    name: str,
    *,
    num_classes: int,
    layer: str | Callable[..., nn.Module],
    width: int | None = None,
    depth: Sequence[int] | np.ndarray | None = None,
    stem: Literal['cifar', 'imagenet'] | None = None,
    activation: str = 'relu',
    dtype: DTypeLike = 'float32',
    **layer_options: Any,
) -> nn.Module:
    """Returns a classifier, a Linen module.

    `model.apply(variables, images, train=False)` returns float32 logits, [B, num_classes], for normalized images,
    [B, H, W, C]. In training, `train=True` updates the collection `batch_stats`.

    Args:
      name: one of `MODELS`.
      num_classes: number of logits.
      layer: one of `layers.LAYERS`, or a constructor as `layers.make_layer` returns.
      width: channels of the first stage, or of the stem of a MobileNet; later stages keep their ratio to it. None takes
        the published width.
      depth: for each stage the number of blocks (ResNet), of convolutions (VGG, SimpleCNN, SequenceCNN) or of pairs of
        convolutions (MobileNet). A shorter tuple leaves the last stages out. None takes the published depth.
      stem: first layer of a ResNet, 'cifar' or 'imagenet'; None takes 'cifar'.
      activation: 'relu' or 'shifted_relu'.
      dtype: of the computation, 'float32' or 'bfloat16'. Parameters and statistics are float32.
      **layer_options: of the layers, see `layers.factory.LAYER_OPTIONS`.

    Raises:
      ValueError: an unknown name or option; a width or depth that the net cannot have.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from convnorm_jax.models import create_model
      >>> model = create_model('simple_cnn', num_classes=10, layer='convnorm')
      >>> images = jnp.ones((8, 32, 32, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> model.apply(variables, images, train=False).shape
      (8, 10)
    """
    if name not in MODELS:
        raise UserError(f'model.name={name!r}: expected one of {MODELS}')
    num_classes = whole_number('num_classes', num_classes, 2)
    width = whole_number('model.width', width, 1, 'the published width')
    given_depth = _checked_depth(name, depth)
    if stem is not None and (stem not in STEMS or name not in _RESNETS):
        raise UserError(f'model.stem={stem!r} with model.name={name!r}: a ResNet takes one of {STEMS}, other nets None')
    dtype = _dtype(dtype)
    if not isinstance(layer, str) and (not callable(layer) or layer_options):
        raise UserError(
            f'layer={layer!r} with options {sorted(layer_options)}: expected one of {LAYERS}, '
            'or a constructor without options'
        )
    common: dict[str, Any] = dict(
        num_classes=num_classes,
        activation=make_activation(activation),
        dtype=dtype,
        layer=make_layer(layer, dtype=dtype, **plain_options(layer_options)) if isinstance(layer, str) else layer,
    )
    if name in _RESNETS:
        block, published = _RESNETS[name]
        return ResNet(block=block, depth=given_depth or published, width=width or 64, stem=stem or 'cifar', **common)
    if name in _CHAINS:
        net, published = _CHAINS[name]
        return net(depth=given_depth or published, **({'width': width} if width else {}), **common)
    if name == 'simple_cnn2':
        return SimpleCNN2(widths=tuple((width or 6) * w // 6 for w in (6, 16, 20, 32)), **common)
    ratios, first, published = _PLAIN[name]
    widths = tuple((width or first) * r for r in ratios)
    return PlainNet(widths=widths, depth=given_depth or published, family=name.rstrip('0123456789'), **common)


def _dtype(dtype):
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise UserError(f'model.dtype={name!r}: expected one of {DTYPES}')
    return jnp.dtype(name)


def _checked_depth(name, depth):
    """Returns a depth as a tuple of int; None stays None."""
    if depth is None:
        return None
    stages = 0 if name == 'simple_cnn2' else len((_RESNETS | _PLAIN | _CHAINS)[name][-1])
    if not stages:
        raise UserError(f'model.depth={depth!r}: {name} has one depth only; leave it None')
    given = tuple(depth) if isinstance(depth, (tuple, list, np.ndarray)) else ()
    if not 1 <= len(given) <= stages or not all(is_whole_number(number) and number >= 1 for number in given):
        raise UserError(f'model.depth={depth!r}: expected 1 to {stages} whole numbers of 1 or more for {name}')
    return tuple(map(int, given))
