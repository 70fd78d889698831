"""Fast adversarial training (FGSM from a random start) of ResNet-18 with ConvNorm on CIFAR-10.

    python -m experiments.main --config=configs/cifar10_fast_adversarial.py

15 epochs with a learning rate that rises linearly to 0.2 and decays as a cosine, steps of
10/255 (Wong, Rice, Kolter 2020, whose schedule is piecewise linear). It can collapse: PGD accuracy
falls to zero while FGSM's rises ("catastrophic overfitting"). A few validation examples are attacked
by PGD at the end of each epoch; a collapse is a warning, and the best epoch by them is evaluated.

What to expect: not run to the end yet; needs a GPU, or a small net
(--config.model.name=simple_cnn --config.train.epochs=5).
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import cifar10_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = cifar10_convnorm.get_config()
    config.train.algorithm = 'fast'
    config.train.epochs = 15.0
    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 5e-4
    config.schedule.kind = 'cosine'
    config.schedule.warmup_epochs = 3.0
    config.attack.pgd_steps = 20
    return config
