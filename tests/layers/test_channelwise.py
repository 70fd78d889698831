"""layers/channelwise.py against SciPy and XLA's own depthwise convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from convnorm_jax.layers.channelwise import channelwise_convolution

pytestmark = pytest.mark.usefixtures('quick_compilation')


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (5, 5), (2, 2), (1, 3), (4, 1)])
def test_channelwise_convolution(kernel_size):
    x, kernel = random(19, 2, 6, 5, 3), random(20, *kernel_size, 3)
    out = channelwise_convolution(jnp.asarray(x), jnp.asarray(kernel))
    (kh, kw), expected = kernel_size, np.empty(x.shape)
    padded = np.pad(x.astype(np.float64), ((0, 0), ((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2), (0, 0)))
    for b in range(2):
        for c in range(3):
            expected[b, :, :, c] = scipy.signal.correlate2d(padded[b, :, :, c], kernel[:, :, c], mode='valid')
    # Sums of at most 25 float32 products of order one.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_channelwise_convolution_in_bfloat16():
    x, kernel = jnp.asarray(random(21, 2, 8, 8, 4), jnp.bfloat16), jnp.asarray(random(22, 3, 3, 4), jnp.bfloat16)
    out = channelwise_convolution(x, kernel)
    exact = np.asarray(channelwise_convolution(x.astype(jnp.float32), kernel.astype(jnp.float32)))
    assert out.dtype == jnp.bfloat16
    # Nine products and their partial sums, each rounded by at most 2^-9: 2 % of the largest is safe.
    assert np.abs(np.asarray(out, np.float32) - exact).max() < 0.02 * np.abs(exact).max()


def lax_channelwise(x, kernel):
    """XLA's own depthwise convolution, which JAX differentiates."""
    pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:2]]
    dims = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), pads, dimension_numbers=dims, feature_group_count=x.shape[-1]
    )


@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (2, 4), (5, 2)], ids=str)
def test_gradients_of_the_channelwise_convolution(kernel_size):
    x, kernel = jnp.asarray(random(25, 2, 6, 5, 3)), jnp.asarray(random(26, *kernel_size, 3))

    def first(convolution):
        return jax.jit(jax.grad(lambda x, kernel: (convolution(x, kernel) ** 3).sum(), (0, 1)))

    def second(convolution):
        def penalty(x, kernel):
            by_x, by_kernel = first(convolution)(x, kernel)
            return (by_x**2).sum() + (by_kernel**2).sum()

        return jax.jit(jax.grad(penalty, (0, 1)))

    for order in (first, second):
        expected = order(lax_channelwise)(x, kernel)
        found = order(channelwise_convolution)(x, kernel)
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_channelwise_convolution_under_vmap():
    x, kernel = jnp.asarray(random(27, 4, 2, 6, 5, 3)), jnp.asarray(random(28, 3, 3, 3))
    grad = jax.grad(lambda x, kernel: (channelwise_convolution(x, kernel) ** 2).sum(), (0, 1))
    for i, parts in enumerate(zip(*jax.vmap(grad, (0, None))(x, kernel))):
        for a, b in zip(parts, grad(x[i], kernel)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
