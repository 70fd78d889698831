"""Measures on a GPU what matters most, in the minutes that there are.

    python -m benchmarks.gpu --minutes=9 --output=DIR [--stages=NAME,...] [--resume=DIR] [--data=FILE] [--rehearsal]

Stages in order of value; each is saved when it ends, and what it had found when it is stopped. Those that do not fit
into the time that is left are left out, and named. DIR holds results.json, table.txt and log.txt, and the parts of
the checkpoint of the run that the last stage trains, for --resume the next time. benchmarks/pack_gpu.py makes what a
bare machine needs: FILE is CIFAR-10 as it packs it. --rehearsal is for a CPU: all of it with tiny nets and few steps.
"""

import argparse
import json
import os
import sys
import tempfile
import time

from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import make_stages
from benchmarks.gpu.worker import Worker


def main():
    """Measures, and says what was left out."""
    options, start = _options(), time.monotonic()
    stages = make_stages(options)
    os.makedirs(options.output, exist_ok=True)
    results = _Results(options)
    plan = Plan(stages, 60 * options.minutes)
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(options.output, 'log.txt'), 'w') as log:
        worker = Worker(log, _environment(folder))
        try:
            for stage in plan:
                _do(stage, plan, worker, results)
        finally:
            worker.kill()
    results.leave_out(plan.left_out)
    results.say(f'\n{time.monotonic() - start:.0f} s in all')
    return int(any(stage['error'] for stage in results.stages))


def _do(stage, plan, worker, results):
    limit, begun = plan.limit(stage), time.monotonic()
    expected = f'{plan.estimate(stage):.0f} s expected, {plan.remaining():.0f} s left'
    results.begin(stage, expected)
    given = {**stage.options, **({'seconds': limit} if stage.takes_what_is_left else {})}
    failure = worker.run(stage.run, given, limit, results.hear)
    seconds = time.monotonic() - begun
    plan.note(stage, seconds)
    results.end(seconds, failure)


def _environment(folder):
    """Of the worker: programs are kept for those after it; memory is taken as it is needed."""
    return {
        'PYTHONUNBUFFERED': '1',
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'JAX_COMPILATION_CACHE_DIR': folder,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
        'TF_CPP_MIN_LOG_LEVEL': os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1'),
    }


class _Results:
    """What was found: a JSON file and a text that grow, and the same text on standard output.

    Attributes:
      stages: one dict for each that was begun.
    """

    def __init__(self, options):
        self._folder, self.stages = options.output, []
        self._found = {'options': vars(options), 'stages': self.stages, 'left_out': []}
        self._text = open(os.path.join(options.output, 'table.txt'), 'w')  # noqa: SIM115

    def begin(self, stage, expected):
        self.stages.append({'stage': stage.name, 'title': stage.title, 'rows': [], 'seconds': None, 'error': ''})
        self.say(f'\n## {stage.name}: {stage.title} ({expected})\n')

    def hear(self, message):
        if 'line' in message:
            self.say(message['line'])
        else:
            self.stages[-1]['rows'].append(message['row'])
            self._save()

    def end(self, seconds, failure):
        self.stages[-1].update(seconds=seconds, error=failure)
        self.say(f'\n{seconds:.0f} s' + (f', FAILED: {failure}' if failure else ''))
        self._save()

    def leave_out(self, left_out):
        for stage, estimate, left in left_out:
            self._found['left_out'].append({'stage': stage.name, 'estimate': estimate, 'seconds_left': left})
            self.say(f'\nLEFT OUT: {stage.name}: {stage.title} ({estimate:.0f} s expected, {left:.0f} s were left)')
        self._save()

    def say(self, line):
        print(line, flush=True)
        print(line, file=self._text, flush=True)

    def _save(self):
        path = os.path.join(self._folder, 'results.json')
        with open(f'{path}.new', 'w') as file:
            json.dump(self._found, file, indent=1, default=str)
        os.replace(f'{path}.new', path)


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--minutes', type=float, default=9.0)
    parser.add_argument('--output', required=True, metavar='DIR')
    parser.add_argument('--stages', default='', help='some of them by commas, in this order')
    parser.add_argument('--resume', default='', metavar='DIR', help='the --output of an earlier run')
    parser.add_argument('--data', default='', metavar='FILE', help='CIFAR-10 as benchmarks/pack_gpu.py packs it')
    parser.add_argument('--rehearsal', action='store_true')
    return parser.parse_args()


if __name__ == '__main__':
    sys.exit(main())
