"""Parts of the suite by themselves; tests/cli/test_robustness.py runs all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.evaluation import suite
from convnorm_jax.evaluation.classifier import Evaluator
from convnorm_jax.evaluation.operators import layer_operators
from convnorm_jax.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_simba_keeps_to_its_budget(tmp_path, monkeypatch):
    """The budget is no multiple of a program's queries; a net that nothing fools takes all of it, and no more."""
    monkeypatch.setattr(suite, '_SIMBA_CHUNK', 3)
    queries = 7
    images = np.random.default_rng(0).integers(50, 200, (3, 8, 8, 1), np.uint8)
    never = lambda variables, x: jnp.stack([x.mean((1, 2, 3)) + 9, 0 * x.mean((1, 2, 3))], -1)
    evaluator = Evaluator(never, mesh_lib.create_mesh(jax.devices()[:1]), 4)
    subject = suite.Subject(evaluator, {}, images, np.zeros(3, int), 0, str(tmp_path), lambda line: None)
    found = suite.run_simba(subject, examples=3, queries=queries, step_size=0.2)
    for basis in ('pixel', 'dct'):
        assert found[basis]['queries'] == [queries] * 3 and not any(found[basis]['success'])


def test_operators_are_those_of_the_net(tmp_path):
    """Of a net without normalization: norms as `layer_operators` measures them, and a secant that they allow."""
    model = create_model('simple_cnn', num_classes=3, layer='none', width=4, depth=(1,))
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    evaluator = Evaluator(model.apply, mesh_lib.create_mesh(jax.devices()[:1]), 4)
    subject = suite.Subject(evaluator, variables, images, np.zeros(5, int), 0, str(tmp_path), lambda line: None)
    found = suite.run_operators(subject, model)
    convolution, head = layer_operators(model, variables, (8, 8, 1))
    assert [layer['name'] for layer in found['layers']] == [convolution.name]
    assert found['largest_conv_norm'] == pytest.approx(convolution.conv_norm, rel=1e-3)
    spectrum = convolution.conv_circular
    assert found['median_condition'] == pytest.approx(spectrum.max() / spectrum.min(), rel=1e-4)
    assert found['product_bound'] == pytest.approx(convolution.layer_norm * head.layer_norm, rel=1e-3)
    # What a gradient at one of the images proves, and no more than the product of the norms.
    jacobian = jax.jacobian(lambda x: model.apply(variables, x[None])[0])(jnp.asarray(images[0] / 255, jnp.float32))
    least = np.linalg.norm(np.asarray(jacobian).reshape(3, -1), 2)
    assert 0.7 * least < found['lipschitz_lower_bound'] <= found['product_bound'] * (1 + 1e-4)
    assert suite.run_operators(subject, None) == found  # kept in the folder
