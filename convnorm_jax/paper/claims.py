"""The claims of the paper and the studies they rest on, small for two cores and full for a GPU.

Small: SimpleCNN (three stages of 8, 16 and 32 channels) and narrow nets, some hundred steps. Full: the published nets
and lengths. Both have the same studies, arms and figures, and the same fair protocol, see `study`.
"""

from collections.abc import Callable
from typing import Any

from convnorm_jax.paper.study import RATE, Study

SCALES = ('small', 'full')

_ARMS: dict[str, dict[str, Any]] = {
    'ConvNorm': {'model.layer': 'convnorm'},
    'BatchNorm': {'model.layer': 'batchnorm'},
    'spectral norm': {'model.layer': 'spectralnorm'},
    'ONI': {'model.layer': 'oni'},
    'OWN': {'model.layer': 'own'},
    'OCNN': {'model.layer': 'batchnorm', 'train.ocnn.weight': 1e-4},
    'SwitchNorm': {'model.layer': 'switchnorm'},
}
_THREE = {name: _ARMS[name] for name in ('ConvNorm', 'BatchNorm', 'spectral norm')}
_TWO = {name: _ARMS[name] for name in ('ConvNorm', 'spectral norm')}
# Nets without shortcuts, with and without BatchNorm after the layer.
_PLAIN = {
    'ConvNorm': _ARMS['ConvNorm'],
    'BatchNorm': _ARMS['BatchNorm'],
    'spectral norm': _ARMS['spectral norm'],
    'ConvNorm alone': {'model.layer': 'convnorm', 'model.convnorm.use_batch_norm': False},
    'spectral norm alone': {'model.layer': 'spectralnorm', 'model.spectralnorm.use_batch_norm': False},
}

# Shared by all runs of classifiers.
_COMMON = {'plots': False, 'log.every_steps': 100, 'checkpoint.every_steps': 0, 'checkpoint.keep': 1}
_CLEAN = {**_COMMON, 'attack.names': ()}
_COSINE = {'schedule.kind': 'cosine'}
# The published protocol: one rate, which falls in steps, and a validation set that is trained on.
_AS_PUBLISHED = {RATE: 0.1, 'schedule.kind': 'step', 'data.validation': 'published'}
_SIMPLE = {'model.name': 'simple_cnn'}
_NOISES = {'data.label_noise.rate': (0.0, 0.2, 0.4, 0.6, 0.8)}
_SHARES = {'data.subset_fraction': (0.1, 0.3, 0.5, 1.0)}
_ROBUST = ('autoattack_accuracy', 'pgd_accuracy', 'fgsm_accuracy', 'test_accuracy')
_ATTACKED = {
    **_COMMON,
    'attack.names': ('fgsm', 'pgd'),
    'attack.pgd_steps': 20,
    'eval.checkpoint': 'best',
    'eval.examples': 1000,
    'eval.suite': 'standard',
    'eval.parts': ('autoattack', 'operators'),
}
_NOT_ATTACKED = {'attack.names': (), 'eval.suite': ''}
# What the paper explains robustness by: lower norms.
_MEASURES = ('largest_conv_norm', 'median_condition', 'product_bound', 'lipschitz_lower_bound')
_PROBED = 'best_validation_pgd_accuracy'
# arXiv 2103.00673: ResNet-18, Free, 8/255, PGD-20 and FGSM on the whole test set, four seeds.
_PUBLISHED_ROBUST = {
    'ConvNorm': {'pgd_accuracy': (44.75, 0.34), 'fgsm_accuracy': (52.87, 0.28)},
    'spectral norm': {'pgd_accuracy': (44.47, 0.43), 'fgsm_accuracy': (52.34, 0.39)},
    'OCNN': {'fgsm_accuracy': (52.49, 0.24)},
    'BatchNorm': {'fgsm_accuracy': (51.72, 0.60)},
    'ONI': {'pgd_accuracy': (41.08, 0.35), 'fgsm_accuracy': (48.33, 0.18)},
}


def studies(claim: str, scale: str) -> list[Study]:
    """The studies of a claim, the most informative first.

    Args:
      claim: one of `CLAIMS`.
      scale: one of `SCALES`.
    """
    return CLAIMS[claim][0](scale == 'small')


def title(claim: str) -> str:
    """The claim in the words of the paper."""
    return CLAIMS[claim][1]


def _training(small):
    if small:
        steps = {**_CLEAN, **_SIMPLE, **_COSINE, 'train.steps': 400}
        narrow = {**_CLEAN, **_COSINE, 'model.width': 8, 'train.steps': 250}
        rates, fewer = (0.003, 0.01, 0.03, 0.1, 0.3), (0.01, 0.03, 0.1)
    else:
        steps = {**_CLEAN, **_COSINE, 'train.epochs': 120.0}
        narrow = {**_CLEAN, **_COSINE, 'train.epochs': 60.0}
        rates, fewer = (0.01, 0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1)
    found = [
        Study(
            'rates', 'test accuracy against the learning rate', 'cifar10_convnorm', steps, _THREE, {RATE: rates},
            rates=rates, seconds=100,
        ),
        Study(
            'depth', 'VGG, which has no shortcuts, against its depth', 'cifar10_convnorm', narrow, _PLAIN,
            {'model.name': ('vgg11', 'vgg13', 'vgg16', 'vgg19')},
            rates=fewer, tuned_at={'model.name': 'vgg16'}, seconds=100,
        ),
        Study(
            'published', 'the published protocol', 'cifar10_convnorm', {**steps, **_AS_PUBLISHED}, _THREE, seconds=100,
        ),
    ]  # fmt: skip
    if small:  # the other studies' net is ResNet-18 at full scale
        resnet = {**_CLEAN, **_COSINE, 'model.name': 'resnet18', 'model.width': 16, 'train.steps': 250}
        found.append(Study('resnet', 'narrow ResNet-18', 'cifar10_convnorm', resnet, _THREE, rates=fewer, seconds=400))
    return found


