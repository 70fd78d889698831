"""Checks of a config, before anything is read or compiled, and what may change at a resume."""

from convnorm_jax.attacks.auto_attack.members import MEMBERS
from convnorm_jax.attacks.inputs import LOSSES, NORMS
from convnorm_jax.data.augment import AUGMENTATIONS, STREAMED_AUGMENTATIONS
from convnorm_jax.data.diffaugment import POLICIES
from convnorm_jax.data.sources import NAMES, STREAMED
from convnorm_jax.data.splits import NOISE_KINDS, VALIDATION_KINDS
from convnorm_jax.errors import UserError
from convnorm_jax.evaluation.classifier import ATTACKS
from convnorm_jax.evaluation.features import SCORE_NAMES, SPLITS
from convnorm_jax.evaluation.suite import PARTS, SUITES
from convnorm_jax.layers.activations import ACTIVATIONS
from convnorm_jax.layers.core import SPECTRUM_MODES
from convnorm_jax.layers.factory import DENSE_LAYERS, LAYERS
from convnorm_jax.layers.method import METHODS
from convnorm_jax.layers.ocnn import LAGS
from convnorm_jax.layers.reparam import SPECTRAL_NORM_MODES
from convnorm_jax.models.classifiers import DTYPES, MODELS
from convnorm_jax.models.gan import GANS
from convnorm_jax.models.resnet import STEMS
from convnorm_jax.steps.adversarial import BATCH_STATISTICS
from convnorm_jax.steps.gan_losses import LOSSES as GAN_LOSSES
from convnorm_jax.steps.state import OPTIMIZERS
from convnorm_jax.training.evaluation_checks import check_scores, check_suite
from convnorm_jax.training.nets import ADAM_SETTINGS, build_gan, build_model
from convnorm_jax.training.schedule import SCHEDULES

ALGORITHMS = ('clean', 'free', 'fast', 'pgd', 'trades', 'gan')
FEATURES = tuple(SCORE_NAMES)
CHECKPOINTS = ('best', 'latest')

_CHOICES = {
    'model.name': (*MODELS, *GANS),
    'model.layer': LAYERS,
    'model.stem': ('', *STEMS),
    'model.activation': ACTIVATIONS,
    'model.dtype': DTYPES,
    'model.convnorm.spectrum': SPECTRUM_MODES,
    'model.convnorm.method': (None, *METHODS),
    'model.spectralnorm.mode': SPECTRAL_NORM_MODES,
    'data.name': NAMES,
    'data.augmentation': AUGMENTATIONS,
    'data.validation': VALIDATION_KINDS,
    'data.label_noise.kind': NOISE_KINDS,
    'train.algorithm': ALGORITHMS,
    'train.adversarial.batch_statistics': ('', *BATCH_STATISTICS),
    'gan.generator_layer': ('', *LAYERS),
    'gan.dense': DENSE_LAYERS,
    'gan.loss': GAN_LOSSES,
    'gan.setting': ('', *ADAM_SETTINGS),
    'optimizer.name': OPTIMIZERS,
    'schedule.kind': SCHEDULES,
    'train.ocnn.lags': LAGS,
    'attack.loss': LOSSES,
    'attack.norm': NORMS,
    'eval.suite': SUITES,
    'eval.checkpoint': CHECKPOINTS,
}

# Any of these, in any order.
SUBSETS = {
    'attack.names': ATTACKS,
    'eval.parts': PARTS,
    'eval.autoattack.attacks': MEMBERS,
    'gan.augmentation': POLICIES,
    'eval.features': FEATURES,
}

