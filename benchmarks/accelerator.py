"""Compiles the package's programs for a GPU and a TPU on a machine that has neither, and counts what they do.

    pip install -e '.[aot]'
    python -m benchmarks.accelerator [--targets=h100,v5e] [--chips=1] [--nets=resnet18] [--layers=convnorm,batchnorm]
        [--what=step,attack,gan,discriminator,inference] [--batch_size=128] [--dtypes=bfloat16] [--size=32] [--width=0]
        [--method=] [--top=0] [--save=FOLDER] [--output=FILE.json]

'step' is the step of the training loop: uint8 images, crop and flip, one SGD update, the state donated. 'attack' is
PGD-10 from a random start with the final prediction, 'inference' the logits of uint8 images. 'gan' is a step of
SNGAN (or of the GANs in --nets) by configs/cifar10_gan_convnorm.py with one update of the discriminator;
'discriminator' is that update alone. Width 0 is the net's own width; the batch size is that of one chip. Images above
64 pixels use ResNet's stem for ImageNet and 1000 classes. --chips (1, 4, 16, 64, 256) is for v5e; an H100 is one chip.

Each program is compiled in a process of its own. A program is 'aborted' if its compiler ended the process and 'failed'
if it raised an error. The table shows this, the other programs are compiled, and the command exits with 1. Ratios are
to 'batchnorm' (convolution and BatchNorm) in the same run. The only times here are the seconds to trace and compile.
Bytes are those of one chip. For the H100 they are counted here (`benchmarks.hlo`): operands and results of each
instruction, once for a fusion, and for a loop's body as often as it runs. For the v5e they are its compiler's estimate,
scaled for loops. --top shows the instructions with the most bytes; --save keeps the compiled text of each program.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys

import jax

from benchmarks import aot, timing
from convnorm_jax.models import GANS

BASE = 'batchnorm'
_RATIOS = ('bytes', 'kernels', 'temporary_bytes')


def main():
    """Prints the table, and writes it to --output."""
    jax.config.update('jax_platforms', 'cpu')
    options = _options()
    if options.child:
        case, text_file = json.loads(options.child)
        print(json.dumps(aot.compile_case(aot.Case(*case), text_file)))
        return
    for target in options.targets:
        if aot.missing(target):
            raise SystemExit(f"--targets={target}: {aot.missing(target)} is not installed; pip install -e '.[aot]'")
    if options.save:
        os.makedirs(options.save, exist_ok=True)
    rows = []
    for case in _cases(options):
        rows.append({**case._asdict(), **compile_apart(case, options.save)})
        _say(rows[-1], options.top)
    _add_ratios(rows)
    print(f'\njax {jax.__version__}; of one chip; ratios to {BASE}')
    timing.print_table([_cells(row) for row in rows])
    packages = [name for target in options.targets for name in aot.PACKAGES[target]]
    timing.save(options, None, rows, *packages)
    bad = sum(row['status'] != 'compiled' for row in rows)
    if bad:
        raise SystemExit(f'{bad} of {len(rows)} programs did not compile')


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--targets', type=_known(aot.TARGETS), default='h100,v5e')
    parser.add_argument('--chips', type=timing.numbers, default='1', help=f'of v5e: {", ".join(map(str, aot.V5E))}')
    parser.add_argument('--nets', type=timing.names, default='resnet18')
    parser.add_argument('--layers', type=timing.names, default='convnorm,batchnorm')
    parser.add_argument('--what', type=_known(aot.PROGRAMS), default='step')
    parser.add_argument('--batch_size', type=int, default=128, help='of one chip')
    parser.add_argument('--dtypes', type=timing.names, default='bfloat16')
    parser.add_argument('--size', type=int, default=32, help='of the images')
    parser.add_argument('--width', type=int, default=0)
    parser.add_argument('--method', help='of ConvNorm')
    parser.add_argument('--top', type=int, default=0, help='instructions with the most bytes')
    parser.add_argument('--save', metavar='FOLDER', help='of the compiled texts')
    parser.add_argument('--output', help='a JSON file')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if set(options.chips) - set(aot.V5E):
        parser.error(f'argument --chips: expected some of {", ".join(map(str, aot.V5E))}')
    return options


def _known(allowed):
    """Makes an option's type: names separated by commas, all of them in `allowed`."""

    def parse(text):
        names = timing.names(text)
        if not names or set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f'{text!r}: expected some of {", ".join(allowed)}')
        return names

    return parse


