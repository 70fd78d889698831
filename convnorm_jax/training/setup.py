"""From a config to a run, ready to start: a classifier's or a GAN's."""

from convnorm_jax.training import classification, generation


def build(config, devices=None):
    """The `Experiment` of a checked config: a `Classification`, or a `Generation`.

    Raises:
      ValueError: data that is not there, or numbers that do not fit it.
    """
    kind = generation if config.train.algorithm == 'gan' else classification
    return kind.build(config, devices)
