"""Runs commands with a mistake in them, and checks that each prints one line of error and changes no file.

    python -m benchmarks.malformed [--count=100] [--seed=0] [--jobs=2] [--kinds=KIND,...]

The mistakes are in the command line, in a config file, in the data, or in the run folder; see `KINDS` in
benchmarks/malformed_cases.py. Each command must print one `error: ` line and no traceback, exit with a nonzero code,
and leave every file of its data and of its run folder unchanged (except the lock, which belongs to no run).
Prints a table by kind, and every failure in full.
"""

import argparse
import concurrent.futures
import hashlib
import itertools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

from benchmarks import malformed_cases, warm

PATIENCE = 240  # seconds that a command may take
UNWATCHED = ('lock',)


def fingerprint(folder):
    """{path: its kind} of everything in a folder; for a file, a digest of its content."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob('*')):
        if path.name in UNWATCHED:
            continue
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else 'folder'
        found[str(path.relative_to(folder))] = content
    return found


def verdict(code, out, err, before, after):
    """The problem with how a command with a mistake ended; '' for none.

    Args:
      code: its exit code.
      out: its standard output.
      err: its standard error.
      before: `fingerprint` of its folder before the command.
      after: `fingerprint` of its folder after the command.
    """
    errors = [line for line in err.splitlines() if line.startswith('error: ')]
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    wrong = []
    if code in (0, None):
        wrong.append('it did not end' if code is None else 'exit code 0')
    if len(errors) != 1:
        wrong.append(f'{len(errors)} lines of error')
    if errors and len(errors[0]) < len('error: ') + 10:
        wrong.append('the error says nothing')
    if 'Traceback' in err + out:
        wrong.append('a traceback')
    if changed:
        wrong.append(f'changed {", ".join(changed[:5])}')
    return '; '.join(wrong)


def train_run(context, folder):
    """Trains the run that the cases damage copies of; returns its folder."""
    workdir, log = os.path.join(folder, 'trained'), os.path.join(folder, 'trained.log')
    process = warm.start(context, [*malformed_cases.TINY, f'--workdir={workdir}'], log)
    process.join()
    if process.exitcode:
        raise SystemExit(f'the run to damage could not be trained:\n{pathlib.Path(log).read_text()[-2000:]}')
    return workdir


def run_case(context, name, seed, trained, folder):
    """Runs one case; returns (its command, the problem or '', its output)."""
    place = pathlib.Path(folder)
    case = place / 'case'
    case.mkdir(parents=True)
    arguments = malformed_cases.KINDS[name](random.Random(seed), case, pathlib.Path(trained))
    before = fingerprint(case)
    out, err = place / 'out', place / 'err'
    process = warm.start(context, arguments, str(out), str(err))
    process.join(PATIENCE)
    code = process.exitcode
    if process.is_alive():
        process.kill()
        process.join()
    said = [path.read_text(errors='replace') if path.exists() else '' for path in (out, err)]
    wrong = verdict(code, *said, before, fingerprint(case))
    return arguments, wrong, said[1] + said[0]


def working_tree():
    """The state of the working tree by git; '' outside a repository."""
    return subprocess.run(['git', 'status', '--porcelain'], capture_output=True, text=True).stdout


def main():
    """Prints the table and every failure; exits with 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=2, help='commands at a time')
    parser.add_argument('--kinds', default=','.join(malformed_cases.KINDS))
    options = parser.parse_args()
    names = list(itertools.islice(itertools.cycle(options.kinds.split(',')), options.count))
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            'TFDS_DATA_DIR': os.path.join(folder, 'nothing'),
            'CONVNORM_CACHE': os.path.join(folder, 'cache'),
        }
        context = warm.prepare(os.path.join(folder, 'compiled'))
        trained = train_run(context, folder)
        at_work = working_tree()
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            found = list(
                pool.map(
                    lambda i: run_case(context, names[i], f'{options.seed} {i}', trained, f'{folder}/{i}'),
                    range(len(names)),
                )
            )
        shutil.rmtree(trained)
    failures = [(name, *case) for name, case in zip(names, found) if case[1]]
    print('| mistake | commands | one line and nothing changed |\n|---|---:|---:|')
    for name in dict.fromkeys(names):
        wrong = sum(failure[0] == name for failure in failures)
        print(f'| {name} | {names.count(name)} | {names.count(name) - wrong} |')
    print(f'| all | {len(names)} | {len(names) - len(failures)} |')
    for name, arguments, wrong, said in failures:
        print(f'\n{name}: {wrong}\n  {" ".join(arguments)}\n  ' + said.strip().replace('\n', '\n  '))
    if working_tree() != at_work:
        failures.append(None)
        print('\nthe working tree has changed')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