# key: (smallest, largest, are the bounds themselves allowed)
_RANGES = {
    'seed': (0, 2**32 - 1, True, True),
    'model.width': (1, 2**16, True, True),
    'model.convnorm.momentum': (0, 1, True, False),
    'model.groupnorm.groups': (1, 2**16, True, True),
    'model.spectralnorm.iterations': (1, 1000, True, True),
    'model.oni.iterations': (1, 1000, True, True),
    'model.oni.groups': (1, 2**16, True, True),
    'model.oni.init_scale': (0, 1e6, False, True),
    'model.own.groups': (1, 2**16, True, True),
    'model.own.init_scale': (0, 1e6, False, True),
    'data.batch_size': (1, 2**20, True, True),
    'data.crop_padding': (0, 512, True, True),
    'data.image_size': (1, 4096, True, True),
    'data.workers': (0, 256, True, True),
    'data.validation_fraction': (0, 1, True, False),
    'data.subset_fraction': (0, 1, False, True),
    'data.label_noise.rate': (0, 1, True, True),
    'train.epochs': (0, 1e6, True, True),
    'train.steps': (0, 1e12, True, True),
    'train.examples': (0, 1e15, True, True),
    'train.label_smoothing': (0, 1, True, False),
    'train.ema_decay': (0, 1, True, False),
    'train.early_stopping_epochs': (0, 1e6, True, True),
    'train.adversarial.epsilon': (0, 255, True, True),
    'train.adversarial.step_size': (0, 255, False, True),
    'train.adversarial.steps': (1, 1000, True, True),
    'train.adversarial.replays': (1, 1000, True, True),
    'train.adversarial.beta': (0, 1e6, True, True),
    'optimizer.learning_rate': (0, 1e6, False, True),
    'optimizer.momentum': (0, 1, True, False),
    'optimizer.beta2': (0, 1, True, False),
    'optimizer.weight_decay': (0, 1e6, True, True),
    'schedule.factor': (0, 1, False, True),
    'schedule.warmup_epochs': (0, 1e6, True, True),
    'train.ocnn.weight': (0, 1e6, True, True),
    'attack.epsilon': (0, 1e6, True, True),
    'attack.step_size': (0, 1e6, False, True),
    'attack.pgd_steps': (1, 1e5, True, True),
    'attack.restarts': (1, 1e4, True, True),
    'eval.batch_size': (1, 2**20, True, True),
    'eval.examples': (0, 1e12, True, True),
    'eval.autoattack.steps': (1, 1e6, True, True),
    'eval.autoattack.queries': (1, 1e7, True, True),
    'eval.autoattack.targets': (1, 1e4, True, True),
    'eval.autoattack.restarts': (1, 1e4, True, True),
    'eval.simba.examples': (1, 1e6, True, True),
    'eval.simba.queries': (1, 1e7, True, True),
    'eval.simba.step_size': (0, 1, False, True),
    'gan.generator_width': (1, 2**16, True, True),
    'gan.latent': (1, 2**16, True, True),
    'gan.n_dis': (1, 1000, True, True),
    'gan.gradient_penalty': (0, 1e6, True, True),
    'gan.passes': (1, 1e6, True, True),
    'gan.score_examples': (0, 1e7, True, True),
    'eval.samples': (SPLITS, 1e8, True, True),
    'checkpoint.every_steps': (0, 1e12, True, True),
    'checkpoint.keep': (1, 1e6, True, True),
    'log.every_steps': (1, 1e12, True, True),
    'log.profile_steps': (0, 1e4, True, True),
    'train.microbatches': (1, 2**20, True, True),
}

# What a resumed run or an evaluation may change without becoming another run.
FREE_KEYS = (
    'model.convnorm.spectrum',
    'model.convnorm.method',
    'attack.',
    'eval.',
    'log.',
    'checkpoint.',
    'plots',
    'data.data_dir',
    'data.workers',
    'train.early_stopping_epochs',
)

# The length of a run, which its other schedules follow: only a constant learning rate may be trained for longer.
DURATION_KEYS = ('train.epochs', 'train.steps', 'train.examples')


def flatten(config):
    """{'model.name': ...} of a nested config or dict."""
    flat = {}
    for key, value in config.items():
        if hasattr(value, 'items'):
            flat.update({f'{key}.{inner}': v for inner, v in flatten(value).items()})
        else:
            flat[key] = list(value) if isinstance(value, (list, tuple)) else value
    return flat


def check_config(config):
    """Checks every value of a config.

    Raises:
      ValueError: the first impossible value, with its name and the choices.
    """
    flat = flatten(config)
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f'config.{key}={flat[key]!r}: expected one of {", ".join(map(repr, choices))}')
    for key, bounds in _RANGES.items():
        _check_range(key, flat[key], *bounds)
    for key, names in SUBSETS.items():
        if not set(flat[key]) <= set(names):
            raise UserError(f'config.{key}={tuple(flat[key])}: expected some of {names}')
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


def _check_microbatches(number, algorithm, batch_size):
    if batch_size % number or (number > 1 and algorithm != 'clean'):
        raise UserError(
            f'config.train.microbatches={number}: expected a divisor of config.data.batch_size={batch_size}, and '
            f"config.train.algorithm='clean' (now {algorithm!r})"
        )


def _check_net(config):
    """Raises ValueError for a net that can not be, and for one that the algorithm does not train."""
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


def differences(saved, given):
    """Keys that make `given` another run than `saved`: {key: (saved value, given value)}.

    Keys that `saved` lacks came with a later version and are passed over.
    """
    saved, given = flatten(saved), flatten(given)
    free = FREE_KEYS + (DURATION_KEYS if saved.get('schedule.kind') == 'constant' else ())
    return {
        key: (saved.get(key), given.get(key))
        for key in sorted(saved)
        if saved.get(key) != given.get(key) and not key.startswith(free)
    }


def check_same_run(saved, given, workdir):
    """Raises ValueError, naming each difference, unless `given` continues the run in `workdir`."""
    changed = differences(saved, given)
    if changed:
        words = '; '.join(f'config.{key} was {old!r}, is now {new!r}' for key, (old, new) in changed.items())
        raise UserError(
            f'{workdir} holds a run with another config: {words}; give the old values back, or another --workdir'
        )
