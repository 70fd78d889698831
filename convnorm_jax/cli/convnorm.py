"""Train, evaluate and compare nets with ConvNorm.

    convnorm COMMAND [--OPTION=VALUE ...]

train    train a net and report on it:     convnorm train --config=digits_convnorm
eval     evaluate a trained net:           convnorm eval --workdir=DIR --config.attack.pgd_steps=20
attack   robustness of your own net:       convnorm attack --model=FILE.py:FUNCTION --images=FILE.npz
sweep    a grid of settings and seeds:     convnorm sweep --config=digits_convnorm --workdir=DIR --seeds=0,1,2
paper    the paper's claims, with intervals: convnorm paper --claims=noise --data_dir=DIR
spectra  operator norms of trained nets:   convnorm spectra --workdirs=A,B --output=DIR
export   a trained net as one file:        convnorm export --workdir=DIR --out=net.exported

`convnorm COMMAND --help` says what a command takes. `python -m experiments.main --config=configs/NAME.py` in a clone
is `convnorm train --config=NAME`.
"""

import importlib
import sys

from convnorm_jax.version import __version__

# Command: (its module, what it adds to the command line).
COMMANDS = {
    'train': ('run', ('--mode=train',)),
    'eval': ('run', ('--mode=eval',)),
    'attack': ('attack', ()),
    'sweep': ('sweep', ()),
    'paper': ('paper', ()),
    'spectra': ('spectra', ()),
    'export': ('export', ()),
}


def main() -> int:
    """Runs a command from `sys.argv`; returns the exit code."""
    command, *arguments = sys.argv[1:] or ['--help']
    if command.lstrip('-') in ('help', 'h'):
        print(__doc__.strip())
        return 0
    if command.lstrip('-') == 'version':
        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f'error: {command!r}: no such command; expected one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    name, added = COMMANDS[command]
    sys.argv = [f'convnorm {command}', *added, *arguments]
    try:
        module = importlib.import_module(f'convnorm_jax.cli.{name}')
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] == 'convnorm_jax':
            raise
        print(
            f"error: {error.name} is not installed, and the commands need it: pip install 'convnorm_jax[experiments]'",
            file=sys.stderr,
        )
        return 2
    return module.main()


if __name__ == '__main__':
    sys.exit(main())
