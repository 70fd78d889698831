"""The stages of the GPU plan, in order of value."""

from benchmarks.gpu.plan import Stage

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
    files = {'files': ['layer_a', 'layer_b']} if tiny else {}
    yield Stage('layers', 'golden layers', 'golden', 45, f'{_GOLDEN}:layers', files)
    yield Stage('nets', 'golden nets', 'golden', 40, f'{_GOLDEN}:nets', {'files': ['simplecnn_attack']} if tiny else {})
    yield from _steps(net, tiny, ('bfloat16', 128), ('float32', 128))
    sizes = {'size': 64, 'channels': 8} if tiny else {}
    yield Stage('products', 'the precision of products', 'products', 15, f'{_GOLDEN}:products', sizes)
    yield from _steps(net, tiny, ('bfloat16', 512))
    few = {'shapes': [[4, 8, 8, 2, 3]], 'batch_size': 4} if tiny else {}
    yield Stage('methods', 'methods against the most exact one', 'golden', 30, f'{_GOLDEN}:methods', few)
    yield from _steps(net, tiny, ('float32', 512))


def _steps(net, tiny, *cases):
    for dtype, batch_size in cases:
        batch, repeats = (batch_size // 64, 2) if tiny else (batch_size, 9)
        given = {'net': net, 'dtype': dtype, 'batch_size': batch, 'repeats': repeats}
        title = f'training step and inference of {net}, {dtype}, batch {batch}'
        yield Stage(f'step_{dtype}_{batch_size}', title, 'step', 80, f'{_SPEED}:steps', given)
