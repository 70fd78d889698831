"""What scores a generator: the features of a small classifier trained on the same data, or of Inception."""

import os
import sys
import typing
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from convnorm_jax.configs import default
from convnorm_jax.errors import UserError
from convnorm_jax.evaluation import features as features_lib
from convnorm_jax.evaluation.inception_weights import find_weights, inception_extractor
from convnorm_jax.mesh import is_leader
from convnorm_jax.runs.workdir import check_workdir, has_checkpoints
from convnorm_jax.training import loop, setup
from convnorm_jax.training.build import round_up
from convnorm_jax.training.config import check_config, run_config
from convnorm_jax.training.generation import Generation

_BATCH = 256

# Epochs of the classifier that is trained where none is given: enough for features, minutes on a CPU.
_EPOCHS = {'digits': 20.0}
_OTHER_EPOCHS = 5.0


def check_scorers(config: ConfigDict) -> None:
    """Raises UserError, before a GAN is trained, if the scores at its end would lack a classifier or weights."""
    if config.gan.classifier and (config.gan.score_examples or 'classifier' in config.eval.features):
        folder = config.gan.classifier
        _given_classifier(config)
        if not has_checkpoints(folder):
            raise UserError(f'config.gan.classifier={folder}: no checkpoint there; train it first, or give another run')
    if 'inception' in config.eval.features:
        find_weights(config.eval.inception or None)


def with_scorer(experiment: Generation, workdir: str) -> Generation:
    """The experiment of a GAN, scored by a classifier during training; unchanged if it asks for no scores."""
    if not experiment.config.gan.score_examples:
        return experiment
    experiment.abstract_state()  # impossible nets are refused before a classifier is trained
    return experiment.scored(make_scorer(experiment, workdir, 'classifier'))


def make_scorer(experiment: Generation, workdir: str, features: str) -> Callable[..., dict[str, float]]:
    """A function (uint8 images, labels=None) -> {name: score}, compared with the run's training images.

    With labels, a classifier adds 'label_agreement': the share of the images that it gives the same class.

    Args:
      experiment: the run; workdir: its folder.
      features: 'classifier' or 'inception'.

    Raises:
      UserError: config.gan.classifier holds no classifier of these data; Inception's weights are neither there nor
        can they be downloaded.
    """
    if features == 'inception':
        extractor = inception_extractor(experiment.config.eval.inception or None)
    else:
        extractor = _classifier(experiment, workdir)
    source, mesh = experiment.source, experiment.mesh
    batch_size = round_up(_BATCH, mesh.size)
    reference = features_lib.reference_statistics(
        extractor,
        typing.cast(np.ndarray, experiment.prepared.train.images),  # a GAN's data are never streamed
        source.name,
        # Next to the classifier that they belong to; Inception's serve every run.
        os.path.join(workdir, 'reference') if features == 'classifier' else None,
        batch_size=batch_size,
        mesh=mesh,
    )

    def score(images, labels=None):
        found = features_lib.extract(extractor, images, batch_size, mesh)
        scores = features_lib.generative_scores(extractor, *found, reference, seed=experiment.config.seed)
        if labels is not None and features == 'classifier':
            scores['label_agreement'] = float((found[1].argmax(-1) == labels).mean())
        return scores

    return score


def classifier_config(config: ConfigDict) -> ConfigDict:
    """The config of the classifier that is trained to score the GAN of a config: SimpleCNN with BatchNorm."""
    chosen = default.get_config()
    chosen.data.update(name=config.data.name, data_dir=config.data.data_dir, batch_size=64)
    chosen.data.augmentation = 'crop_flip' if config.data.name.startswith('cifar') else 'crop'
    chosen.data.crop_padding = 1 if config.data.name == 'digits' else 4
    chosen.model.update(name='simple_cnn', layer='batchnorm', width=16)
    chosen.train.epochs = _EPOCHS.get(config.data.name, _OTHER_EPOCHS)
    chosen.optimizer.learning_rate = 0.05
    chosen.schedule.kind = 'cosine'
    chosen.plots = False
    return chosen


def _given_classifier(config):
    """The config of the run in config.gan.classifier."""
    folder = config.gan.classifier
    found = run_config(folder)
    if found.train.algorithm == 'gan' or found.data.name != config.data.name:
        raise UserError(f'config.gan.classifier={folder}: expected a run of a classifier on {config.data.name}')
    return found


def _is_trained(experiment, folder):
    """Whether a folder holds the end of this training."""
    try:
        _, _, final = loop.restore_state(experiment, folder, 'latest')
    except UserError:  # none there, or all damaged: training reports it
        return False
    return final.step == experiment.total_steps


def _classifier(experiment, workdir):
    folder = experiment.config.gan.classifier
    if not folder:
        folder = os.path.join(workdir, 'classifier')
        config = classifier_config(experiment.config)
        check_config(config)
        trained = setup.build(config)
        check_workdir(folder, trained.config)
        if not _is_trained(trained, folder):  # a trained one is not locked: several evaluations may run at a time
            if is_leader() and not os.path.isdir(folder):
                print(f'training a classifier that scores the images, in {folder}', file=sys.stderr)
            loop.train(trained, folder)
    else:
        trained = setup.build(_given_classifier(experiment.config))
    variables, _, _ = loop.restore_variables(trained, folder, 'best')
    return features_lib.classifier_extractor(trained.model, variables, trained.source.mean, trained.source.std)
