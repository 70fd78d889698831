"""A net of any library as the `logits_fn` of the attacks."""

import sys
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from convnorm_jax.errors import UserError

_FORMS = (
    'a function of images [B, H, W, C] in [0, 1]; (Linen module, variables); an NNX module, or its nnx.split; an '
    'Equinox module of one example [C, H, W], or (module, state)'
)


def as_logits_fn(net: Any) -> jax.tree_util.Partial:
    """Images in [0, 1], [B, H, W, C] -> logits [B, K], as a `Partial` that holds the net's arrays.

    The arrays are arguments of the programs then, not constants that are compiled in. Normalization of the pixels must
    be inside the net: where it is not, give a function that does both.

    Args:
      net: a function; a Linen module and its variables, `(module, variables)`, which is called without arguments of its
        own (the nets of `convnorm_jax.models` infer then); an NNX module, or what `nnx.split` returns; an Equinox
        module of one example [C, H, W], or `(module, state)`.

    Raises:
      UserError: something else, or an NNX or Equinox net in training mode.
    """
    if isinstance(net, jax.tree_util.Partial):
        return net
    if isinstance(net, nnx.Module):
        return _of_nnx(*nnx.split(net))
    if isinstance(net, tuple) and net and isinstance(net[0], nnx.GraphDef):
        return _of_nnx(*net)
    if isinstance(net, tuple) and len(net) == 2 and isinstance(net[0], nn.Module):
        module, variables = net
        return jax.tree_util.Partial(lambda variables, x: module.apply(variables, x), variables)
    if _is_equinox(net):
        return _of_equinox(net)
    if isinstance(net, tuple) and len(net) == 2 and _is_equinox(net[0]):
        return _of_equinox(*net)
    if isinstance(net, nn.Module):
        raise UserError(
            f'net is a {type(net).__name__}, a Linen module without its variables: give (module, variables)'
        )
    if not callable(net):
        raise UserError(f'net is a {type(net).__name__}: expected {_FORMS}')
    return jax.tree_util.Partial(net)


def _of_nnx(graph, *states):
    for path, module in nnx.iter_graph(nnx.merge(graph, *states)):
        for name, training in (('use_running_average', False), ('deterministic', False)):
            if getattr(module, name, None) is training:
                where = '.'.join(map(str, path)) or type(module).__name__
                raise UserError(f'net: {where} is in training mode ({name}=False); call net.eval() first')
    return jax.tree_util.Partial(lambda states, x: nnx.merge(graph, *states)(x), states)


def _is_equinox(net):
    equinox = sys.modules.get('equinox')  # a net of it exists only where it was imported
    return equinox is not None and isinstance(net, equinox.Module)


def _of_equinox(net, state=None):
    import equinox as eqx

    training = lambda part: getattr(part, 'inference', None) is False
    found = [part for part in jax.tree.leaves(net, is_leaf=training) if training(part)]
    if found:
        name = type(found[0]).__name__
        raise UserError(f'net: a {name} is in training mode (inference=False); give eqx.nn.inference_mode(net)')
    arrays, rest = eqx.partition((net, state), eqx.is_array)

    def logits(arrays, images):
        module, state = eqx.combine(arrays, rest)
        one = (lambda x: module(x)) if state is None else (lambda x: module(x, state)[0])
        return jax.vmap(one, axis_name='batch')(images.transpose(0, 3, 1, 2))

    return jax.tree_util.Partial(logits, arrays)