def _cases(options):
    """The programs to compile, with those that are compared next to each other."""
    of_gans = [net for net in options.nets if net in GANS] or ['sngan']
    classifiers = [net for net in options.nets if net not in GANS] or ['resnet18']
    rest = options.batch_size, options.size, options.width or None, options.method
    return [
        aot.Case(target, chips, net, layer, what, dtype, *rest)
        for target in options.targets
        for chips in (options.chips if target == 'v5e' else [1])
        for what in options.what
        for net in (of_gans if what in aot.GAN_PROGRAMS else classifiers)
        for dtype in options.dtypes
        for layer in options.layers
    ]


def compile_apart(case, folder=None):
    """Compiles a case by `aot.compile_case` in a process of its own.

    Args:
      folder: for the compiled text, or None.

    Returns:
      The result of `aot.compile_case` with 'status': 'compiled', 'aborted' (the compiler ended the process) or
      'failed' (an error was raised). The last two have a 'message'.
    """
    text_file = os.path.abspath(os.path.join(folder, _file_name(case))) if folder else None
    command = [sys.executable, '-m', 'benchmarks.accelerator', f'--child={json.dumps([case, text_file])}']
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
    # Without the cache: a program that is loaded from it was not compiled in this run.
    environment = {**os.environ, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode == 0:
        return {'status': 'compiled', **json.loads(done.stdout.splitlines()[-1])}
    return {'status': 'aborted' if done.returncode < 0 else 'failed', 'message': _reason(done)}


def _reason(done):
    """The most informative line of a process's errors."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r'F\d{4} |.*Check failed', line)]
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f'{name}: {fatal[0] if fatal else " ".join(lines[-1:])}'
    errors = [line for line in lines if re.match(r'[\w.]+(Error|Exception|Exit)\b', line)]
    return (errors or lines or [f'exit status {done.returncode}'])[-1]


def _file_name(case):
    return '_'.join(str(part) for part in case if part) + '.hlo'


def _say(row, top):
    """Prints one line of a program as soon as it is compiled, and its largest instructions."""
    head = f'{row["target"]} x{row["chips"]} {row["net"]} {row["layer"]} {row["what"]} {row["dtype"]}: {row["status"]}'
    if row['status'] != 'compiled':
        print(f'{head}: {row["message"]}', flush=True)
        return
    print(f'{head} in {row["compile_seconds"]:.0f} s, {row["bytes"] / 1e9:.2f} GB', flush=True)
    for size, times, operation, name, kind in row['largest'][:top]:
        print(f'  {size / 1e6:9.1f} MB  {times:4} x {operation:36} {name:40} {kind[:90]}', flush=True)


def _add_ratios(rows):
    """Adds ratios to the base layer of the same target, net and program."""
    same = [name for name in aot.Case._fields if name not in ('layer', 'method')]
    bases = {tuple(row[name] for name in same): row for row in rows if row['layer'] == BASE}
    for row in rows:
        base = bases.get(tuple(row[name] for name in same), {})
        row.update({f'{name}_ratio': timing.ratio(row.get(name), base.get(name)) for name in _RATIOS})


def _cells(row):
    """{column: cell}"""
    scaled = lambda name, unit: row[name] / unit if name in row else None
    found = {'target': f'{row["target"]} x{row["chips"]}', 'net': row['net'], 'what': row['what']}
    collectives = ', '.join(f'{number} {kind}' for kind, number in sorted(row.get('collectives', {}).items()))
    return {
        **found,
        'layer': row['layer'],
        'dtype': row['dtype'],
        'GB': scaled('bytes', 1e9) if row['status'] == 'compiled' else row['status'],
        'ratio': row['bytes_ratio'],
        'kernels': row.get('kernels'),
        'ratio of kernels': row['kernels_ratio'],
        'temporary MB': scaled('temporary_bytes', 1e6),
        'ratio of temporary': row['temporary_bytes_ratio'],
        'collectives': collectives,
        'compile s': row.get('compile_seconds'),
    }


if __name__ == '__main__':
    main()
