"""What `result.json` says of every run next to its figures."""

from typing import Any

import jax
import numpy as np

from convnorm_jax.runs.progress import Progress
from convnorm_jax.training.experiment import Experiment


def run_facts(experiment: Experiment, chosen: Progress, final: Progress) -> dict[str, Any]:
    """Flat dict of what was trained, on what, how long, and which checkpoint is evaluated.

    Args:
      experiment: the run.
      chosen: progress at the evaluated checkpoint; final: at the end. See `training.loop.restore_state`.
    """
    config = experiment.config
    return {
        'model': config.model.name,
        'layer': config.model.layer,
        'data': experiment.source.description,
        'train_examples': len(experiment.prepared.train.labels),
        'test_examples': len(experiment.prepared.test.labels),
        'algorithm': config.train.algorithm,
        'seed': config.seed,
        # Without validation no checkpoint is the best.
        'checkpoint': config.eval.checkpoint if chosen.best_rating is not None else 'latest',
        'checkpoint_step': chosen.step,
        'total_steps': experiment.total_steps,
        'examples_per_second': final.examples_per_second,
        'training_seconds': final.seconds,
        'device': f'{experiment.mesh.size} x {jax.devices()[0].device_kind}',
        'jax': jax.__version__,
    }


def count_parameters(params: Any) -> int:
    """Number of entries of all arrays of a pytree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
