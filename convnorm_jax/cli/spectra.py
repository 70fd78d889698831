"""Measures the operator norm of each layer of trained nets, and compares the nets.

convnorm spectra --workdirs=runs/A,runs/B [--output=DIR] [--checkpoint=best|latest]

Prints a table of operator norms; writes spectra.json, spectra.md and spectra.png to --output
(by default runs/A/spectra). Measured, not certified: see convnorm_jax/evaluation/operators.py.
"""

import os
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from convnorm_jax.cli import command_line
from convnorm_jax.errors import UserError
from convnorm_jax.reports.tables import markdown_table

NOTE = 'measured, not certified: power iteration converges from below, in float32'
QUANTILES = {'min': 0.0, 'quantile_05': 0.05, 'median': 0.5, 'quantile_95': 0.95, 'max': 1.0}


def parse(argv: Sequence[str]) -> tuple[list[str], str, str]:
    """(workdirs, output, checkpoint) of a command line.

    Raises:
      UserError: a mistake of the user, in one line.
    """
    values = flags.FlagValues()  # not absl's global ones: these belong to this command only
    flags.DEFINE_list('workdirs', [], 'folders of runs', flag_values=values)
    flags.DEFINE_string('output', '', 'folder to write', flag_values=values)
    flags.DEFINE_enum('checkpoint', 'best', ['best', 'latest'], 'which checkpoint of each run', flag_values=values)
    command_line.parse_own(values, argv, '--workdirs=A,B --output=DIR --checkpoint=best|latest')
    workdirs = [os.path.normpath(os.path.expanduser(part)) for part in values.workdirs if part]
    if not workdirs or len(set(workdirs)) < len(workdirs):
        raise UserError(
            f'--workdirs={",".join(values.workdirs)}: expected folders of runs, separated by commas, each once'
        )
    return workdirs, os.path.expanduser(values.output) or os.path.join(workdirs[0], 'spectra'), values.checkpoint


def run() -> int:
    """One command, from `sys.argv`; returns the exit code. A user's mistake is raised as `UserError`."""
    workdirs, output, checkpoint = parse(sys.argv)
    # JAX is imported only now: a mistake on the command line is answered without it.
    from convnorm_jax.cli.compiled import keep_programs
    from convnorm_jax.files import write_json, write_text
    from convnorm_jax.plots.operators import MAX_RUNS, layer_operators
    from convnorm_jax.runs.workdir import has_checkpoints
    from convnorm_jax.training.config import run_config

    keep_programs()
    if len(workdirs) > MAX_RUNS:
        raise UserError(f'--workdirs: {len(workdirs)} runs; expected at most {MAX_RUNS}, which one plot can show')
    configs = [run_config(workdir) for workdir in workdirs]
    labels = _labels(workdirs, configs)
    try:
        os.makedirs(output, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f'--output={output}: cannot write there ({error.strerror}); give another folder') from error
    for workdir in workdirs:
        if not has_checkpoints(workdir):
            raise UserError(f'--workdirs={workdir}: no checkpoint there yet; train first, or leave it out')
    facts, operators = {}, {}
    try:
        for label, workdir, config in zip(labels, workdirs, configs):
            print(f'measuring {workdir} ({label})', file=sys.stderr, flush=True)
            facts[label], operators[label] = _measure(workdir, config, checkpoint)
    finally:  # also after an error or Ctrl-C: the runs that were measured are written
        if facts:
            table = _table(facts, operators)
            print(table)
            write_json(os.path.join(output, 'spectra.json'), _content(facts, operators))
            write_text(os.path.join(output, 'spectra.md'), table + '\n')
    bounds = {label: fact['product_bound'] for label, fact in facts.items()}
    layer_operators(operators, os.path.join(output, 'spectra.png'), title=_title(facts), bounds=bounds)
    for name in ('spectra.json', 'spectra.md', 'spectra.png'):
        print(f'wrote {os.path.join(output, name)}')
    return 0


