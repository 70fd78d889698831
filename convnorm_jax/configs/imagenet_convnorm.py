"""ResNet-18 with ConvNorm on ImageNet, streamed from class folders or from TFDS's ArrayRecords.

    python -m experiments.main --config=configs/imagenet_convnorm.py

DIR, by --config.data.data_dir=DIR, holds train/CLASS/*.JPEG and val/CLASS/*.JPEG, or a TFDS-prepared
imagenet2012. The usual training: SGD 0.1 with momentum 0.9 and weight decay 1e-4, batch 256, 90 epochs, learning rate
x 0.1 after 30 and 60, random resized crops and flips of 224x224; a hundredth of each class of train is held out to
select the checkpoint, val is the test set. ResNet-50: --config.model.name=resnet50

What to expect: not run on ImageNet, not even for a step; needs one or more GPUs.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import default


def get_config() -> ConfigDict:
    """The config."""
    config = default.get_config()
    config.model.name = 'resnet18'
    config.model.layer = 'convnorm'
    config.model.stem = 'imagenet'
    config.data.name = 'imagenet'
    config.data.batch_size = 256
    config.data.augmentation = 'resized_crop_flip'
    config.data.validation_fraction = 0.01
    config.train.epochs = 90.0
    return config
