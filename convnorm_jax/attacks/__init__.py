"""Attacks on a classifier, given as `logits_fn`: pixels in [0, 1] -> logits.

An attack is a start, a step, a projection and a loss; `projections.py` and `losses.py` hold these pieces, the other
files the attacks. All are pure functions that can be jitted, except `autoattack` (`run_ensemble`), which jits its
attacks and runs each on the examples that are still robust.
"""

from convnorm_jax.attacks.apgd import apgd
from convnorm_jax.attacks.auto_attack.ensemble import STANDARD, EnsembleResult, autoattack, run_ensemble
from convnorm_jax.attacks.evaluation import Evaluation, evaluate
from convnorm_jax.attacks.fab import fab
from convnorm_jax.attacks.gradient import fgsm, pgd
from convnorm_jax.attacks.inputs import LOSSES, NORMS
from convnorm_jax.attacks.losses import attack_loss, targeted_loss
from convnorm_jax.attacks.nets import as_logits_fn
from convnorm_jax.attacks.projections import clip_pixels, project_l2, project_linf, uniform_start
from convnorm_jax.attacks.simba import simba, simba_summary
from convnorm_jax.attacks.square import square

__all__ = [
    'LOSSES',
    'NORMS',
    'STANDARD',
    'EnsembleResult',
    'Evaluation',
    'apgd',
    'as_logits_fn',
    'attack_loss',
    'autoattack',
    'clip_pixels',
    'evaluate',
    'fab',
    'fgsm',
    'pgd',
    'project_l2',
    'project_linf',
    'run_ensemble',
    'simba',
    'simba_summary',
    'square',
    'targeted_loss',
    'uniform_start',
]
