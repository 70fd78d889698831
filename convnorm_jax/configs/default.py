"""The base of every config: all keys, with defaults that suit the embedded digits.

A config file starts from `get_config()` and changes what it is about; any key can be overridden on the command line as
--config.section.key=value. The table says of each key its default, what it means, and what it may be: one of `choices`,
some of `names`, a number of an `interval`. 'MODULE:NAME' among them stands for the list NAME of that module of
`convnorm_jax`. A default of None stands for "the published value" or "not used".
"""

import functools

from ml_collections import ConfigDict

from convnorm_jax.configs.keys import Key, make_config

# What a resumed run, or an evaluation, may change without becoming another run.
_free = functools.partial(Key, resume='free')
# Attacks of the evaluation.
_attack = functools.partial(Key, resume='free', decides_suite=True)
# What no figure in result.json depends on.
_aside = functools.partial(Key, resume='free', affects_result=False)
_duration = functools.partial(Key, resume='duration')

_LAYERS = 'layers.factory:LAYERS'

KEYS = {
    'seed': Key(0, 'of everything random', interval='[0, 4294967295]', decides_suite=True),
    'plots': _aside(True, 'draw plots at the end of a run'),
    # The net; of a GAN, the discriminator.
    'model.name': Key(
        'simple_cnn',
        'resnet18, resnet34, resnet50, resnet101, resnet152, vgg11, vgg13, vgg16, vgg19, simple_cnn, simple_cnn2, '
        'mobilenet, sequence_cnn; of a GAN: sngan, dcgan',
        choices=('models.classifiers:MODELS', 'models.gan:GANS'),
    ),
    'model.layer': Key(
        'convnorm',
        'convolution and normalization: convnorm, batchnorm, groupnorm, switchnorm, spectralnorm, oni, own, '
        'weightnorm, none',
        choices=(_LAYERS,),
    ),
    'model.width': Key(None, 'channels of the first stage; mobilenet: of the stem', kind=int, interval='[1, 65536]'),
    'model.depth': Key(None, 'blocks of each stage, e.g. (1,1,1)', kind=tuple),
    'model.stem': Key('', "ResNet's: cifar ('' means it) or imagenet", choices=('', 'models.resnet:STEMS')),
    'model.activation': Key('relu', 'relu or shifted_relu', choices=('layers.activations:ACTIVATIONS',)),
    'model.dtype': Key('float32', 'of the computation: float32 or bfloat16', choices=('models.classifiers:DTYPES',)),
    'model.convnorm.use_affine': Key(True, 'the learned channel-wise convolution'),
    'model.convnorm.momentum': Key(
        None, 'of the running spectrum; None: the published schedule', kind=float, interval='[0, 1)'
    ),
    'model.convnorm.spectrum': _free(
        'running', 'at inference: running (average) or exact', choices=('layers.core:SPECTRUM_MODES',)
    ),
    'model.convnorm.method': _free(
        None,
        'algorithm: frequency, spatial or reference; None: by platform and size',
        kind=str,
        choices=(None, 'layers.method:METHODS'),
    ),
    'model.groupnorm.groups': Key(32, 'groups of channels', interval='[1, 65536]'),
    'model.spectralnorm.mode': Key(
        'reshaped',
        'norm of the reshaped kernel (published), or conv: of the convolution',
        choices=('layers.reparam:SPECTRAL_NORM_MODES',),
    ),
    'model.spectralnorm.iterations': Key(1, 'of power iteration in a step', interval='[1, 1000]'),
    'model.oni.iterations': Key(3, "of Newton's method, the paper's T", interval='[1, 1000]'),
    'model.oni.groups': Key(1, 'groups of filters, each made orthogonal', interval='[1, 65536]'),
    'model.oni.init_scale': Key(1.414, 'of the learned scale', interval='(0, 1e6]'),
    'model.oni.bounded_columns': Key(
        False, 'True keeps the case of more filters than taps from diverging; False as published'
    ),
    'model.own.groups': Key(None, 'None: the fewest of at most 64 filters', kind=int, interval='[1, 65536]'),
    'model.own.init_scale': Key(1.414, 'of the learned scale', interval='(0, 1e6]'),
    **{
        f'model.{layer}.use_batch_norm': Key(
            None, 'BatchNorm at the end of the layer; None: as published, but not in GANs', kind=bool
        )
        for layer in ('convnorm', 'spectralnorm', 'oni', 'own', 'weightnorm')
    },
    # A GAN: train.algorithm='gan'.
    'gan.generator_layer': Key(
        '', "as model.layer; '' means the net's own: none (sngan), batchnorm (dcgan)", choices=('', _LAYERS)
    ),
    'gan.generator_width': Key(None, 'channels; None: as published', kind=int, interval='[1, 65536]'),
    'gan.dense': Key(
        'spectralnorm',
        "the discriminator's last layer, whatever its convolutions are: spectralnorm or none",
        choices=('layers.factory:DENSE_LAYERS',),
    ),
    'gan.latent': Key(128, 'length of a latent vector', interval='[1, 65536]'),
    'gan.conditional': Key(False, 'condition both nets on the labels'),
    'gan.loss': Key('hinge', 'hinge, non_saturating, wasserstein, least_squares', choices=('steps.gan_losses:LOSSES',)),
    'gan.n_dis': Key(5, 'discriminator updates for each of the generator', interval='[1, 1000]'),
    'gan.gradient_penalty': Key(0.0, 'its weight, e.g. 10', interval='[0, 1e6]'),
    'gan.augmentation': Key(
        (), 'differentiable augmentation: color, translation, cutout', names=('data.diffaugment:POLICIES',)
    ),
    'gan.setting': Key(
        '',
        "A, B, C, D, E or F, the SNGAN paper's Adam settings: overrides optimizer and n_dis",
        choices=('', 'training.nets:ADAM_SETTINGS'),
    ),
    'gan.passes': Key(
        1, 'over the data between two rows of metrics.csv, with scores and checkpoint', interval='[1, 1e6]'
    ),
    'gan.score_examples': Key(
        1000, 'generated images that the scores of such a row are computed from; 0: no scores', interval='[0, 1e7]'
    ),
    'gan.classifier': Key('', "folder of a run whose features score the images; '' trains a small classifier"),
    # Data.
    'data.name': Key(
        'digits',
        'digits, cifar10, cifar100, svhn, fashion_mnist, imagenet, folder',
        choices=('data.sources:NAMES',),
        decides_suite=True,
    ),
    'data.data_dir': _aside('', 'TFDS directory, or a folder with the official archive, or with train/ and val/'),
    'data.image_size': Key(
        224, 'of imagenet and folder; the images of the others have their own', interval='[1, 4096]'
    ),
    'data.workers': _free(
        None, 'processes that decode imagenet and folder; None: by the cores', kind=int, interval='[0, 256]'
    ),
    'data.batch_size': Key(128, 'examples of a step, on all devices together', interval='[1, 1048576]'),
    'data.augmentation': Key(
        'crop_flip',
        'none, crop, crop_flip; imagenet, folder: resized_crop, resized_crop_flip',
        choices=('data.augment:AUGMENTATIONS',),
    ),
    'data.crop_padding': Key(4, 'pixels on each side before a crop', interval='[0, 512]'),
    'data.validation': Key(
        'held_out',
        'held_out, or published: part of the training set, still trained on',
        choices=('data.splits:VALIDATION_KINDS',),
    ),
    'data.validation_fraction': Key(0.1, 'of every class of the training set', interval='[0, 1)'),
    'data.subset_fraction': Key(1.0, 'of every class that is trained on', interval='(0, 1]'),
    'data.label_noise.kind': Key('none', 'none, symmetric, asymmetric', choices=('data.splits:NOISE_KINDS',)),
    'data.label_noise.rate': Key(0.0, 'share of the labels that are drawn again', interval='[0, 1]'),
    # Training.
    'train.algorithm': Key(
        'clean',
        'clean; free, fast, pgd, trades: see train.adversarial; or gan',
        choices=('clean', 'free', 'fast', 'pgd', 'trades', 'gan'),
    ),
    'train.epochs': _duration(
        120.0, 'or steps, or examples: the first of steps, examples, epochs that is not 0', interval='[0, 1e6]'
    ),
    'train.steps': _duration(0, 'see epochs', interval='[0, 1e12]'),
    'train.examples': _duration(0, 'see epochs', interval='[0, 1e15]'),
    'train.microbatches': Key(
        1, 'clean: parts of a batch, one after another, for less memory', interval='[1, 1048576]'
    ),
    'train.label_smoothing': Key(0.0, 'share of the target spread over all classes', interval='[0, 1)'),
    'train.ema_decay': Key(0.0, 'of an average of the parameters; 0: no average', interval='[0, 1)'),
    'train.early_stopping_epochs': _free(
        0, 'stop after so many epochs without a better validation; 0: never', interval='[0, 1e6]'
    ),
    # OCNN: orthogonality of the convolutions as a regularizer.
    'train.ocnn.weight': Key(0.0, 'of the regularizer; the published runs: 1e-4', interval='[0, 1e6]'),
    'train.ocnn.pattern': Key('', "regular expression of kernel paths; '' means the published choice"),
    'train.ocnn.lags': Key(
        'published', 'published or paper: what a stride of 2 compares with the identity', choices=('layers.ocnn:LAGS',)
    ),
    # Adversarial training; the attacks of the evaluation are in `attack`.
    'train.adversarial.epsilon': Key(8.0, 'radius, in 1/255', interval='[0, 255]'),
    'train.adversarial.step_size': Key(
        None, 'in 1/255; None: 8 (free), 10 (fast), 2 (pgd, trades)', kind=float, interval='(0, 255]'
    ),
    'train.adversarial.steps': Key(10, 'pgd, trades: steps of the attack', interval='[1, 1000]'),
    'train.adversarial.replays': Key(4, 'free: passes over each batch, each an update', interval='[1, 1000]'),
    'train.adversarial.carry_over': Key(
        False, 'free: the perturbation starts where the last batch left it (True, its original) or at 0 (ConvNorm)'
    ),
    'train.adversarial.beta': Key(6.0, 'trades: weight of the robust term', interval='[0, 1e6]'),
    'train.adversarial.batch_statistics': Key(
        '',
        "BatchNorm's during the attack: train or eval; '': train (fast, pgd), eval (trades)",
        choices=('', 'steps.adversarial:BATCH_STATISTICS'),
    ),
    'train.adversarial.probe_examples': Key(
        512,
        'validation examples under PGD at the end of every epoch: that accuracy chooses the best checkpoint, and a '
        'collapse is a warning; 0: none',
        interval='[0, 1e7]',
    ),
    'optimizer.name': Key('sgd', 'sgd, adam or adamw', choices=('steps.state:OPTIMIZERS',)),
    'optimizer.learning_rate': Key(0.1, 'the peak of the schedule', interval='(0, 1e6]'),
    'optimizer.momentum': Key(0.9, "or Adam's first beta", interval='[0, 1)'),
    'optimizer.beta2': Key(0.999, "Adam's second beta", interval='[0, 1)'),
    'optimizer.weight_decay': Key(1e-4, 'of every parameter', interval='[0, 1e6]'),
    'schedule.kind': Key('step', 'step, cosine, linear, constant', choices=('training.schedule:SCHEDULES',)),
    'schedule.milestones': Key((1 / 3, 2 / 3), 'step: shares of the run'),
    'schedule.factor': Key(0.1, 'step: of the learning rate at a milestone', interval='(0, 1]'),
    'schedule.warmup_epochs': Key(0.0, 'of linear rise, part of the run', interval='[0, 1e6]'),
    # Attacks of the evaluation.
    'attack.names': _attack(('fgsm', 'pgd'), 'fgsm, pgd', names=('evaluation.classifier:ATTACKS',)),
    'attack.epsilon': _attack(8.0, 'radius, in 1/255; l2: 127.5 is a length of 0.5', interval='[0, 1e6]'),
    'attack.norm': _attack('linf', 'linf or l2; FGSM is always linf', choices=('attacks.inputs:NORMS',)),
    'attack.step_size': _attack(2.0, 'of PGD, in 1/255', interval='(0, 1e6]'),
    'attack.pgd_steps': _attack(10, 'of PGD', interval='[1, 1e5]'),
    'attack.restarts': _attack(1, 'of PGD', interval='[1, 1e4]'),
    'attack.loss': _attack(
        'cross_entropy', 'cross_entropy, margin, or dlr (three classes or more)', choices=('attacks.inputs:LOSSES',)
    ),
    # Evaluation.
    'eval.batch_size': _aside(256, 'examples of a batch', interval='[1, 1048576]'),
    'eval.examples': _free(
        0, 'attack only the first so many test examples; 0: all (imagenet, folder: 1000)', interval='[0, 1e12]'
    ),
    'eval.checkpoint': _free(
        'best', 'best by validation accuracy (adversarial training: under PGD), or latest', choices=('best', 'latest')
    ),
    'eval.suite': _free('', 'standard: all of eval.parts, and report.md', choices=('evaluation.suite:SUITES',)),
    'eval.parts': _free(
        ('autoattack', 'curve', 'simba', 'corruptions'),
        'autoattack, curve, simba, corruptions, operators',
        names=('evaluation.suite:PARTS',),
    ),
    'eval.autoattack.attacks': _attack(
        ('apgd-ce', 'apgd-t', 'fab-t', 'square'),
        'apgd-ce, apgd-t, fab-t, square, and apgd-dlr',
        names=('attacks.auto_attack.members:MEMBERS',),
    ),
    'eval.autoattack.steps': _attack(100, 'of APGD and FAB', interval='[1, 1e6]'),
    'eval.autoattack.queries': _attack(5000, 'of Square', interval='[1, 1e7]'),
    'eval.autoattack.targets': _attack(9, 'wrong classes that a targeted attack tries', interval='[1, 1e4]'),
    'eval.autoattack.restarts': _attack(1, 'of an untargeted attack', interval='[1, 1e4]'),
    'eval.curve': _attack((0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0), 'radii under PGD, as factors of attack.epsilon'),
    'eval.simba.examples': _attack(100, 'attacked test examples', interval='[1, 1e6]'),
    'eval.simba.queries': _attack(5000, 'of each example', interval='[1, 1e7]'),
    'eval.simba.step_size': _attack(0.2, 'in units of [0, 1], not of 255', interval='(0, 1]'),
    'eval.samples': _free(10000, 'images of a generator; 50000 is usual for an FID', interval='[10, 1e8]'),
    'eval.features': _free(
        ('classifier',),
        'that score a generator: classifier, and inception for the FID proper',
        names=('evaluation.features:SCORE_NAMES',),
    ),
    'eval.inception': _free('', "Inception's weight file; '' downloads it once"),
    'checkpoint.every_steps': _aside(
        1000, 'between checkpoints, next to one at the end of every epoch; 0: only those', interval='[0, 1e12]'
    ),
    'checkpoint.keep': _aside(2, 'latest checkpoints that are kept, next to the best', interval='[1, 1e6]'),
    'log.every_steps': _aside(20, 'between two updates of the progress line and TensorBoard', interval='[1, 1e12]'),
    'log.profile_steps': _aside(0, 'steps in a trace in WORKDIR/profile; 0: no trace', interval='[0, 1e4]'),
}


def get_config() -> ConfigDict:
    """The base config."""
    return make_config(KEYS)