def _labels(workdirs, configs):
    """The shortest of four ways to name the runs in which no two have the same name."""
    ways = (
        [config.model.layer for config in configs],
        [f'{config.model.name}, {config.model.layer}, seed {config.seed}' for config in configs],
        [os.path.basename(workdir) for workdir in workdirs],
        workdirs,
    )
    return next(labels for labels in ways if len(set(labels)) == len(labels))


def _measure(workdir, config, checkpoint):
    """(facts of a run, its layers' operators)."""
    from convnorm_jax.evaluation.operators import layer_operators, product_bound
    from convnorm_jax.training import setup
    from convnorm_jax.training.loop import restore_variables

    experiment = setup.build(config)
    variables, chosen, _ = restore_variables(experiment, workdir, checkpoint)
    operators = layer_operators(experiment.model, variables, experiment.input_shape)
    facts = {
        'workdir': workdir,
        'model': config.model.name,
        'layer': config.model.layer,
        'data': experiment.source.description,
        'algorithm': config.train.algorithm,
        'seed': config.seed,
        'checkpoint': checkpoint if chosen.best_rating is not None else 'latest',
        'checkpoint_step': chosen.step,
        'product_bound': product_bound(experiment.model, operators),
    }
    return facts, operators


def _content(facts, operators):
    """What spectra.json holds."""
    runs = {label: {**facts[label], 'layers': [_layer(o) for o in operators[label]]} for label in facts}
    return {'note': NOTE, 'runs': runs}


def _layer(operator):
    return {
        'name': operator.name,
        'kind': operator.kind,
        'picture': list(operator.input_shape),
        'output': list(operator.output_shape),
        'strides': list(operator.strides),
        'conv_norm': operator.conv_norm,
        'layer_norm': operator.layer_norm,
        'conv_circular': _quantiles(operator.conv_circular),
        'layer_circular': _quantiles(operator.layer_circular),
    }


def _quantiles(values):
    import numpy as np

    return None if values is None else {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


def _title(facts):
    """What all runs share."""
    shared = [{fact[key] for fact in facts.values()} for key in ('model', 'data', 'algorithm')]
    words = [next(iter(values)) if len(values) == 1 else '' for values in shared]
    words[2] = words[2] and f'{words[2]} training'
    return ', '.join(word for word in words if word)


def _table(facts, operators):
    """Operator norms as a Markdown table: a row for each layer, two columns for each run."""
    by_name = {label: {o.name: o for o in layers} for label, layers in operators.items()}
    names = list(dict.fromkeys(name for layers in by_name.values() for name in layers))
    head = ['layer', 'image', 'stride', *(f'{label}: {part}' for label in facts for part in ('conv', 'layer'))]
    rows = []
    for name in names:
        first = next(layers[name] for layers in by_name.values() if name in layers)
        cells = [name, 'x'.join(map(str, first.input_shape)), 'x'.join(map(str, first.strides))]
        for layers in by_name.values():
            found = layers.get(name)
            cells += [_number(found and found.conv_norm), _number(found and found.layer_norm)]
        rows.append(cells)
    bounds = [cell for fact in facts.values() for cell in ('', _number(fact['product_bound']))]
    rows.append(['product bound', '', '', *bounds])
    title = f'Operator norms of {_title(facts) or "the layers"}; {NOTE}.'
    return '\n'.join([title, '', markdown_table(head, rows, len(head)), '', *_notes(facts)])


def _number(value):
    return '-' if value is None else f'{value:.4g}'


def _notes(facts):
    runs = (
        f'- {label}: {fact["workdir"]}, {fact["model"]}, seed {fact["seed"]}, {fact["checkpoint"]} checkpoint '
        f'(step {fact["checkpoint_step"]})'
        for label, fact in facts.items()
    )
    return [
        *runs,
        '- conv: the convolution with its effective kernel (ConvNorm: with its preconditioner); layer: with its '
        'normalization at evaluation; -: not linear, or not in the net',
        '- product bound: on the distance of the logits of two normalized images, divided by that of the images (l2)',
    ]


def main() -> int:
    """The command, see `command_line.run_command`."""
    return command_line.run_command(run, __doc__)


if __name__ == '__main__':
    sys.exit(main())
