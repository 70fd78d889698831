"""Parts of the suite by themselves; tests/experiments/test_robustness.py runs all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.evaluation import suite
from convnorm_jax.evaluation.classifier import Evaluator

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
