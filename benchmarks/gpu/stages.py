"""The stages of the GPU plan, in order of value."""

import dataclasses

from benchmarks.gpu.plan import Stage

_TINY_RUN = {
    'model.name': 'simple_cnn',
    'data.subset_fraction': 0.02,
    'train.steps': 12,
    'eval.examples': 16,
    'eval.batch_size': 16,
    'eval.autoattack.steps': 2,
    'eval.autoattack.queries': 10,
    'eval.autoattack.targets': 2,
}
_SPEED, _GOLDEN = 'benchmarks.gpu.speed', 'benchmarks.gpu.golden'


def make_stages(options):
    """The stages of a command line; see `__main__`.

    Raises:
      SystemExit: one of --stages does not exist.
    """
    stages = {stage.name: stage for stage in _all(options)}
    names = [name for name in options.stages.split(',') if name] or list(stages)
    for name in names:
        if name not in stages:
            raise SystemExit(f'error: --stages={options.stages}: {name!r} is none of {", ".join(stages)}')
    return [stages[name] for name in names]


def _all(options):
    """Seconds are those expected of an H100 with 16 cores."""
    tiny = options.rehearsal
    net = 'simple_cnn' if tiny else 'resnet18'
    yield Stage('machine', 'the device and its rates', 'start', 25, f'{_SPEED}:machine_facts')
    given = {'net': net, 'dtype': 'bfloat16', 'batch_size': 2 if tiny else 128, 'repeats': 2 if tiny else 15}
    yield Stage('first', 'training step, each layer compiled alone', 'first', 90, f'{_SPEED}:first', given)
    yield _steps(net, tiny, 'bfloat16', 128)
    yield Stage('nets', 'golden nets', 'golden', 40, f'{_GOLDEN}:nets', {'files': ['simplecnn_attack']} if tiny else {})
    files = {'files': ['layer_a', 'layer_b']} if tiny else {}
    yield Stage('layers', 'golden layers', 'golden', 150, f'{_GOLDEN}:layers', files)
    sizes = {'size': 64, 'channels': 8} if tiny else {}
    yield Stage('products', 'the precision of products', 'products', 15, f'{_GOLDEN}:products', sizes)
    few_shapes = {'shapes': [[4, 8, 8, 2, 3], [4, 4, 8, 1, 3]]} if tiny else {}
    given = {**few_shapes, 'batch_size': 4 if tiny else 32}
    yield Stage('methods', 'methods against the most exact one', 'golden', 30, f'{_GOLDEN}:methods', given)
    for case in (('float32', 128), ('bfloat16', 512), ('float32', 512)):
        yield _steps(net, tiny, *case)
    exact = _steps(net, tiny, 'float32', 512)
    given = {**exact.options, 'precision': 'highest'}
    yield dataclasses.replace(exact, name='step_highest_512', title=f'{exact.title}, highest precision', options=given)
    for dtype in ('bfloat16', 'float32'):
        given = {'net': net, 'dtype': dtype, 'batch_size': 4 if tiny else 512, 'steps': 2 if tiny else 20}
        yield Stage(f'pgd_{dtype}', f'attack by PGD, {dtype}', 'step', 60, f'{_SPEED}:pgd', given)
    for dtype in ('float32', 'bfloat16'):
        given = {'dtype': dtype, 'batch_size': 2 if tiny else 64, 'width': 8 if tiny else 0}
        yield Stage(f'gan_{dtype}', f'step of a GAN, {dtype}', 'step', 60, f'{_SPEED}:gan', given)
    given = {'dtype': 'bfloat16', 'batch_size': 4 if tiny else 128}
    yield Stage('layer_table', 'layers, one by one', 'layers', 60, f'{_SPEED}:layer_table', {**given, **few_shapes})
    given = {'data': options.data, 'output': options.output, 'resume': options.resume}
    given.update({'overrides': _TINY_RUN, 'saving': 20.0} if tiny else {})
    title = 'the Free protocol on CIFAR-10: training in pieces, then FGSM, PGD-20, AutoAttack'
    yield Stage('free', title, 'free', 120, 'benchmarks.gpu.free:run', given, takes_what_is_left=True)


def _steps(net, tiny, dtype, batch_size):
    batch, repeats = (batch_size // 64, 2) if tiny else (batch_size, 9)
    given = {'net': net, 'dtype': dtype, 'batch_size': batch, 'methods': batch_size == 128, 'repeats': repeats}
    title = f'training step and inference of {net}, {dtype}, batch {batch}'
    return Stage(f'step_{dtype}_{batch_size}', title, 'step', 80 if batch_size == 128 else 60, f'{_SPEED}:steps', given)
