"""Packs everything that `python -m benchmarks.gpu` needs on a machine without a network.

    python -m benchmarks.pack_gpu [--data=../shared/data/tfds] [--folder=.gpu] [--resume=DIR] [--minutes=9]

Makes a folder that git must ignore (echo /.gpu/ >>.git/info/exclude). It holds the wheels of packages that the machine
lacks, and CIFAR-10 as JPEG without the header that all its images share, a third of their bytes. On the machine the
data is unpacked as the official archive's folder, so that TFDS and array_record are not needed. --resume adds the
checkpoint that an earlier run of the plan left in DIR. Prints the sizes and the command, for a machine with limits of
64 MiB for the working tree and 2000 characters for the command.
"""

import argparse
import os
import shutil
import subprocess
import sys

from benchmarks.gpu import packed_data, packed_state

# Packages of requirements.txt that the plan imports and the machine's image lacks.
WHEELS = ('ml_collections', 'tensorboardX')
PYTHON, PLATFORMS = '3.12', tuple(f'manylinux{p}_x86_64' for p in ('_2_28', '_2_27', '_2_17', '2014', '1'))
MOST_BYTES, MOST_CHARACTERS = 64 << 20, 2000


def main():
    """Packs, and prints how to use it."""
    options = _options()
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    _download(os.path.join(folder, 'wheels'))
    packed_data.pack(options.data, os.path.join(folder, 'cifar10.npz'))
    if options.resume:
        packed_state.copy(options.resume, os.path.join(folder, 'resume'))
    total = _print_sizes(folder)
    if total > MOST_BYTES:
        raise SystemExit(f'error: {total / 1e6:.1f} MB: expected at most {MOST_BYTES / 1e6:.1f} with the tracked files')
    command = make_command(options)
    if len(command) > MOST_CHARACTERS:
        raise SystemExit(f'error: the command has {len(command)} characters: expected at most {MOST_CHARACTERS}')
    ignored = subprocess.run(['git', 'check-ignore', '-q', folder], check=False).returncode == 0
    if not ignored:
        print(f'\nnot ignored by git yet: echo /{folder}/ >>"$(git rev-parse --git-common-dir)/info/exclude"')
    print(f'\ncarry: ["{folder}"]\ntimeout_s: {timeout(options.minutes)}\ncommand:\n{command}')


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--data', default=os.path.join('..', 'shared', 'data', 'tfds'), help='holds cifar10 as TFDS does'
    )
    parser.add_argument('--folder', default='.gpu', help='of this checkout; made again')
    parser.add_argument('--resume', default='', metavar='DIR', help='the --output of an earlier run of the plan')
    parser.add_argument('--minutes', type=float, default=9.0)
    parser.add_argument('--stages', default='', help="the plan's")
    return parser.parse_args()


def _download(folder):
    platforms = [f'--platform={platform}' for platform in PLATFORMS]
    target = ['--no-deps', '--only-binary=:all:', f'--python-version={PYTHON}', '--implementation=cp', *platforms]
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--disable-pip-version-check', *target, '-d', folder]
    subprocess.run([*command, *WHEELS], check=True)


def _print_sizes(folder):
    """Prints the sizes of what is sent; returns their sum in bytes."""
    listed = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], check=True, stdout=subprocess.PIPE
    )
    tracked = [name for name in listed.stdout.decode().split('\0') if name and os.path.isfile(name)]
    tracked = [name for name in tracked if not name.startswith(f'{folder}/')]
    sizes = {'the working tree': sum(map(os.path.getsize, tracked))}
    for where, _, names in os.walk(folder):
        sizes.update({os.path.join(where, name): os.path.getsize(os.path.join(where, name)) for name in sorted(names)})
    total = sum(sizes.values())
    for name, size in {**sizes, 'in all': total, 'at most': MOST_BYTES}.items():
        print(f'{size / 1e6:8.2f} MB  {name}')
    return total


def make_command(options):
    """The command that the machine runs in the root of the working tree; its results come back from $OUT."""
    resume = f' --resume={options.folder}/resume' if options.resume else ''
    stages = f' --stages={options.stages}' if options.stages else ''
    return (
        f'python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site '
        f'{options.folder}/wheels/*.whl && export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 || exit; '
        f'nvidia-smi -L; python3 -m benchmarks.gpu --minutes={options.minutes:g} --output=$OUT '
        f'--data={options.folder}/cifar10.npz{resume}{stages}'
    )


def timeout(minutes):
    """Seconds for the command: those of the plan, plus a minute before and after it, at most 10 minutes."""
    return min(600, round(60 * minutes + 50))


if __name__ == '__main__':
    main()
