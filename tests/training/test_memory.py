"""Memory of a training step, as the compiler states it: what a layer keeps for its backward pass."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from convnorm_jax.layers import ConvNorm
from convnorm_jax.mesh import compiler_options

LAYERS, BATCH, SIZE, CHANNELS = 6, 16, 16, 16
ACTIVATION = 4 * BATCH * SIZE * SIZE * CHANNELS  # bytes


class Net(nn.Module):
    """Layers with a ReLU behind each."""

    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.relu(ConvNorm(CHANNELS, padding=1)(x, use_running_average=False))
        return x


def temporaries(layers, clipped):
    """Bytes of a step's temporaries; `clipped` by the norm of all gradients, so that no update can come before."""
    model = Net(layers)
    tx = optax.chain(optax.clip_by_global_norm(1) if clipped else optax.identity(), optax.sgd(0.1))
    x = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, CHANNELS), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    state = variables['params'], variables['batch_stats'], jax.eval_shape(tx.init, variables['params'])

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
    def step(state, x):
        params, statistics, opt_state = state

        def loss(params):
            y, new = model.apply({'params': params, 'batch_stats': statistics}, x, mutable=['batch_stats'])
            return jnp.square(y).mean(), new['batch_stats']

        grads, statistics = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), statistics, opt_state

    return step.lower(state, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='of XLA:CPU')
@pytest.mark.parametrize('clipped', [False, True])
def test_two_arrays_are_kept_for_a_layer(clipped):
    # Its output and what its channel-wise convolution reads: no copies, no spectra, whatever the optimizer waits for.
    few, many = (temporaries(layers, clipped) for layers in (2, 2 + LAYERS))
    assert (many - few) / LAYERS < 2.5 * ACTIVATION
