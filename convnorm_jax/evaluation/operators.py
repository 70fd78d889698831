"""What each layer of a trained net does to lengths: operator norms and singular values, measured.

A layer at evaluation is affine, x -> A x + b: its statistics are fixed. A is taken from the module
itself, A x = f(x) - f(0), with its padding and stride, at the picture size it sees, and its norm
by power iteration. Two stages are measured:

- the convolution with its effective kernel: what spectral norm, ONI, OWN and weight norm make of
  it, and ConvNorm's normalized convolution (the kernel with its preconditioner, arXiv 2103.00673,
  section 3.2);
- the whole layer: the convolution with the BatchNorm behind it, or ConvNorm with its channel-wise
  convolution and BatchNorm. GroupNorm and SwitchNorm divide by the statistics of each picture, so
  that the whole is not linear: only the convolution is measured.

Beside them the exact singular values of the stride-1 circular operators of both stages on the grid
of the full convolution (Sedghi, Gupta, Long 2019, arXiv 1805.10408). A zero-padded, strided
convolution is a part of the circular one (some of its rows and columns), so that the largest
circular value of the convolution is at least its norm.

All this is measured, not certified: power iteration comes from below, in float32.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from convnorm_jax.errors import UserError
from convnorm_jax.evaluation.layers import effective_kernel, find_sites, inner_variables, norm_scale, normalized_scale
from convnorm_jax.evaluation.spectral import singular_values
from convnorm_jax.layers.convnorm import ConvNorm
from convnorm_jax.models.mobilenet import MobileNet
from convnorm_jax.models.plain import PlainNet, SimpleCNN2
from convnorm_jax.models.resnet import ResNet
from convnorm_jax.models.sequence import SequenceCNN

_CHAINS = (PlainNet, SimpleCNN2)
_POOLED_CHAINS = (MobileNet, SequenceCNN)

VECTORS = 4  # of a power iteration
MOST_ITERATIONS = 300


@dataclasses.dataclass(frozen=True)
class LayerOperator:
    """What a layer does to lengths, see the head of this file.

    Attributes:
      name: path of its module, joined by '/'.
      kind: class of its convolution: 'ConvNorm', 'Conv', 'SpectralNormConv' ..., or 'Dense'.
      conv_norm: operator norm of the convolution with its effective kernel.
      layer_norm: operator norm of the whole layer, or None if it is not linear.
      conv_circular: float [Hf*Wf*min(cin, cout)], descending: the exact singular values of the circular
        stride-1 convolution with the effective kernel. Of a Dense layer, those of its matrix.
      layer_circular: the same of the whole layer (ConvNorm's channel-wise convolution behind a stride s
        stands in front of it, with its taps s apart), or None if it is not linear.
      strides: (sh, sw), or (s,) of a 1-D layer.
      picture, output: shapes of what it is given and gives, (H, W, C), (W, C) of a 1-D layer, or (C,) of a Dense
        layer.
    """

    name: str
    kind: str
    conv_norm: float
    layer_norm: float | None
    conv_circular: np.ndarray
    layer_circular: np.ndarray | None
    strides: tuple[int, ...]
    picture: tuple
    output: tuple


def layer_operators(model, variables, input_shape, *, tolerance=1e-3, seed=0):
    """Measures every `ConvNorm`, `ConvThenNorm` (1x1 shortcuts too) and `flax.linen.Dense` of a net.

    Args:
      model: a Linen classifier; variables: its variables; input_shape: [H, W, C].
      tolerance, seed: see `operator_norm`.

    Returns:
      List of `LayerOperator`, in order of call.

    Raises:
      ValueError: a layer whose kernel or statistics are not finite.
    """
    settings = {'tolerance': tolerance, 'seed': seed}
    return [_measure(site, variables, settings) for site in find_sites(model, variables, input_shape)]


def _measure(site, variables, settings):
    inside = inner_variables(variables, site.path)
    conv_circular, layer_circular = _circular_values(site, variables)
    conv_norm = operator_norm(*_convolution(site, inside), site.picture, **settings)
    layer_norm = conv_norm
    if not site.linear:
        layer_norm = layer_circular = None
    elif site.batch_norm is not None or isinstance(site.module, ConvNorm):
        layer_norm = operator_norm(_whole(site), inside, site.picture, **settings)
    return LayerOperator(
        name=site.name,
        kind=type(site.parts.get('conv', site.module)).__name__,
        conv_norm=conv_norm,
        layer_norm=layer_norm,
        conv_circular=conv_circular,
        layer_circular=layer_circular,
        strides=site.strides,
        picture=site.picture,
        output=site.output,
    )


def _convolution(site, inside):
    """(module, its variables) of the convolution alone, in float32."""
    if isinstance(site.module, ConvNorm):
        return site.module.clone(use_affine=False, use_batch_norm=False, dtype=jnp.float32), inside
    if 'conv' in site.parts:
        return site.parts['conv'].clone(dtype=jnp.float32), inner_variables(inside, ('conv',))
    return site.module.clone(dtype=jnp.float32), inside


def _whole(site):
    """The whole layer as a module, in float32."""
    if isinstance(site.module, ConvNorm):
        return site.module.clone(dtype=jnp.float32)
    return site.module.clone(dtype=jnp.float32, norm=functools.partial(site.module.norm, dtype=jnp.float32))


# --- operator norm ---------------------------------------------------------------------------


def operator_norm(module, variables, shape, *, tolerance=1e-3, seed=0):
    """Largest singular value of the linear part of an affine module, x -> f(x) - f(0), from below.

    Block power iteration with the last step in its subspace (LOBPCG, Knyazev 2001), which needs
    far fewer iterations than plain power iteration where many singular values are near the largest,
    as in a convolution. It ends when |A^T A v - s^2 v| <= tolerance * s^2, or after
    `MOST_ITERATIONS`. One program a module, A^T A on a few vectors; reverse mode only.

    Args:
      module: a Linen module of one argument, float32 [B, *shape], that treats the examples of a batch
        alike and apart; variables: its variables.
      shape: of an example.
      tolerance: bound of the relative residual.
      seed: of the first vectors.

    Returns:
      float. NaN if the module's output is not finite.
    """
    size, random = math.prod(shape), np.random.default_rng(seed)

    def gram(vectors):  # float64 [size, k], k of at most 2 VECTORS: batches of one size, one program
        batch = np.zeros((2 * VECTORS, size), np.float32)
        batch[: vectors.shape[1]] = vectors.T
        pulled = _gram(module, variables, batch.reshape(-1, *shape))
        return np.asarray(pulled, np.float64).reshape(-1, size)[: vectors.shape[1]].T

    return _largest(gram, size, tolerance, random)


def _largest(gram, size, tolerance, random):
    """Square root of the largest eigenvalue of `gram`, a positive symmetric map of float64 [size, k]."""
    block = np.linalg.qr(random.normal(size=(size, VECTORS)))[0]
    pulled, step = gram(block), np.zeros((size, 0))
    for _ in range(MOST_ITERATIONS):
        if not np.isfinite(pulled).all():
            return math.nan  # the factorizations below would fail
        square = block[:, 0] @ pulled[:, 0]
        if np.linalg.norm(pulled[:, 0] - square * block[:, 0]) <= tolerance * square:
            break
        new = np.linalg.qr(np.concatenate([block, pulled, step], 1))[0][:, block.shape[1] :]
        basis, pulled = np.concatenate([block, new], 1), np.concatenate([pulled, gram(new)], 1)
        _, mixes = np.linalg.eigh(basis.T @ pulled)
        mixes = mixes[:, : -block.shape[1] - 1 : -1]
        step = new @ mixes[block.shape[1] :]
        block, pulled = basis @ mixes, pulled @ mixes
    return math.sqrt(max(square, 0.0))


@functools.partial(jax.jit, static_argnums=0)
def _gram(module, variables, vectors):
    """A^T A of each of the vectors, float32 [k, *shape]."""
    # Entries of about 1: beside a bias, those of a vector of length 1 would lose their digits.
    size = math.sqrt(vectors[0].size)

    def linear(x):
        images = module.apply(variables, jnp.concatenate([size * x, jnp.zeros_like(x[:1])]))
        return (images[:-1] - images[-1:]) / size

    with jax.default_matmul_precision('highest'):
        images, pull_back = jax.vjp(linear, vectors)
        return pull_back(images)[0]


# --- circular operators ----------------------------------------------------------------------


def _circular_values(site, variables):
    """Exact singular values (of the convolution, of the whole layer), descending."""
    if not site.convolution:
        kernel = inner_variables(variables, site.path)['params']['kernel']
        _check_finite(site, kernel)
        values = np.linalg.svd(np.asarray(kernel, np.float32), compute_uv=False)
        return values, values
    kernel, scale = effective_kernel(site, variables), normalized_scale(site, variables)
    whole = scale * norm_scale(site, variables) * _channelwise_gain(site, variables)
    _check_finite(site, kernel, whole)
    return tuple(singular_values(kernel, site.grid, factor, site.groups) for factor in (scale, whole))


def _check_finite(site, *arrays):
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f'{site.name}: its kernel or statistics are not finite; expected a net that did not diverge')


def _channelwise_gain(site, variables):
    """|frequency response| of ConvNorm's channel-wise convolution, [Hf, Wf//2+1, cout]; 1 without one.

    Behind a stride s it is the same as one with taps s apart in front of the stride.
    """
    if not getattr(site.module, 'use_affine', False):
        return np.float32(1)
    taps = np.asarray(inner_variables(variables, site.path)['params']['affine_kernel'], np.float32)[..., 0, :]
    padded = np.zeros((*site.grid, taps.shape[-1]), np.float32)
    for tap in itertools.product(*map(range, taps.shape[:-1])):
        padded[tuple(s * i % n for s, i, n in zip(site.strides, tap, site.grid))] += taps[tap]
    return np.abs(np.fft.rfftn(padded, axes=range(len(site.grid)))).astype(np.float32)


# --- the net ---------------------------------------------------------------------------------


def product_bound(model, operators):
    """Product of the measured norms: how far apart two normalized pictures' logits can be, over their distance.

    In l2, of the net at evaluation. If every norm were exact it would bound the Lipschitz constant
    from above, usually far from tight. A chain counts the norms of its layers; a residual block
    |branch| * ... + |shortcut| (1 for the identity). ReLU, shifted ReLU and max pools whose windows
    are disjoint count 1; a global average pool over n pixels 1/sqrt(n); the 3x3 max pool of stride 2
    of the ImageNet stem 2, as up to four windows share a pixel. Divide by the smallest standard
    deviation of the data's normalization for pixels in [0, 1].

    Args:
      model: the net; operators: its `layer_operators`.

    Returns:
      float; None for a net other than those of `convnorm_jax.models`, or with a layer that is not linear.
    """
    known = isinstance(model, (*_CHAINS, *_POOLED_CHAINS, ResNet))
    if not known or any(o.layer_norm is None for o in operators):
        return None
    if isinstance(model, _CHAINS):
        return math.prod(o.layer_norm for o in operators)
    *layers, head = operators
    bound = head.layer_norm / math.sqrt(math.prod(layers[-1].output[:-1]))
    if isinstance(model, _POOLED_CHAINS):
        return bound * math.prod(o.layer_norm for o in layers)
    bound *= 2 if model.stem == 'imagenet' else 1
    for block, members in itertools.groupby(layers, lambda o: o.name.rpartition('/')[0]):
        norms = {o.name.rpartition('/')[2]: o.layer_norm for o in members}
        shortcut = norms.pop('shortcut', 1.0) if block else 0.0
        bound *= math.prod(norms.values()) + shortcut
    return bound
