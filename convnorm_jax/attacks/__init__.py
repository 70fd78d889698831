"""Attacks on a classifier that is known only as `logits_fn`: pixels in [0, 1] -> logits.

An attack is a start, a step, a projection and a loss; `gradient.py` holds these pieces and the
two attacks made of nothing else. All are pure functions that can be jitted.
"""

from convnorm_jax.attacks.gradient import (
    LOSSES,
    attack_loss,
    fgsm,
    pgd,
    project_linf,
    uniform_start,
)

__all__ = ['LOSSES', 'attack_loss', 'fgsm', 'pgd', 'project_linf', 'uniform_start']
