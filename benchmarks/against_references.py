"""Compares this package's attacks with those of other libraries on one trained net.

    python -m benchmarks.against_references --workdir=RUN [--examples=200] [--epsilon=8] [--attacks=fgsm,...]
        [--batch_size=50] [--seeds=5] [--output=FILE.json] [--autoattack=CHECKOUT]

RUN is a folder of `convnorm_jax.cli.run` with a simple_cnn whose layer is convnorm or batchnorm. Its
weights are copied to torch, and the logits of both nets must agree to 1e-4. Each attack runs on its own,
from the clean images. The other libraries, all with the same numbers of iterations, are
torchattacks, foolbox (FGSM and PGD) and, if --autoattack gives a checkout of
https://github.com/fra31/auto-attack, the reference implementation of AutoAttack.

An example counts as broken if the attacked net predicts another class than its label for
an image within [0, 1] and epsilon. A random start changes the count by one or two, so figures are means
over seeds (FGSM and FAB-T draw nothing). The exit code is 1 if an attack here leaves, on average,
more than one example in 200 more robust than the best other library.

Seconds are wall-clock, on all cores, one library after the other. Ours are those of later calls
with the same shapes, which compile nothing of the attack; the column "first call" is the extra time of
the first call. Needs torch, torchattacks and foolbox.
"""

import argparse
import sys
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import machine
from benchmarks.library_attacks import PGD_STEPS, QUERIES, STEPS, TARGETS, import_libraries
from convnorm_jax import attacks
from convnorm_jax.configs import default
from convnorm_jax.configs.keys import flatten
from convnorm_jax.errors import UserError
from convnorm_jax.files import write_json
from convnorm_jax.runs.workdir import load_config
from convnorm_jax.training import setup
from convnorm_jax.training.config import check_config
from convnorm_jax.training.loop import restore_variables

ATTACKS = ('fgsm', 'pgd', 'apgd-ce', 'apgd-dlr', 'apgd-t', 'fab-t', 'square', 'autoattack')
DETERMINISTIC = ('fgsm', 'fab-t')
LIBRARIES = ('torchattacks', 'foolbox', 'reference')

LOGITS_AGREE = 1e-4
ROUNDING = 1e-4  # of a point on the ball's surface, relative to epsilon


def main():
    """Prints a line for each attack and library, then the table; returns the exit code."""
    options = parse_options()
    try:
        packages = import_libraries(options.autoattack, machine.cores())
        problem = Problem(options)
    except UserError as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    rows = []
    report = {**facts(options, problem), 'rows': rows}
    for name in options.attacks:
        rows.append({'attack': name, 'ours': attack_ours(name, problem)})
        note(name, 'ours', rows[-1]['ours'], problem)
        for library, attack in packages.items():
            found = attack_theirs(attack, name, problem)
            if found:
                rows[-1][library] = found
                note(name, library, found, problem)
        add_difference(rows[-1])
        if options.output:  # after each attack, because a run may take hours
            write_json(options.output, report)
    print(table(report))
    return 0 if all(row['above'] <= problem.count / 200 for row in rows) else 1


def parse_options():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--examples', type=int, default=200, help='the first so many of the test set')
    parser.add_argument('--epsilon', type=float, default=8.0, help='in 1/255')
    parser.add_argument('--attacks', default=','.join(ATTACKS), help='some of them, by commas')
    parser.add_argument('--batch_size', type=int, default=50, help='of our ensemble')
    parser.add_argument('--seeds', type=int, default=5, help='runs of each attack that draws random numbers')
    parser.add_argument('--output', help='a JSON file')
    parser.add_argument('--autoattack', help='folder with a checkout of fra31/auto-attack')
    options = parser.parse_args()
    options.attacks = [name for name in options.attacks.split(',') if name]
    unknown = sorted(set(options.attacks) - set(ATTACKS))
    if unknown:
        parser.error(f'--attacks: {unknown[0]!r}, expected some of {", ".join(ATTACKS)}')
    return options


