"""The validation of adversarial training under PGD: what it is, what it chooses, and the collapse it warns of."""

import functools

import jax
import numpy as np
import pytest

from convnorm_jax import attacks
from convnorm_jax.configs import digits_fast_adversarial
from convnorm_jax.reports import classifier as report
from convnorm_jax.runs.metrics import read_rows
from convnorm_jax.runs.progress import Progress
from convnorm_jax.training import classification, loop, setup

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


def row(attacked, trained=0.5):
    return {'validation_pgd_accuracy': attacked, 'validation_accuracy': 0.9, 'train_accuracy': trained}


def test_the_warning_of_a_collapse(trained):
    experiment = trained[0]
    best = Progress(step=9, best_step=4, best_rating=0.6)
    words = experiment.warning(row(0.05), best)
    assert 'fell from 60.0 % (step 4) to 5.0 %: catastrophic overfitting' in words and 'eval.checkpoint=best' in words
    assert experiment.warning(row(0.31), best) == ''
    assert experiment.warning({'validation_accuracy': 0.0, 'train_accuracy': 0.9}, best) == ''
    assert experiment.warning(row(0.02, 0.1), Progress(best_step=4, best_rating=0.12)) == ''  # chance


def test_the_warning_of_a_net_that_was_never_robust(trained, tiny_experiment):
    words = trained[0].warning(row(0.02, 0.8), Progress())
    assert 'is 2.0 %, under the attack of the training 80.0 %: catastrophic overfitting. The net is not robust' in words
    assert trained[0].warning(row(0.3, 0.8), Progress()) == ''
    trades = tiny_experiment({**FAST, 'train.algorithm': 'trades'})  # its training accuracy is that of clean images
    assert trades.warning(row(0.02, 0.8), Progress()) == ''


@pytest.mark.slow
def test_catastrophic_overfitting_is_seen(tmp_path, capsys):
    """Fast training with a large radius, provoked: FGSM's images are learned, PGD breaks everything."""
    config = digits_fast_adversarial.get_config()
    config.model.layer = 'batchnorm'
    config.data.augmentation = 'none'
    config.train.adversarial.epsilon, config.train.adversarial.step_size = 96.0, 192.0
    config.train.epochs = 16.0
    config.schedule.kind = 'constant'
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.1, 0.0
    loop.train(setup.build(config, jax.devices()[:1]), tmp_path / 'run')
    last = read_rows(tmp_path / 'run' / 'metrics.csv')[-1]
    assert last['train_accuracy'] > 0.4 and last['validation_accuracy'] > 0.7
    assert last['validation_pgd_accuracy'] < 0.1
    assert 'catastrophic overfitting' in capsys.readouterr().err


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
