"""What `result.json` says of every run beside its figures."""

import jax
import numpy as np


def run_facts(experiment, chosen, final):
    """Flat dict of what was trained, on what, how long, and which checkpoint is evaluated.

    Args:
      experiment: a `training.experiment.Experiment`.
      chosen, final: progress at the evaluated checkpoint and at the end, see `training.loop.restore_state`.
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
        # Without validation nothing is the best.
        'checkpoint': config.eval.checkpoint if chosen.best_rating is not None else 'latest',
        'checkpoint_step': chosen.step,
        'total_steps': experiment.total_steps,
        'examples_per_second': final.examples_per_second,
        'training_seconds': final.seconds,
        'device': f'{experiment.mesh.size} x {jax.devices()[0].device_kind}',
        'jax': jax.__version__,
    }


def count_parameters(params):
    """Number of entries of all arrays of a pytree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
