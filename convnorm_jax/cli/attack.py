"""Evaluates the robustness of a net of your own: FGSM, PGD-20 with five starts, AutoAttack.

convnorm attack --model=FILE.py:FUNCTION --images=FILE.npz [--epsilon=8] [--norm=linf|l2] [--examples=N]
    [--attacks=apgd-ce,apgd-t,fab-t,square] [--batch_size=250] [--seed=0] [--output=attack]

FUNCTION takes no argument and returns the net: a function of images [B, H, W, C] in [0, 1], which normalizes them
itself; (Linen module, variables); an NNX module; an Equinox module of one example, or (module, state).
FILE.npz holds `images`, uint8 or float in [0, 1], [N, H, W, C], and `labels`, int [N]. --epsilon is in 1/255 (l2:
127.5 is a length of 0.5). Writes attack.md, attack.json and adversarial.npz to --output. Rerun to resume.
"""

import dataclasses
import importlib.util
import os
import sys
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from convnorm_jax.cli import command_line
from convnorm_jax.errors import UserError


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The options of a command line.

    Raises:
      UserError: a mistake of the user, in one line.
    """
    values = flags.FlagValues()
    flags.DEFINE_string('model', '', 'FILE.py:FUNCTION', flag_values=values)
    flags.DEFINE_string('images', '', 'FILE.npz with images and labels', flag_values=values)
    flags.DEFINE_float('epsilon', 8.0, 'radius in 1/255', lower_bound=0.0, flag_values=values)
    flags.DEFINE_enum('norm', 'linf', ['linf', 'l2'], 'of the ball', flag_values=values)
    flags.DEFINE_integer('examples', 0, 'the first so many images; 0: all', lower_bound=0, flag_values=values)
    flags.DEFINE_list('attacks', [], "of AutoAttack; '' means the standard four", flag_values=values)
    flags.DEFINE_integer('batch_size', 250, 'images at a time', lower_bound=1, flag_values=values)
    flags.DEFINE_integer('seed', 0, 'of everything random', flag_values=values)
    flags.DEFINE_string('output', 'attack', 'folder of the results', flag_values=values)
    command_line.parse_own(values, argv, ', '.join(f'--{name}' for name in sorted(values) if len(name) > 1))
    for name, form in (('model', 'FILE.py:FUNCTION'), ('images', 'FILE.npz')):
        if not values[name].value:
            raise UserError(f'--{name} is missing: give --{name}={form}')
    return values


def run(argv: Sequence[str]) -> int:
    """One command; returns the exit code. A user's mistake is raised as `UserError`."""
    options = parse(argv)
    images, labels = load_examples(options.images, options.examples)
    output = os.path.expanduser(options.output)
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output={output}: cannot write there ({error.strerror}); give another folder') from error
    net = load_net(options.model)
    # JAX is imported only now, if the user's file has not done so: a mistake in the options is answered without it.
    import jax

    from convnorm_jax.attacks import STANDARD, evaluate
    from convnorm_jax.cli.compiled import keep_programs
    from convnorm_jax.files import write_atomically, write_json, write_text

    keep_programs()
    found = evaluate(
        net,
        images,
        labels,
        epsilon=options.epsilon / 255,
        norm=options.norm,
        rng=jax.random.key(options.seed),
        attacks=tuple(options.attacks) or STANDARD,
        batch_size=options.batch_size,
        state_path=os.path.join(output, 'state.npz'),
        log=command_line.say,
    )
    text = _report(found, options, argv)
    print(f'\n{text}\n')
    paths = [os.path.join(output, name) for name in ('attack.md', 'attack.json', 'adversarial.npz')]
    write_text(paths[0], text + '\n')
    write_json(paths[1], _content(found, options))
    write_atomically(
        paths[2], lambda file: np.savez_compressed(file, images=found.images, labels=labels, robust=found.robust)
    )
    print(*(f'wrote {path}' for path in paths), sep='\n', flush=True)
    return 0


