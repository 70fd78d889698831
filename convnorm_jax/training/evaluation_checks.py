"""Checks of the evaluation of a config, whose errors would show only after training, or after hours of attacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from convnorm_jax.attacks.auto_attack.members import MEMBERS
from convnorm_jax.attacks.inputs import fewest_classes
from convnorm_jax.errors import UserError
from convnorm_jax.evaluation.features import SPLITS

# Pixels that the corruptions need, along each side.
SIDE_NEEDED = 8


def check_suite(flat: Mapping[str, Any]) -> None:
    """Raises UserError for settings that a part of the suite cannot use.

    Args:
      flat: the config, see `configs.keys.flatten`.
    """
    if not flat['eval.suite']:
        return
    parts, epsilon, curve = flat['eval.parts'], flat['attack.epsilon'], flat['eval.curve']
    for part in ('autoattack', 'curve'):
        if part in parts and not epsilon:
            raise UserError(
                f'config.attack.epsilon={epsilon}: expected above 0 for {part!r} of config.eval.parts; leave it out '
                'of them, or give a radius'
            )
    if 'curve' in parts and not curve:
        raise UserError(
            "config.eval.curve=(): expected at least one factor of attack.epsilon for 'curve' of config.eval.parts; "
            'leave it out of them, or give factors'
        )
    largest = 255 if flat['attack.norm'] == 'linf' else float('inf')
    if 'curve' in parts and not epsilon * curve[-1] <= largest:
        raise UserError(
            f'config.eval.curve={tuple(curve)}: {curve[-1]:g} times config.attack.epsilon={epsilon:g} is '
            f'{epsilon * curve[-1]:g}, expected at most {largest} (in 1/255)'
        )
    if 'autoattack' in parts and not flat['eval.autoattack.attacks']:
        raise UserError(
            "config.eval.autoattack.attacks=(): expected at least one for 'autoattack' of config.eval.parts; leave it "
            f'out of them, or give some of {", ".join(MEMBERS)}'
        )


def check_scores(flat: Mapping[str, Any]) -> None:
    """Raises UserError for too few generated images: the scores split them into parts."""
    count = flat['gan.score_examples']
    if 0 < count < SPLITS:
        raise UserError(f'config.gan.score_examples={count}: expected 0 (no scores), or at least {SPLITS}')


def check_data(config: ConfigDict, classes: int, input_shape: Sequence[int]) -> None:
    """Raises UserError if the data set has too few classes or pixels for a loss, an attack or a part of the suite.

    Args:
      config: checked.
      classes: number of classes of the data set.
      input_shape: [H, W, C] of its images.
    """
    attack, section = config.attack, config.eval
    parts = section.parts if section.suite else ()
    needed = {f'config.train.algorithm={config.train.algorithm}': 2}
    if attack.names or 'curve' in parts:
        needed[f'config.attack.loss={attack.loss}'] = fewest_classes(attack.loss)
    if 'autoattack' in parts and 'apgd-dlr' in section.autoattack.attacks:
        needed["'apgd-dlr' of config.eval.autoattack.attacks"] = fewest_classes('dlr')
    for what, number in needed.items():
        if classes < number:
            raise UserError(
                f'{what} needs at least {number} classes, config.data.name={config.data.name} has {classes} here; '
                'give another one, or data of more classes'
            )
    if 'corruptions' in parts and min(input_shape[:2]) < SIDE_NEEDED:
        raise UserError(
            f"'corruptions' of config.eval.parts needs images of at least {SIDE_NEEDED} x {SIDE_NEEDED} pixels, "
            f'config.data.name={config.data.name} has {input_shape[0]} x {input_shape[1]} here; leave it out, or give '
            'a larger config.data.image_size'
        )
