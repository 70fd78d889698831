"""Exports a run's net as one file that runs without this project's code, and checks the file against the net.

convnorm export --workdir=DIR --out=FILE [--platforms=cpu,cuda,tpu]
    [--weights=FILE.safetensors] [--checkpoint=best|latest]

convnorm_jax.load_exported(FILE) loads the file. A classifier's takes images in [0, 1] and returns logits; a GAN's takes
latents and returns images; any batch size. ConvNorm layers are folded for the run's image size. By default the
checkpoint of the evaluation is exported, with averaged parameters if the run has them. FILE is written only if its
outputs equal those of the net. --weights also writes the variables and the config as safetensors.
"""

import os
import sys
import time
import typing
from collections.abc import Sequence

from absl import flags

from convnorm_jax.cli import command_line
from convnorm_jax.errors import UserError
from convnorm_jax.reports.tables import markdown_table

# The file and the net are compared on so many test images, or latents.
EXAMPLES = 256

# Largest difference, relative to the largest output. Folding changes the order of products, which matters more in low
# precision; accelerators use that for float32 too.
TOLERANCE, TOLERANCE_IN_LOW_PRECISION = 1e-4, 5e-2

# Seconds for which a program is timed.
TIMED = 0.5


def parse(argv: Sequence[str]) -> 'Options':
    """The options of a command line.

    Raises:
      UserError: a mistake of the user, in one line.
    """
    values = flags.FlagValues()  # not absl's global ones: these belong to this command only
    flags.DEFINE_string('workdir', '', 'folder of the run', flag_values=values)
    flags.DEFINE_string('out', '', 'file to write', flag_values=values)
    flags.DEFINE_list('platforms', ['cpu', 'cuda', 'tpu'], 'that it is to run on', flag_values=values)
    flags.DEFINE_string('weights', '', 'safetensors file to write', flag_values=values)
    flags.DEFINE_enum('checkpoint', '', ['', 'best', 'latest'], 'which checkpoint', flag_values=values)
    options = '--workdir=DIR --out=FILE --platforms=cpu,cuda,tpu --weights=FILE --checkpoint=best|latest'
    command_line.parse_own(values, argv, options)
    for name, what in (('workdir', 'the folder of a run'), ('out', 'the file to write')):
        if not values[name].value:
            raise UserError(f'--{name} is missing: give {what}')
    paths = {name: os.path.expanduser(values[name].value or '') for name in ('workdir', 'out', 'weights')}
    if os.path.abspath(paths['weights']) == os.path.abspath(paths['out']):
        raise UserError(f'--weights={paths["weights"]}: is --out as well; give two files')
    return Options(**paths, platforms=values.platforms, checkpoint=values.checkpoint)


class Options(typing.NamedTuple):
    """The options of the command; `checkpoint` is '' for the one of the config."""

    workdir: str
    out: str
    weights: str
    platforms: list[str]
    checkpoint: str


def run() -> int:
    """One command, from `sys.argv`; returns the exit code. A user's mistake is raised as `UserError`."""
    options = parse(sys.argv)
    # JAX is imported only now: a mistake on the command line is answered without it.
    from convnorm_jax import weights
    from convnorm_jax.cli.compiled import keep_programs
    from convnorm_jax.exported import save, serialization
    from convnorm_jax.files import check_place
    from convnorm_jax.runs.workdir import has_checkpoints
    from convnorm_jax.training.config import run_config

    keep_programs()
    save.check_platforms(options.platforms, '--platforms')
    serialization.check_installed()
    check_place(options.out, '--out')
    if options.weights:
        weights.check_installed()
        check_place(options.weights, '--weights')
    config = run_config(options.workdir)
    if not has_checkpoints(options.workdir):
        raise UserError(f'--workdir={options.workdir}: no checkpoint there yet; train first')
    _export(options, config)
    return 0


def _export(options, config):
    """Checks the file, writes it, and prints what it is."""
    from convnorm_jax.exported.load import load_exported
    from convnorm_jax.files import replacing
    from convnorm_jax.training import setup
    from convnorm_jax.training.loop import restore_variables
    from convnorm_jax.weights import save_weights

    experiment = setup.build(config)
    which = options.checkpoint or config.eval.checkpoint
    variables, chosen, _ = restore_variables(experiment, options.workdir, which)
    net = _generator(experiment) if config.train.algorithm == 'gan' else _classifier(experiment)
    with replacing(options.out) as unchecked:
        net.save(unchecked, variables, platforms=options.platforms, config=config.to_dict())
        size = os.path.getsize(unchecked)
        exported = load_exported(unchecked)
        facts = _compare(net, variables, exported, _tolerance(config))
    if options.weights:
        save_weights(options.weights, variables, config.to_dict())
    print(_table(options, config, f'{which} (step {chosen.step})', exported, size, facts))
    for path in filter(None, (options.out, options.weights)):
        print(f'wrote {path}')


