"""Free adversarial training of ResNet-18 with ConvNorm on CIFAR-10, the published protocol.

    python -m experiments.main --config=configs/cifar10_free_adversarial.py

30 epochs, each batch 4 times in a row (one update each), perturbations of 8/255 from zero;
learning rate x 0.1 at epochs 10 and 20, reported under FGSM and PGD-20. The original method,
which carries the perturbation over to the next batch: --config.train.adversarial.carry_over=True.
The baselines: --config.model.layer=batchnorm (spectralnorm, oni, ...). A small net for
a CPU: --config.model.name=simple_cnn --config.train.epochs=2

What to expect: ResNet-18 has not been run (it needs a GPU). SimpleCNN, one epoch, learning rate
0.02, cosine, CIFAR-10 (JPEG q75), seeds 0, 1: 38.6, 39.7 % clean, 21.5, 21.1 % under AutoAttack on
1000 images (BatchNorm 39.6, 38.5 and 21.5, 20.5).
At the published rate of 0.1 that small net stays near chance for its first 200 batches.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_convnorm.get_config()
    config.train.algorithm = 'free'
    config.train.epochs = 30.0
    config.attack.pgd_steps = 20
    config.eval.checkpoint = 'latest'  # as published
    return config