class Problem:
    """The net in both libraries, and the images to attack.

    Attributes:
      logits_fn: ours, a `jax.tree_util.Partial`.
      net: torch's.
      torch_images, torch_labels: the images and labels for torch.
      images: float32 [N, H, W, C].
      labels: int32 [N].
      epsilon: in units of pixels in [0, 1].
      clean: bool [N], whether classified correctly.
      count: N.
    """

    def __init__(self, options):
        import torch

        from benchmarks.torch_nets import carry_over

        self.torch, self.options = torch, options
        self.experiment = load_run(options.workdir)
        config, source = self.experiment.config, self.experiment.source
        variables, self.checkpoint, _ = restore_variables(self.experiment, options.workdir, config.eval.checkpoint)
        self.logits_fn = jax.tree_util.Partial(self.experiment.evaluator.logits_fn, variables)
        self.net = carry_over(self.experiment.model, jax.device_get(variables), source.mean, source.std)
        test = self.experiment.prepared.test
        self.count, self.epsilon = min(options.examples, len(test.labels)), options.epsilon / 255
        self.images = test.images[: self.count].astype(np.float32) / 255
        self.labels = test.labels[: self.count].astype(np.int32)
        self.torch_images = self.to_torch(self.images)
        self.torch_labels = torch.tensor(self.labels, dtype=torch.int64)
        self._predict = jax.jit(lambda f, x: f(x))
        self._check_logits()
        self.clean = self.ours_predict(self.images) == self.labels

    def seeds(self, name):
        """Seeds of the runs of an attack; one that draws nothing runs once."""
        return range(1 if name in DETERMINISTIC else self.options.seeds)

    def to_torch(self, images):
        """Converts NumPy [N, H, W, C] to torch [N, C, H, W]."""
        return self.torch.tensor(np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2)))

    def ours_predict(self, images):
        """Predicted classes of our net."""
        return np.asarray(self._predict(self.logits_fn, images)).argmax(-1)

    def robust(self, images, predicted):
        """bool [N]: whether `images` (NHWC, NumPy) leave the prediction right."""
        distance = np.abs(images - self.images).reshape(self.count, -1).max(-1)
        inside = (distance <= self.epsilon * (1 + ROUNDING)) & ((images >= 0) & (images <= 1)).all((1, 2, 3))
        return self.clean & ~((predicted != self.labels) & inside)

    def torch_logits(self, images):
        """Logits of torch's net for torch images: NumPy [N, K]."""
        with self.torch.no_grad():
            return self.net(images).numpy()

    def _check_logits(self):
        noise = np.random.default_rng(0).uniform(-self.epsilon, self.epsilon, self.images.shape)
        for images in (self.images, np.clip(self.images + noise, 0, 1).astype(np.float32)):
            ours = np.asarray(self._predict(self.logits_fn, images))
            off = np.abs(ours - self.torch_logits(self.to_torch(images))).max()
            if not off <= LOGITS_AGREE:
                raise SystemExit(f'FAILED: the logits of the two nets differ by {off:.3g}, expected {LOGITS_AGREE}')
        print(f'logits agree to {off:.1e} (largest {np.abs(ours).max():.1f})', flush=True)


def load_run(workdir):
    """Loads the `Experiment` of a run.

    Raises:
      ValueError: no run there, or a net that cannot be copied to torch.
    """
    config = default.get_config()  # adds the keys that are newer than the run
    with config.ignore_type():
        config.update(ConfigDict(load_config(workdir)))
    check_config(config)
    wanted = {'model.name': ('simple_cnn',), 'model.layer': ('convnorm', 'batchnorm')}
    wanted |= {'model.activation': ('relu',), 'model.dtype': ('float32',), 'model.convnorm.spectrum': ('running',)}
    given = flatten(config)
    for key, expected in wanted.items():
        if given[key] not in expected:
            raise ValueError(f'--workdir={workdir}: {key}={given[key]}, expected {" or ".join(expected)}')
    return setup.build(config)


def attack_ours(name, problem):
    """Runs one attack of this package; see `measured`."""
    attack = (ours_gradient if name in ('fgsm', 'pgd') else ours_ensemble)(name, problem)
    seeds = problem.seeds(name)
    start = time.perf_counter()
    attack(seeds[0])
    first = time.perf_counter() - start
    found = measured([(problem.robust(x, problem.ours_predict(x)), seconds) for x, seconds in map(attack, seeds)])
    return {**found, 'seconds_first_call': first - found['seconds']}


def ours_gradient(name, problem):
    """Makes seed -> (adversarial images, seconds) for FGSM or PGD."""

    def attack(logits_fn, images, labels, key):
        if name == 'fgsm':
            return attacks.fgsm(logits_fn, images, labels, epsilon=problem.epsilon)
        ball = {'epsilon': problem.epsilon, 'step_size': problem.epsilon / 4}
        return attacks.pgd(logits_fn, images, labels, steps=PGD_STEPS, rng=key, **ball)

    program = jax.jit(attack)

    def timed(seed):
        start = time.perf_counter()
        images = np.asarray(program(problem.logits_fn, problem.images, problem.labels, jax.random.key(seed)))
        return images, time.perf_counter() - start

    return timed


def ours_ensemble(name, problem):
    """Makes seed -> (adversarial images, seconds) for members of the ensemble."""

    def timed(seed):
        result = attacks.run_ensemble(
            problem.logits_fn,
            problem.images,
            problem.labels,
            epsilon=problem.epsilon,
            rng=jax.random.key(seed),
            attacks=attacks.STANDARD if name == 'autoattack' else (name,),
            batch_size=min(problem.options.batch_size, problem.count),
            steps=STEPS,
            queries=QUERIES,
            targets=TARGETS,
            log=lambda line: None,
        )
        # Its own clock leaves out the checks before the first attack, which each call compiles again.
        return result.images, sum(part['seconds'] for part in result.attacks)

    return timed


