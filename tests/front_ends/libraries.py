"""The same layer in each library, as functions of arrays."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convnorm_jax
import convnorm_jax.nnx
from convnorm_jax import functional

LAYERS = {  # (transposed, kernel size, image size, arguments)
    'plain': (False, (3, 3), (8, 8), {}),
    'strided': (False, (3, 3), (8, 7), {'strides': 2, 'padding': 1}),
    'pointwise': (False, (1, 1), (5, 5), {}),
    'sequence': (False, (3,), (9,), {'kernel_dilation': 2}),
    'volume': (False, (3, 2, 2), (4, 3, 4), {}),
    'depthwise': (False, (3, 3), (6, 6), {'feature_group_count': 4, 'momentum': 0.9}),
    'circular': (False, (3, 3), (6, 6), {'padding': 'CIRCULAR', 'spectrum': 'exact'}),
    'without': (False, (3, 3), (6, 6), {'use_affine': False, 'use_batch_norm': False}),
    'transposed': (True, (4, 4), (4, 5), {'strides': 2, 'padding': 1}),
}
LIBRARIES = ('functional', 'linen', 'nnx', 'equinox')


@dataclasses.dataclass
class FrontEnd:
    """A layer of 4 to 8 channels.

    Attributes:
      params, state: by the names of `convnorm_jax.functional`, of each library the same.
      apply: (params, state, x [B, *spatial, C], train) -> (y [B, *spatial', features], state).
    """

    params: dict
    state: dict
    apply: Callable


def build(library: str, name: str, seed: int = 0, features: int = 8, **options) -> FrontEnd:
    """`name` of `LAYERS` in a library, with the initial values of its NNX layer."""
    transposed, kernel_size, size, given = LAYERS[name]
    options = {'strides': 1, 'padding': 'SAME', **given, **options}
    kind = 'ConvNormTranspose' if transposed else 'ConvNorm'
    layer = getattr(convnorm_jax.nnx, kind)(4, features, kernel_size, image_size=size, rngs=nnx.Rngs(seed), **options)
    graph, params, state, rest = nnx.split(layer, nnx.Param, nnx.BatchStat, ...)
    params, state = ({k[-1]: v for k, v in nnx.to_flat_state(part)} for part in (params, state))
    params, state = ({k: v[...] for k, v in part.items()} for part in (params, state))
    if library == 'nnx':

        def apply(params, state, x, train):
            layer = nnx.merge(
                graph, nnx.State(_variables(nnx.Param, params)), nnx.State(_variables(nnx.BatchStat, state)), rest
            )
            y = layer(x, use_running_average=not train)
            after = nnx.split(layer, nnx.Param, nnx.BatchStat, ...)[2]
            return y, {k[-1]: v[...] for k, v in nnx.to_flat_state(after)}

        return FrontEnd(params, state, apply)
    if library == 'functional':
        apply = functional.apply
        return FrontEnd(
            params, state, lambda p, s, x, train: apply(layer.settings, p, s, x, use_running_average=not train)
        )
    if library == 'linen':
        linen = getattr(convnorm_jax, kind)(features, kernel_size, **options)

        def apply(params, state, x, train):
            inside = {'params': _linen(params, ('scale', 'bias')), 'batch_stats': _linen(state, ('mean', 'var'))}
            y = linen.apply(inside, x, use_running_average=not train, mutable=['batch_stats'] if train else [])
            changed = y[1]['batch_stats'] if train else inside['batch_stats']
            flat = {**changed.get('batch_norm', {}), **{k: v for k, v in changed.items() if k != 'batch_norm'}}
            return y[0], {name: flat[name] for name in state}

        return FrontEnd(params, state, apply)
    eqx = pytest.importorskip('equinox')
    from convnorm_jax import equinox

    names = {
        'strides': 'stride',
        'kernel_dilation': 'dilation',
        'feature_group_count': 'groups',
        'param_dtype': 'dtype',
    }
    options = {names.get(k, k): v for k, v in options.items()}
    layer, initial = eqx.nn.make_with_state(getattr(equinox, kind))(
        4, features, kernel_size, image_size=size, key=jax.random.key(0), **options
    )

    def apply(params, state, x, train):
        mine = eqx.tree_at(lambda layer: [getattr(layer, name) for name in params], layer, list(params.values()))
        given = jax.tree.unflatten(jax.tree.structure(initial), jax.tree.leaves(state))
        call = jax.vmap(
            lambda x, state: mine(x, state, inference=not train),
            axis_name='batch',
            in_axes=(0, None),
            out_axes=(0, None),
        )
        y, after = call(jnp.moveaxis(x, -1, 1), given)
        return jnp.moveaxis(y, 1, -1), after.get(layer.state_index)

    return FrontEnd(params, state, apply)


def _variables(kind, values):
    return {name: kind(value) for name, value in values.items()}


def _linen(values, inner):
    outer = {name: value for name, value in values.items() if name not in inner}
    return outer | ({'batch_norm': {k: values[k] for k in inner}} if inner[0] in values else {})


def images(name: str, seed: int, batch: int = 8, dtype=jnp.float32) -> jax.Array:
    """A batch for `LAYERS[name]`, [B, *spatial, 4]."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, *LAYERS[name][2], 4)), dtype)