def _robust(small):
    if small:
        free = {**_ATTACKED, **_SIMPLE, **_COSINE, 'train.steps': 150}
        fast = {**_ATTACKED, **_SIMPLE, 'train.steps': 400, 'schedule.warmup_epochs': 0.2}
        tuned, rates = _NOT_ATTACKED, (0.01, 0.03, 0.1)
    else:
        free, fast = _ATTACKED, _ATTACKED
        tuned, rates = {**_NOT_ATTACKED, 'train.epochs': 10.0}, (0.03, 0.1, 0.3)
    # All layers under the whole of AutoAttack in one study; in the others what breaks nearly all that it breaks.
    fewer = {'eval.autoattack.attacks': ('apgd-ce', 'apgd-t')} if small else {}
    arms = _THREE if small else _ARMS
    options = {'rates': rates, 'tuned_at': tuned, 'chosen_by': _PROBED, 'figures': _ROBUST, 'measures': _MEASURES}
    options['tuning_seconds'] = 200 if small else 7200
    as_published = {**_AS_PUBLISHED, 'eval.checkpoint': 'latest', 'eval.suite': ''}
    free_config, fast_config = 'cifar10_free_adversarial', 'cifar10_fast_adversarial'
    return [
        Study(
            'free', 'Free, perturbations from zero (published)', free_config, free, _ARMS, seconds=900, **options,
        ),
        Study('fast', 'Fast', fast_config, {**fast, **fewer}, arms, seconds=450, **options),
        Study(
            'free_carried', 'Free, perturbations carried over (original)', free_config,
            {**free, **fewer, 'train.adversarial.carry_over': True}, arms, seconds=450, **options,
        ),
        Study(
            'published', 'Free, the published protocol', free_config, {**free, **as_published},
            arms, figures=_ROBUST[1:], seconds=180, published={} if small else _PUBLISHED_ROBUST,
        ),
    ]  # fmt: skip


def _noise(small):
    options = {**_CLEAN, **_COSINE, **({**_SIMPLE, 'train.steps': 400} if small else {})}
    tuned, rates = {'data.label_noise.rate': 0.4}, (0.01, 0.03, 0.1)
    as_published = {**options, **_AS_PUBLISHED}
    one = {'data.label_noise.rate': (0.4,)}
    return [
        Study(
            'noise', 'symmetric label noise', 'cifar10_label_noise', options, _THREE, _NOISES,
            rates=rates, tuned_at=tuned, seconds=100,
        ),
        Study('published', 'the published protocol', 'cifar10_label_noise', as_published, _THREE, one, seconds=100),
    ]  # fmt: skip


def _scarcity(small):
    options = {**_CLEAN, **_COSINE, **({**_SIMPLE, 'train.steps': 600} if small else {'train.steps': 42_120})}
    tuned, rates = {'data.subset_fraction': 0.1}, (0.01, 0.03, 0.1)
    as_published = {**options, **_AS_PUBLISHED}
    one = {'data.subset_fraction': (0.1,)}
    return [
        Study(
            'scarcity', 'a share of the training data, as many steps', 'cifar10_data_scarcity', options, _THREE,
            _SHARES, rates=rates, tuned_at=tuned, seconds=150,
        ),
        Study('published', 'the published protocol', 'cifar10_data_scarcity', as_published, _THREE, one, seconds=150),
    ]  # fmt: skip


def _gan(small):
    scores = {'chosen_by': 'fid_classifier', 'lower_is_better': True}
    common = {'plots': False, 'log.every_steps': 100, 'checkpoint.every_steps': 0, 'checkpoint.keep': 1}
    digits = Study(
        'digits', 'digits, conditional', 'digits_gan', common, _TWO,
        rates=(5e-4, 1e-3, 2e-3), figures=('fid_classifier',), seconds=240, **scores,
    )  # fmt: skip
    if not small:
        figures = ('fid', 'fid_classifier')
        options = {**common, 'eval.features': ('inception', 'classifier')}
        return [
            Study('cifar10', 'SNGAN on CIFAR-10', 'cifar10_gan_convnorm', options, _TWO, figures=figures,
                  seconds=40_000, **scores),
            digits,
        ]  # fmt: skip
    options = {
        **common,
        'model.width': 16,
        'gan.generator_width': 16,
        'gan.setting': 'C',
        'train.ema_decay': 0.99,
        'train.steps': 1000,
        'gan.score_examples': 0,
        'eval.samples': 5000,
    }
    return [
        digits,
        Study('cifar10', 'CIFAR-10, a quarter of the width or less', 'cifar10_gan_convnorm', options, _TWO,
              figures=('fid_classifier',), seconds=1000, **scores),
    ]  # fmt: skip


CLAIMS: dict[str, tuple[Callable[[bool], list[Study]], str]] = {
    'training': (_training, 'ConvNorm trains more easily'),
    'robust': (_robust, 'ConvNorm is more robust under attack'),
    'noise': (_noise, 'ConvNorm is more robust under label noise'),
    'scarcity': (_scarcity, 'ConvNorm needs less data'),
    'gan': (_gan, 'ConvNorm makes better GANs'),
}