def attack_theirs(attack, name, problem):
    """Runs one attack of another library; returns None if it has none of that name."""
    runs = []
    for seed in problem.seeds(name):
        problem.torch.manual_seed(seed)
        start = time.perf_counter()
        images = attack(name, problem, seed)
        seconds = time.perf_counter() - start
        if images is None:
            return None
        robust = problem.robust(images.numpy().transpose(0, 2, 3, 1), problem.torch_logits(images).argmax(-1))
        runs.append((robust, seconds))
    return measured(runs)


def measured(runs):
    """Summarizes the runs of an attack: means over the seeds, and how many examples each seed left robust.

    Args:
      runs: (robust bool [N], seconds) of each seed.
    """
    return {
        'robust': float(np.mean([robust.sum() for robust, _ in runs])),
        'robust_accuracy': float(np.mean([robust.mean() for robust, _ in runs])),
        'robust_of_each_seed': [int(robust.sum()) for robust, _ in runs],
        'seconds': float(np.mean([seconds for _, seconds in runs])),
    }


def note(name, library, found, problem):
    """Prints one line of a result."""
    counts = ', '.join(map(str, found['robust_of_each_seed']))
    print(f'{name:<10} {library:<12} robust {counts} of {problem.count} {found["seconds"]:8.1f} s', flush=True)


def facts(options, problem):
    """The settings that determine the figures."""
    config = problem.experiment.config
    return {
        'command': ' '.join(['python -m benchmarks.against_references', *sys.argv[1:]]),
        'net': f'{config.model.name}, {config.model.layer}, {config.train.algorithm} training, '
        f'step {problem.checkpoint.step}',
        'data': f'{problem.experiment.source.description}, first {problem.count} test examples',
        'epsilon': options.epsilon,
        'clean': int(problem.clean.sum()),
        'examples': problem.count,
        'seeds': options.seeds,
        'gradient_seconds': gradient_seconds(problem),
        'machine': machine.description(),
        'versions': machine.versions('jax', 'jaxlib', 'torch', 'torchattacks', 'foolbox'),
    }


def gradient_seconds(problem):
    """{'ours', 'torch'}: least seconds of ten gradients with respect to all images, a lower bound for attacks."""

    def total(f, x):
        return attacks.attack_loss(f(x), problem.labels, 'cross_entropy').sum()

    ours = jax.jit(jax.grad(total, argnums=1))

    def theirs():
        images = problem.torch_images.clone().requires_grad_()
        loss = problem.torch.nn.functional.cross_entropy(problem.net(images), problem.torch_labels, reduction='sum')
        problem.torch.autograd.grad(loss, [images])

    def least(function):
        function()
        return min(seconds(function) for _ in range(10))

    return {'ours': least(lambda: np.asarray(ours(problem.logits_fn, problem.images))), 'torch': least(theirs)}


def seconds(function):
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def add_difference(row):
    """Adds 'above': our robust examples minus the fewest of another library (means over seeds)."""
    row['above'] = row['ours']['robust'] - min(row[name]['robust'] for name in LIBRARIES if name in row)


def table(report):
    """The results as Markdown, below the settings."""
    columns = [name for name in LIBRARIES if any(name in row for row in report['rows'])]
    head = ['attack', 'ours %', *(f'{name} %' for name in columns), 'examples above the lowest']
    head += ['ours s', 'first call s', *(f'{name} s' for name in columns)]
    lines = [head, ['---'] * len(head)]
    for row in report['rows']:
        theirs = [row.get(name) for name in columns]
        lines.append(
            [
                row['attack'],
                f'{100 * row["ours"]["robust_accuracy"]:.1f}',
                *(f'{100 * found["robust_accuracy"]:.1f}' if found else '' for found in theirs),
                f'{row["above"]:+.1f}',
                f'{row["ours"]["seconds"]:.2f}',
                f'{row["ours"]["seconds_first_call"]:.1f}',
                *(f'{found["seconds"]:.2f}' if found else '' for found in theirs),
            ]
        )
    words = [
        f'{report["net"]}; {report["data"]}; epsilon {report["epsilon"]:g}/255; '
        f'clean {100 * report["clean"] / report["examples"]:.1f} %; means of {report["seeds"]} seeds',
        f'{report["machine"]}; ' + ', '.join(f'{name} {version}' for name, version in report['versions'].items()),
        'one gradient by all images: ours {ours:.4f} s, torch {torch:.4f} s'.format(**report['gradient_seconds']),
        report['command'],
    ]
    return '\n'.join(['', *words, '', *(f'| {" | ".join(line)} |' for line in lines)])


if __name__ == '__main__':
    sys.exit(main())