class _Net(typing.NamedTuple):
    """What is exported: `apply(variables, *inputs)`, inputs to compare on, `save(path, variables, **options)`."""

    apply: typing.Callable
    inputs: tuple
    save: typing.Callable


def _classifier(experiment):
    import numpy as np

    from convnorm_jax.exported.save import save_exported

    source = experiment.source
    pixels = np.asarray(experiment.prepared.test.images[:EXAMPLES], np.float32) / 255
    save = lambda path, variables, **options: save_exported(
        path, experiment.model, variables, experiment.input_shape, mean=source.mean, std=source.std, **options
    )
    return _Net(experiment.evaluator.logits_fn, (pixels,), save)


def _generator(experiment):
    from convnorm_jax.exported.save import save_exported_generator

    sampler = experiment.sampler
    z, labels = sampler.grid(experiment.config.seed, 10, -(-EXAMPLES // 10))
    save = lambda path, variables, **options: save_exported_generator(
        path, experiment.generator, variables, sampler.latent, num_classes=sampler.num_classes, **options
    )
    apply = lambda variables, z, labels=None: sampler.sample_fn(variables, z, labels)
    return _Net(apply, (z,) if labels is None else (z, labels), save)


def _tolerance(config):
    from convnorm_jax.exported.load import platform

    exact = platform() == 'cpu' and config.model.dtype == 'float32'
    return TOLERANCE if exact else TOLERANCE_IN_LOW_PRECISION


def _compare(net, variables, exported, tolerance):
    """{'difference', 'largest'} of the outputs, {'net', 'exported'}: examples per second. Raises if they differ."""
    import jax
    import numpy as np

    original = jax.jit(net.apply)
    expected, found = original(variables, *net.inputs), exported(*net.inputs)
    expected, found = (np.asarray(array, np.float32) for array in (expected, found))
    if not np.isfinite(expected).all():
        raise UserError(
            'the outputs of the net are not finite at this checkpoint: training diverged; export another one'
        )
    one = np.asarray(exported(*(array[:1] for array in net.inputs)), np.float32)  # another batch size
    difference = float(max(np.abs(found - expected).max(), np.abs(one - expected[:1]).max()))
    largest = float(np.abs(expected).max())
    if not difference <= tolerance * largest:
        raise RuntimeError(
            f'the exported net differs from the net by {difference:.3g}, whose largest output is {largest:.3g}; '
            f'expected a relative difference of at most {tolerance:.0e}; nothing was written'
        )
    return {
        'difference': difference,
        'largest': largest,
        'net': _rate(lambda: original(variables, *net.inputs), len(found)),
        'exported': _rate(lambda: exported(*net.inputs), len(found)),
    }


def _rate(call, examples):
    """Examples per second of a compiled program."""
    import jax

    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < TIMED:
        jax.block_until_ready(call())
        calls += 1
    return calls * examples / (time.perf_counter() - start)


def _table(options, config, checkpoint, exported, size, facts):
    inputs, outputs = (
        ', '.join(f'{about["name"]} {about["dtype"]} [{", ".join(["B", *map(str, about["shape"])])}]' for about in part)
        for part in (exported.inputs, exported.outputs)
    )
    rows = [
        ('net', f'{config.model.name} with {config.model.layer}{", folded" if exported.folded else ""}'),
        ('checkpoint', checkpoint),
        ('takes', inputs),
        ('gives', outputs),
        ('platforms', ', '.join(exported.platforms)),
        ('parameters', f'{exported.parameters:,}'),
        ('size', f'{size / 1e6:.2f} MB'),
        ('largest difference from the net', f'{facts["difference"]:.2g} (of outputs up to {facts["largest"]:.3g})'),
        ('net, measured once', f'{facts["net"]:.0f} images/s'),
        ('exported, measured once', f'{facts["exported"]:.0f} images/s'),
    ]
    return markdown_table(('exported net', options.out), rows, 2)


def main() -> int:
    """The command, see `command_line.run_command`."""
    return command_line.run_command(run, __doc__)


if __name__ == '__main__':
    sys.exit(main())
