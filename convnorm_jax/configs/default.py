"""The base of every config: all keys, with defaults that suit the embedded digits.

A config file starts from `get_config()` and changes what it is about; any key can be
overridden on the command line as --config.section.key=value. None stands for "the
published value" or "not used".
"""

from ml_collections import ConfigDict, config_dict


def get_config():
    """Returns the base config."""
    config = ConfigDict()
    config.seed = 0
    config.plots = True  # pictures at the end of a run

    config.model = ConfigDict()
    # resnet18, resnet34, resnet50, resnet101, resnet152, vgg11, vgg13, vgg16, vgg19, simple_cnn2, mobilenet,
    # sequence_cnn; of a GAN: sngan, dcgan
    config.model.name = 'simple_cnn'
    # batchnorm, groupnorm, switchnorm, spectralnorm, oni, own, weightnorm, none
    config.model.layer = 'convnorm'
    config.model.width = config_dict.placeholder(int)  # channels of the first stage; mobilenet: of the stem
    config.model.depth = config_dict.placeholder(tuple)  # blocks of each stage, e.g. (1,1,1)
    config.model.stem = ''  # ResNet: cifar (the default) or imagenet
    config.model.activation = 'relu'  # or shifted_relu
    config.model.dtype = 'float32'  # or bfloat16
    config.model.convnorm = ConfigDict()
    config.model.convnorm.use_affine = True
    config.model.convnorm.momentum = config_dict.placeholder(float)  # None: the published schedule
    config.model.convnorm.spectrum = 'running'  # at inference; or exact
    # frequency, spatial or reference; None: by platform and size
    config.model.convnorm.method = config_dict.placeholder(str)
    config.model.groupnorm = ConfigDict()
    config.model.groupnorm.groups = 32
    config.model.spectralnorm = ConfigDict()
    config.model.spectralnorm.mode = 'reshaped'  # the published way; or conv: the norm of the convolution
    config.model.spectralnorm.iterations = 1  # of power iteration in a step
    config.model.oni = ConfigDict()
    config.model.oni.iterations = 3  # of Newton, the paper's T
    config.model.oni.groups = 1
    config.model.oni.init_scale = 1.414
    config.model.oni.bounded_columns = False  # False as published, where the column case can diverge
    config.model.own = ConfigDict()
    config.model.own.groups = config_dict.placeholder(int)  # None: the fewest of at most 64 filters
    config.model.own.init_scale = 1.414
    config.model.weightnorm = ConfigDict()
    for layer in 'convnorm', 'spectralnorm', 'oni', 'own', 'weightnorm':  # BatchNorm at the end of the layer
        config.model[layer].use_batch_norm = config_dict.placeholder(bool)  # None: as published, but not in GANs

    config.gan = ConfigDict()  # train.algorithm = 'gan': config.model is the discriminator
    config.gan.generator_layer = ''  # as model.layer; '' is the net's: none (sngan), batchnorm (dcgan)
    config.gan.generator_width = config_dict.placeholder(int)
    config.gan.dense = 'spectralnorm'  # the discriminator's last layer, whatever its convolutions are; or none
    config.gan.latent = 128
    config.gan.conditional = False  # on the labels
    config.gan.loss = 'hinge'  # non_saturating, wasserstein, least_squares
    config.gan.n_dis = 5  # discriminator updates for each of the generator
    config.gan.gradient_penalty = 0.0  # its weight, e.g. 10
    config.gan.augmentation = ()  # differentiable: color, translation, cutout
    config.gan.setting = ''  # A, B, C, D, E or F, the SNGAN paper's Adam settings: overrides optimizer and n_dis
    config.gan.passes = 1  # over the data between two rows of metrics.csv, scores and checkpoints
    config.gan.score_examples = 1000  # generated pictures behind the scores of such a row; 0: no scores
    config.gan.classifier = ''  # folder of a run whose features score the pictures; '' trains a small one

    config.data = ConfigDict()
    config.data.name = 'digits'  # cifar10, cifar100, svhn, fashion_mnist, imagenet, folder
    config.data.data_dir = ''  # TFDS directory, or a folder with the official archive, or with train/ and val/
    config.data.image_size = 224  # of imagenet and folder; the pictures of the others have their own
    config.data.workers = config_dict.placeholder(int)  # processes that decode those two; None: by the cores
    config.data.batch_size = 128
    config.data.augmentation = 'crop_flip'  # none, crop, crop_flip; imagenet, folder: resized_crop, resized_crop_flip
    config.data.crop_padding = 4
    config.data.validation = 'held_out'  # or published: part of the training set, still trained on
    config.data.validation_fraction = 0.1
    config.data.subset_fraction = 1.0  # of every class
    config.data.label_noise = ConfigDict()
    config.data.label_noise.kind = 'none'  # symmetric, asymmetric
    config.data.label_noise.rate = 0.0

    config.train = ConfigDict()
    config.train.algorithm = 'clean'  # or free, fast, pgd, trades: see config.train.adversarial; or gan
    config.train.epochs = 120.0  # or steps, or examples: the first of steps, examples, epochs that is not 0
    config.train.steps = 0
    config.train.examples = 0
    config.train.microbatches = 1  # clean: parts of a batch, one after another, for less memory
    config.train.label_smoothing = 0.0
    config.train.ema_decay = 0.0  # 0: no average of the parameters
    config.train.early_stopping_epochs = 0  # 0: never

    config.train.ocnn = ConfigDict()  # orthogonality of the convolutions as a regularizer
    config.train.ocnn.weight = 0.0  # the published runs: 1e-4
    config.train.ocnn.pattern = ''  # regular expression of kernel paths; '' is the published choice
    config.train.ocnn.lags = 'published'  # or paper: what a stride of 2 compares with the identity
    config.train.adversarial = ConfigDict()  # what the training attacks with; config.attack is for evaluation
    config.train.adversarial.epsilon = 8.0  # in 1/255, as step_size
    config.train.adversarial.step_size = config_dict.placeholder(float)  # None: 8 (free), 10 (fast), 2 (pgd, trades)
    config.train.adversarial.steps = 10  # pgd, trades
    config.train.adversarial.replays = 4  # free: passes over each batch, each an update
    config.train.adversarial.carry_over = False  # free: True as in its original, False as in the ConvNorm paper
    config.train.adversarial.beta = 6.0  # trades
    config.train.adversarial.batch_statistics = ''  # what the attack sees: train (fast, pgd) or eval (trades)

    config.optimizer = ConfigDict()
    config.optimizer.name = 'sgd'  # or adam, adamw
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9  # Adam's first beta
    config.optimizer.beta2 = 0.999  # Adam's second
    config.optimizer.weight_decay = 1e-4

    config.schedule = ConfigDict()
    config.schedule.kind = 'step'  # cosine, linear, constant
    config.schedule.milestones = (1 / 3, 2 / 3)  # shares of the run
    config.schedule.factor = 0.1
    config.schedule.warmup_epochs = 0.0

    config.attack = ConfigDict()
    config.attack.names = ('fgsm', 'pgd')
    config.attack.epsilon = 8.0  # in 1/255, as step_size; l2: 127.5 is a length of 0.5
    config.attack.norm = 'linf'  # or l2; FGSM is linf always
    config.attack.step_size = 2.0
    config.attack.pgd_steps = 10
    config.attack.restarts = 1
    config.attack.loss = 'cross_entropy'  # or margin, dlr (three classes or more)

    config.eval = ConfigDict()
    config.eval.batch_size = 256
    config.eval.examples = 0  # attack only the first so many test examples; 0: all (imagenet, folder: 1000)
    config.eval.checkpoint = 'best'  # by validation accuracy; or latest
    config.eval.suite = ''  # standard: all of the parts below, and report.md
    config.eval.parts = ('autoattack', 'curve', 'simba', 'corruptions')
    config.eval.autoattack = ConfigDict()
    config.eval.autoattack.attacks = ('apgd-ce', 'apgd-t', 'fab-t', 'square')  # and apgd-dlr
    config.eval.autoattack.steps = 100
    config.eval.autoattack.queries = 5000
    config.eval.autoattack.targets = 9
    config.eval.autoattack.restarts = 1
    config.eval.curve = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # times attack.epsilon, under PGD
    config.eval.simba = ConfigDict()
    config.eval.simba.examples = 100
    config.eval.simba.queries = 5000
    config.eval.simba.step_size = 0.2  # of 1, not of 255
    config.eval.samples = 10000  # of a generator; 50000 is the usual number for an FID
    config.eval.features = ('classifier',)  # that score a generator; and inception, for FID proper
    config.eval.inception = ''  # its weight file; '' downloads it once

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000  # beside one at the end of every epoch; 0: only those
    config.checkpoint.keep = 2  # latest ones, beside the best

    config.log = ConfigDict()
    config.log.every_steps = 20
    config.log.profile_steps = 0  # a trace of so many steps in WORKDIR/profile; 0: none
    return config
