"""From a config to a run that is ready to start: a classifier's or a GAN's."""

from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from convnorm_jax.training import classification, generation
from convnorm_jax.training.experiment import Experiment


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """The `Experiment` of a checked config: a `Classification`, or a `Generation`.

    Args:
      config: checked.
      devices: to train on; None for all.

    Raises:
      UserError: the data is not there, or numbers do not fit it.
    """
    kind = generation if config.train.algorithm == 'gan' else classification
    return kind.build(config, devices)
