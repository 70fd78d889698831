"""Counts instructions, bytes and collectives in the text of a compiled program."""

import collections
import functools
import re

import numpy as np

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')

# Instructions that move no data: views, and control flow, whose bodies are counted instead.
_FREE = ('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'iota')
_FREE += ('after-all', 'partition-id', 'replica-id', 'opt-barrier')
_PARTIAL_READS = ('copy-start', 'slice-start', 'dynamic-slice-start')
_BITS = {'pred': 8, 'bf16': 16, 's4': 4, 'u4': 4}
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?')
_NAMES = re.compile(r'%([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BRANCHES = re.compile(r'(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))')

Instruction = collections.namedtuple('Instruction', 'name type operation operands attributes')
Moved = collections.namedtuple('Moved', 'bytes times operation name type')


def size(text, on_chip=True):
    """Bytes of the arrays in a type; without `on_chip` those in a TPU's on-chip memory (`S(1)`) do not count."""
    total = 0
    for name, shape, layout in _ARRAY.findall(text):
        bits = _BITS.get(name) or int((re.match(r'[a-z]+(\d+)', name) or [0, 0])[1])
        if on_chip or 'S(' not in layout:
            total += bits * int(np.prod([int(n) for n in shape.split(',') if n], dtype=np.int64)) // 8
    return total


class Program:
    """Counts of a compiled program's text.

    An instruction moves its operands and its result once; a fusion moves those of the whole fusion, and what a kernel
    keeps on the chip does not count. The body of a loop counts as often as it runs: by the compiler's
    `known_trip_count`, else by the constant in the loop's condition, because JAX's loops count from 0 by 1. A loop with
    neither, such as `jax.lax.while_loop` with data in its condition, counts once and is one of `unknown_loops`. For a
    conditional, the branch with the most bytes counts.

    Args:
      text: of HLO after compilation.
      on_chip: count bytes in a TPU's on-chip memory too.

    Attributes:
      moved: [Moved], one for each instruction, with the bytes of all its `times`.
      kernels: number of instructions that compute, in a loop as often as it runs.
      bytes: read and written, in all.
      bytes_once: the same with each loop's body counted once.
      collectives: {kind: number}, in a loop as often as it runs.
      unknown_loops: int.
    """

    def __init__(self, text, on_chip=True):
        self._computations, entry = _parse(text)
        self._size = functools.partial(size, on_chip=on_chip)
        self._times = collections.Counter()
        self.moved, self.unknown_loops = [], 0
        once = []
        self._walk(entry, 1, self.moved)
        times, self._times, unknown = self._times, collections.Counter(), self.unknown_loops
        self._walk(entry, 1, once, loops_once=True)
        self._times, self.unknown_loops = times, unknown
        self.kernels = sum(m.times for m in self.moved)
        self.bytes, self.bytes_once = (sum(m.bytes for m in found) for found in (self.moved, once))
        self.collectives = self._count_collectives()

    def largest(self, count):
        """The `count` instructions with the most bytes."""
        return sorted(self.moved, key=lambda m: -m.bytes)[:count]

    def _walk(self, name, times, moved, loops_once=False):
        """Adds what a computation moves when it runs `times` times."""
        self._times[name] += times
        types = {i.name: i.type for i in self._computations[name]}
        ends = {i.operands[0]: i.type for i in self._computations[name] if i.operation.endswith('-done')}
        for i in self._computations[name]:
            if i.operation == 'while':
                body = re.search(r'body=%?([\w.\-]+)', i.attributes)[1]
                trips = 1 if loops_once else self._trips(i)
                self._walk(body, times * trips, moved, loops_once)
            elif i.operation == 'conditional':
                branches = _NAMES.findall(' '.join(a + b for a, b in _BRANCHES.findall(i.attributes)))
                found = []
                for branch in branches:
                    found.append([])
                    self._walk(branch, times, found[-1], loops_once)
                moved += max(found, key=lambda f: sum(m.bytes for m in f))
            elif i.operation == 'call':
                self._walk(re.search(r'to_apply=%?([\w.\-]+)', i.attributes)[1], times, moved, loops_once)
            elif i.operation not in _FREE:
                moved.append(self._moved(i, types, ends, times))

    def _moved(self, i, types, ends, times):
        # The start of an asynchronous pair reads, its end writes; the start's type repeats its operands.
        read = sum(self._size(types.get(operand, '')) for operand in i.operands)
        if i.operation in _PARTIAL_READS:  # of a large array, only the slice that is read
            read = min(read, size(ends.get(i.name, '')))
        total = 0 if i.operation.endswith('-done') else read
        total += 0 if i.operation.endswith('-start') else self._size(i.type)
        target = re.search(r'custom_call_target="([^"]+)"', i.attributes)
        kind = i.operation + (f':{target[1]}' if target else '')
        return Moved(times * total, 0 if i.operation.endswith('-done') else times, kind, i.name, i.type)

    def _trips(self, loop):
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition = self._computations[re.search(r'condition=%?([\w.\-]+)', loop.attributes)[1]]
        constants = {i.name: i.attributes for i in condition if i.operation == 'constant'}
        compared = [i for i in condition if i.operation == 'compare' and 'direction=LT' in i.attributes]
        if len(compared) == 1 and compared[0].operands[-1] in constants:
            return int(re.match(r'\d+', constants[compared[0].operands[-1]])[0])
        self.unknown_loops += 1
        return 1

    def _count_collectives(self):
        found = collections.Counter()
        for name, instructions in self._computations.items():
            for i in instructions:
                kind = i.operation.removesuffix('-start')
                if kind in COLLECTIVES:
                    # Computations that are not reached are inside one instruction that wraps a collective.
                    found[kind] += self._times.get(name, 1)
        return dict(found)


def _parse(text):
    """({computation: [Instruction]}, name of the entry)."""
    computations, current, entry = {}, None, None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None:
            found = _INSTRUCTION.match(line)
            if found:
                name, kind, operation, rest = found.groups()
                arguments, _, attributes = rest.partition(')')
                if operation == 'constant':
                    attributes = rest
                operands = tuple(dict.fromkeys(_NAMES.findall(arguments)))
                current.append(Instruction(name, kind, operation, operands, attributes))
    if entry is None:
        raise ValueError('no ENTRY computation: expected the text of a compiled program')
    return computations, entry
