"""Fast adversarial training (FGSM from a random start) of ResNet-18 with ConvNorm on CIFAR-10.

    python -m experiments.main --config=configs/cifar10_fast_adversarial.py

15 epochs with a linear rise and a cosine fall of the learning rate to a peak of 0.2, steps of
10/255 (Wong, Rice, Kolter 2020, whose schedule is piecewise linear). It can collapse: PGD accuracy
falls to zero while FGSM's rises ("catastrophic overfitting"); compare the two in the table.

What to expect: not run to its end by us yet; needs a GPU, or a small net
(--config.model.name=simple_cnn --config.train.epochs=5).
"""

from convnorm_jax.configs import cifar10_convnorm


def get_config():
    """Returns the config."""
    config = cifar10_convnorm.get_config()
    config.train.algorithm = 'fast'
    config.train.epochs = 15.0
    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 5e-4
    config.schedule.kind = 'cosine'
    config.schedule.warmup_epochs = 3.0
    config.attack.pgd_steps = 20
    config.eval.checkpoint = 'latest'  # clean validation accuracy does not choose a robust net
    return config
