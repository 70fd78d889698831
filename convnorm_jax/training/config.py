"""Checks of a config, before anything is read or compiled."""

from ml_collections import ConfigDict

from convnorm_jax.configs import default, keys
from convnorm_jax.data.augment import STREAMED_AUGMENTATIONS
from convnorm_jax.data.sources import NAMES, STREAMED
from convnorm_jax.errors import UserError
from convnorm_jax.models.gan import GANS
from convnorm_jax.runs.workdir import load_config
from convnorm_jax.training.evaluation_checks import check_scores, check_suite
from convnorm_jax.training.nets import build_gan, build_model


def run_config(workdir: str) -> ConfigDict:
    """The config of the run in a folder, checked; a key that is younger than the run has its default.

    Raises:
      UserError: there is no run, or its config cannot be used.
    """
    config = default.get_config()
    keys.merge(config, load_config(workdir))
    keys.check_types(config, default.get_config())
    check_config(config)
    return config


def check_config(config: ConfigDict) -> None:
    """Checks every value of a config.

    Raises:
      UserError: the first impossible value, with its name and the choices.
    """
    flat = keys.flatten(config)
    for name, key in default.KEYS.items():
        _check_value(name, flat[name], key)
    _check_attack(flat)
    if flat['train.algorithm'] == 'gan':
        check_scores(flat)
    else:
        check_suite(flat)
    _check_milestones(flat['schedule.milestones'])
    _check_net(config)
    _check_streamed(flat)
    if not (flat['train.epochs'] or flat['train.steps'] or flat['train.examples']):
        raise UserError(
            'config.train.epochs=0: expected a duration in one of train.epochs, train.steps, train.examples'
        )
    _check_microbatches(flat['train.microbatches'], flat['train.algorithm'], flat['data.batch_size'])
    if flat['data.label_noise.rate'] and flat['data.label_noise.kind'] == 'none':
        raise UserError(
            f"config.data.label_noise.rate={flat['data.label_noise.rate']} with kind='none': "
            "set config.data.label_noise.kind to 'symmetric' or 'asymmetric'"
        )
    if flat['train.early_stopping_epochs'] and not flat['data.validation_fraction']:
        raise UserError(
            'config.train.early_stopping_epochs needs validation examples: set config.data.validation_fraction above 0'
        )


def _check_value(name, value, key):
    allowed, bounds = key.allowed(), key.bounds()
    if key.choices and value not in allowed:
        raise UserError(f'config.{name}={value!r}: expected one of {", ".join(map(repr, allowed))}')
    if key.names and not set(value) <= set(allowed):
        raise UserError(f'config.{name}={tuple(value)}: expected some of {allowed}')
    if bounds:
        _check_range(name, value, *bounds)


def _check_microbatches(number, algorithm, batch_size):
    if batch_size % number or (number > 1 and algorithm != 'clean'):
        raise UserError(
            f'config.train.microbatches={number}: expected a divisor of config.data.batch_size={batch_size}, and '
            f"config.train.algorithm='clean' (now {algorithm!r})"
        )


def _check_net(config):
    """Raises UserError for a net that cannot be built, or that the algorithm does not train."""
    name, algorithm = config.model.name, config.train.algorithm
    if (algorithm == 'gan') != (name in GANS):
        raise UserError(
            f'config.model.name={name!r} with config.train.algorithm={algorithm!r}: '
            f'gan trains {", ".join(map(repr, GANS))}, the others a classifier'
        )
    if algorithm == 'gan':
        build_gan(config, (32, 32, 3), num_classes=10)
    else:
        build_model(config, num_classes=10)


def _check_streamed(flat):
    name, streamed = flat['data.name'], flat['data.name'] in STREAMED
    if flat['data.augmentation'] in STREAMED_AUGMENTATIONS and not streamed:
        raise UserError(
            f'config.data.augmentation={flat["data.augmentation"]!r}: expected none, crop or crop_flip with '
            f'config.data.name={name!r}; the resized ones are for {", ".join(map(repr, STREAMED))}'
        )
    if streamed and flat['train.algorithm'] == 'gan':
        raise UserError(
            f"config.data.name={name!r} with config.train.algorithm='gan': expected a data set in memory, "
            f'which the scores compare with: one of {", ".join(n for n in NAMES if n not in STREAMED)}'
        )


def _check_attack(flat):
    if flat['attack.norm'] == 'linf':
        for key in ('attack.epsilon', 'attack.step_size'):
            _check_range(key, flat[key], 0, 255, True, True)
    elif 'fgsm' in flat['attack.names']:
        raise UserError("config.attack.norm='l2': FGSM is an l-infinity attack; set config.attack.names=pgd")
    if not flat['attack.epsilon'] and flat['attack.names'] and flat['train.algorithm'] != 'gan':
        raise UserError(
            f'config.attack.epsilon={flat["attack.epsilon"]}: expected above 0 for config.attack.names='
            f"{','.join(flat['attack.names'])}; for no attack give '--config.attack.names=()'"
        )
    curve = flat['eval.curve']
    if not all(isinstance(factor, (int, float)) and factor >= 0 for factor in curve) or sorted(set(curve)) != curve:
        raise UserError(f'config.eval.curve={tuple(curve)}: expected rising factors of attack.epsilon, from 0')


def _check_range(key, value, low, high, low_allowed, high_allowed):
    if value is None:
        return
    above = value >= low if low_allowed else value > low
    below = value <= high if high_allowed else value < high
    if not above:  # NaN is neither above nor below
        raise UserError(f'config.{key}={value}: expected {"at least" if low_allowed else "above"} {low}')
    if not below:
        raise UserError(f'config.{key}={value}: expected {"at most" if high_allowed else "below"} {high}')


def _check_milestones(milestones):
    numbers = all(isinstance(m, (int, float)) and 0 < m < 1 for m in milestones)
    if not numbers or sorted(milestones) != list(milestones):
        raise UserError(
            f'config.schedule.milestones={tuple(milestones)}: expected rising shares of the run between 0 and 1'
        )