def load_net(text: str) -> Any:
    """What the function of 'FILE.py:FUNCTION' returns.

    Raises:
      UserError: there is no such file or function, or it raises.
    """
    path, _, name = text.rpartition(':')
    if not path or not name:
        raise UserError(f'--model={text}: expected FILE.py:FUNCTION, e.g. --model=net.py:trained')
    if not os.path.isfile(path):
        raise UserError(f'--model={text}: there is no file {path}')
    spec = importlib.util.spec_from_file_location('given_model', path)
    if spec is None or spec.loader is None:
        raise UserError(f'--model={text}: {path} is not a Python file, NAME.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['given_model'] = module  # dataclasses and NNX modules of the file look themselves up there
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # what it imports from its own folder
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            raise UserError(f'there is no function {name} in {path}')
        return function()
    except UserError as error:
        raise UserError(f'--model={text}: {error}') from error
    except Exception as error:  # the user's own file may raise anything
        raise UserError(f'--model={text}: {type(error).__name__}: {error}') from error


def load_examples(path: str, examples: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(images float32 in [0, 1], labels) of a .npz file.

    Args:
      path: of a file with `images`, uint8 or float, and `labels`.
      examples: the first so many; 0 for all.

    Raises:
      UserError: the file cannot be read, or lacks one of the two.
    """
    try:
        with np.load(path) as file:
            missing = {'images', 'labels'} - set(file.files)
            if missing:
                raise UserError(f'--images={path}: holds {", ".join(file.files)}; expected images and labels')
            images, labels = file['images'], file['labels']
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f'--images={path}: cannot be read as a .npz file ({error})') from error
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    count = examples or len(images)
    return images[:count], labels[:count]


def _report(found, options, argv):
    from convnorm_jax.reports.tables import markdown_table

    rows = [(name, f'{100 * accuracy:.2f}', f'{seconds:.1f}') for name, accuracy, seconds in found.rows]
    turns = [
        (attack['name'], str(attack['attacked']), str(attack['broken']), f'{100 * attack["robust_accuracy"]:.2f}')
        for attack in found.ensemble.attacks
    ]
    low, high = (100 * end for end in found.interval)
    lines = [
        f'# Robustness of {options.model}',
        '',
        f'{found.examples} images of {options.images}.',
        f'Radius {options.epsilon:g}/255 in {found.norm}, seed {options.seed}.',
        '',
        f'**Robust accuracy {100 * found.robust_accuracy:.2f} %**, the share that none of the attacks breaks (95 % '
        f'interval for another sample of as many images: {low:.1f} to {high:.1f}).',
        '',
        markdown_table(('attack', 'accuracy %', 'seconds'), rows),
        '',
        "AutoAttack's attacks in turn, each on the images that are still robust:",
        '',
        markdown_table(('attack', 'attacked', 'broken', 'accuracy after it %'), turns),
        '',
        *(f'**Warning:** {warning}.\n' for warning in found.warnings),
        f'The images that were found, evaluated again in other batches: {100 * found.ensemble.accuracy_again:.2f} %.',
    ]
    if found.ensemble.accuracy_rounded is not None:
        lines.append(f'Rounded to 8 bits: {100 * found.ensemble.accuracy_rounded:.2f} %.')
    return '\n'.join([*lines, '', f'    {" ".join(["convnorm attack", *argv[1:]])}'])


def _content(found, options):
    """What attack.json holds."""
    ensemble = {**dataclasses.asdict(dataclasses.replace(found.ensemble, images=None, robust=None))}
    return {
        'model': options.model,
        'images': options.images,
        'examples': found.examples,
        'norm': found.norm,
        'epsilon': options.epsilon,
        'seed': options.seed,
        'robust_accuracy': found.robust_accuracy,
        'interval': list(found.interval),
        'attacks': [{'name': name, 'accuracy': accuracy, 'seconds': s} for name, accuracy, s in found.rows],
        'autoattack': {name: value for name, value in ensemble.items() if value is not None},
        'warnings': found.warnings,
    }


def main() -> int:
    """The command, see `command_line.run_command`."""
    return command_line.run_command(lambda: run(sys.argv), __doc__)


if __name__ == '__main__':
    sys.exit(main())
