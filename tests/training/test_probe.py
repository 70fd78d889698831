"""The validation of adversarial training under PGD: what it is, what it chooses, and the collapse it warns of."""

import functools

import jax
import numpy as np
import pytest

from convnorm_jax import attacks
from convnorm_jax.reports import classifier as report
from convnorm_jax.runs.metrics import read_rows
from convnorm_jax.runs.progress import Progress
from convnorm_jax.training import classification, loop

pytestmark = pytest.mark.usefixtures('quick_compilation')

FAST = {'train.algorithm': 'fast', 'train.adversarial.epsilon': 16.0, 'train.adversarial.probe_examples': 20}


@pytest.fixture(scope='module')
def trained(tiny_experiment, tmp_path_factory):
    """(experiment, folder, progress at its end)"""
    experiment, workdir = tiny_experiment(FAST), tmp_path_factory.mktemp('runs') / 'run'
    return experiment, workdir, loop.train(experiment, workdir)


def test_it_is_the_accuracy_under_pgd_of_the_first_validation_examples(trained):
    experiment, workdir, progress = trained
    rows = read_rows(workdir / 'metrics.csv')
    variables, *_ = loop.restore_variables(experiment, workdir, 'latest')
    validation = experiment.prepared.validation
    images, labels = validation.images[:20].astype(np.float32) / 255, validation.labels[:20]
    logits_fn = functools.partial(experiment.evaluator.logits_fn, variables)
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(np.arange(20))
    found = attacks.pgd(logits_fn, images, labels, epsilon=16 / 255, step_size=4 / 255, steps=10, rng=keys)
    expected = (np.asarray(logits_fn(found)).argmax(-1) == labels).mean()
    assert rows[-1]['validation_pgd_accuracy'] == pytest.approx(expected, abs=0.051)  # one image may be on the edge
    assert progress.rating == rows[-1]['validation_pgd_accuracy'] <= rows[-1]['validation_accuracy'] + 0.2


def test_it_chooses_the_checkpoint(trained):
    _, workdir, progress = trained
    rows = read_rows(workdir / 'metrics.csv')
    assert progress.best_rating == max(row['validation_pgd_accuracy'] for row in rows)


@pytest.mark.parametrize('overrides', [{'train.algorithm': 'clean'}, {**FAST, 'train.adversarial.probe_examples': 0},
                                       {**FAST, 'data.validation_fraction': 0.0}])  # fmt: skip
def test_without_it_the_clean_accuracy_chooses(tiny_experiment, overrides):
    experiment = tiny_experiment(overrides)
    assert experiment.probed is None and experiment.columns == classification.COLUMNS
    assert experiment.rating({'validation_accuracy': 0.4}) == 0.4


def test_more_examples_than_there_are_is_all_of_them(tiny_experiment):
    experiment = tiny_experiment({**FAST, 'train.adversarial.probe_examples': 10_000})
    assert len(experiment.probed['labels']) == len(experiment.prepared.validation.labels)


def test_the_warning(trained):
    experiment = trained[0]
    best = Progress(step=9, best_step=4, best_rating=0.6)
    words = experiment.warning({'validation_pgd_accuracy': 0.05, 'validation_accuracy': 0.9}, best)
    assert 'fell from 60.0 % (step 4) to 5.0 %: catastrophic overfitting' in words and 'eval.checkpoint=best' in words
    for found, progress in (
        ({'validation_pgd_accuracy': 0.31}, best),
        ({'validation_pgd_accuracy': 0.0}, Progress()),
        ({'validation_accuracy': 0.0}, best),
        ({'validation_pgd_accuracy': 0.02}, Progress(best_step=4, best_rating=0.12)),  # chance
    ):
        assert experiment.warning(found, progress) == ''


def test_the_result_says_what_chose_and_what_was_last(trained, capsys):
    experiment, workdir, progress = trained
    experiment.config.plots = False
    result = report.report(experiment, str(workdir))
    assert result['best_validation_pgd_accuracy'] == progress.best_rating or result['checkpoint'] == 'latest'
    assert result['last_validation_pgd_accuracy'] == progress.rating and 'best_validation_accuracy' not in result
    assert 'catastrophic' not in capsys.readouterr().out


def test_the_report_warns_of_a_collapse():
    figures = {'best_validation_pgd_accuracy': 0.6, 'last_validation_pgd_accuracy': 0.1}
    (line,) = report._collapse({**figures, 'checkpoint': 'latest'}, 10)
    assert 'was 60.0 % at best, and 10.0 % in the last epoch' in line and 'config.eval.checkpoint=best' in line
    assert 'config.eval' not in report._collapse({**figures, 'checkpoint': 'best'}, 10)[0]
    assert report._collapse({**figures, 'last_validation_pgd_accuracy': 0.5, 'checkpoint': 'best'}, 10) == []
    assert report._collapse({'best_validation_accuracy': 0.9, 'checkpoint': 'best'}, 10) == []
