"""Attacks of other libraries on a torch net, each with the settings of ours in `against_references`."""

import os
import sys

from convnorm_jax.attacks import STANDARD

PGD_STEPS = 20  # of a quarter of epsilon
STEPS, QUERIES, TARGETS = 100, 5000, 9  # AutoAttack's: of APGD and FAB, of Square, of targeted attacks
BATCH = 250  # AutoAttack's default


def import_libraries(checkout, threads):
    """Imports the libraries to compare with.

    Args:
      checkout: folder of https://github.com/fra31/auto-attack, or None.
      threads: of torch.

    Returns:
      {library: function (name, problem, seed) -> adversarial torch images [N, C, H, W], or None if it has no such
      attack}; `problem` is an `against_references.Problem`.

    Raises:
      ValueError: a library that is not installed.
    """
    try:
        import foolbox
        import torch
        import torchattacks
    except ImportError as error:
        raise ValueError(f'{error}; pip install torch torchattacks foolbox') from error
    torch.set_num_threads(threads)
    libraries = {
        'torchattacks': lambda name, problem, seed: _in_batches(
            _torchattacks(torchattacks, name, problem, seed), problem
        ),
        'foolbox': lambda name, problem, seed: _in_batches(_foolbox(foolbox, name, problem), problem),
    }
    if checkout:
        if not os.path.isfile(os.path.join(checkout, 'autoattack', 'autoattack.py')):
            raise ValueError(f'--autoattack={checkout}: no autoattack/autoattack.py there')
        sys.path.insert(0, os.path.abspath(checkout))
        from autoattack import AutoAttack

        libraries['reference'] = lambda name, problem, seed: _reference(AutoAttack, name, problem, seed)
    return libraries


def _in_batches(attack, problem):
    """Runs a library's attack, (images, labels) -> images, on all examples."""
    if attack is None:
        return None
    batches = zip(problem.torch_images.split(BATCH), problem.torch_labels.split(BATCH))
    return problem.torch.cat([attack(images, labels).detach() for images, labels in batches])


def _torchattacks(library, name, problem, seed):
    net, ball = problem.net, {'eps': problem.epsilon}
    seeded = {**ball, 'seed': seed}
    make = {
        'fgsm': lambda: library.FGSM(net, **ball),
        'pgd': lambda: library.PGD(net, alpha=problem.epsilon / 4, steps=PGD_STEPS, **ball),
        'apgd-ce': lambda: library.APGD(net, steps=STEPS, loss='ce', **seeded),
        'apgd-dlr': lambda: library.APGD(net, steps=STEPS, loss='dlr', **seeded),
        'apgd-t': lambda: library.APGDT(net, steps=STEPS, n_classes=TARGETS + 1, **seeded),
        'fab-t': lambda: library.FAB(net, steps=STEPS, multi_targeted=True, n_classes=TARGETS + 1, **seeded),
        'square': lambda: library.Square(net, n_queries=QUERIES, **seeded),
    }
    if name == 'autoattack':
        # Its own AutoAttack takes 10 steps of APGD and FAB; here the same attacks take 100.
        return library.MultiAttack([make[part]() for part in STANDARD])
    return make[name]()


def _foolbox(library, name, problem):
    make = {
        'fgsm': lambda: library.attacks.LinfFastGradientAttack(),
        'pgd': lambda: library.attacks.LinfPGD(abs_stepsize=problem.epsilon / 4, steps=PGD_STEPS),
    }
    if name not in make:
        return None
    net, attack = library.PyTorchModel(problem.net, bounds=(0, 1)), make[name]()
    return lambda images, labels: attack(net, images, labels, epsilons=problem.epsilon)[1]


def _reference(library, name, problem, seed):
    if name in ('fgsm', 'pgd'):
        return None
    common = {'norm': 'Linf', 'eps': problem.epsilon, 'seed': seed, 'device': 'cpu', 'verbose': False}
    if name == 'autoattack':
        runner = library(problem.net, version='standard', **common)
    else:
        runner = library(problem.net, version='custom', attacks_to_run=[name], **common)
        runner.apgd.n_restarts = 1  # as in the standard version, and here
    return runner.run_standard_evaluation(problem.torch_images, problem.torch_labels, bs=BATCH)
