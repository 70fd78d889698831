"""The record of runs, and what is said of them."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from convnorm_jax.errors import UserError
from convnorm_jax.paper.record import Record
from convnorm_jax.paper.study import RATE, Study, cells, tuning_cells
from convnorm_jax.paper.summary import AT_CHOSEN, OVER_RATES, as_dict, summarize

NOISES = (0.0, 0.4)
STUDY = Study(
    'noise',
    'label noise',
    'digits_convnorm',
    {'train.steps': 3},
    {'ConvNorm': {'model.layer': 'convnorm'}, 'BatchNorm': {'model.layer': 'batchnorm'}},
    {'data.label_noise.rate': NOISES},
    rates=(0.1, 0.01),
)
RATES = {'ConvNorm': 0.1, 'BatchNorm': 0.01}


def tuned(record, study=STUDY, rates=RATES):
    for cell in tuning_cells(study):
        record.add(cell, {study.chosen_by: 0.9 if rates[cell.arm] == cell.rate else 0.5}, 1.0, '1')


def accuracy(arm, noise, seed):
    """ConvNorm is better by 10 points, give or take 0.1, with noise, and by nothing, give or take 1, without."""
    gain = (0.10 + 0.001 * (seed - 1) if noise else 0.01 * (seed - 1)) if arm == 'ConvNorm' else 0.0
    return 0.5 + 0.05 * seed + gain


@pytest.fixture
def record(tmp_path):
    record = Record(tmp_path / 'noise.json')
    tuned(record)
    for cell in cells(STUDY, RATES, [0, 1, 2]):
        figure = accuracy(cell.arm, cell.settings['data.label_noise.rate'], cell.seed)
        record.add(cell, {'test_accuracy': figure, 'device': 'x', 'other': 1}, 2.0, '1')
    return record


def test_a_file_gives_the_record_back(record, tmp_path):
    record.write({'claim': 'noise'})
    content = json.loads((tmp_path / 'noise.json').read_text())
    assert content['claim'] == 'noise' and len(content['runs']) == 4 + 12
    again = Record(tmp_path / 'noise.json')
    cell = next(cells(STUDY, RATES, [2]))
    assert again.find(cell) == record.find(cell)
    assert again.find(cell)['result'] == {'test_accuracy': accuracy('ConvNorm', 0, 2), 'device': 'x'}
    assert again.hours() == pytest.approx((4 * 1 + 12 * 2) / 3600) and again.fact(STUDY, 'device') == 'x'
    assert as_dict(summarize(STUDY, again, [0, 1, 2])) == as_dict(summarize(STUDY, record, [0, 1, 2]))


@pytest.mark.parametrize('text', ['', '{', '[]', '{"runs": [{}]}', '{"runs": 3}'])
def test_a_file_that_is_none_of_ours(tmp_path, text):
    (tmp_path / 'noise.json').write_text(text)
    with pytest.raises(UserError, match=r'noise\.json: is not a file of results'):
        Record(tmp_path / 'noise.json')


def test_means_and_differences(record):
    summary = summarize(STUDY, record, [0, 1, 2])
    assert [column.name for column in summary.columns] == ['0', '0.4'] and summary.rates == RATES
    assert not summary.missing and not summary.waiting
    values = 100 * np.array([[accuracy(arm, 0.4, seed) for seed in range(3)] for arm in STUDY.arms])
    found = summary.mean('test_accuracy', 'ConvNorm', summary.columns[1])
    assert (found.mean, found.deviation) == (pytest.approx(values[0].mean()), pytest.approx(values[0].std(ddof=1)))
    difference = summary.difference('test_accuracy', 'BatchNorm', summary.columns[1])
    expected = stats.ttest_rel(*values).confidence_interval(0.95)
    np.testing.assert_allclose([difference.low, difference.high], expected, rtol=1e-9)


def test_the_sentence_is_what_the_intervals_allow(record):
    sentence = summarize(STUDY, record, [0, 1, 2]).sentence('test_accuracy', 'BatchNorm')
    assert sentence == 'ConvNorm is better than BatchNorm at 0.4 and not separated from BatchNorm at 0 (n=3).'
    one = summarize(STUDY, record, [0]).sentence('test_accuracy', 'BatchNorm')
    assert one == 'ConvNorm and BatchNorm: fewer than two seeds of both.'


def test_of_scores_the_lower_is_the_better(tmp_path):
    study = Study(
        'gan', 'GANs', 'digits_gan', {}, {'A': {'model.layer': 'convnorm'}, 'B': {}},
        figures=('fid_classifier',), lower_is_better=True,
    )  # fmt: skip
    record = Record(tmp_path / 'gan.json')
    for cell in cells(study, {'A': None, 'B': None}, [0, 1, 2]):
        record.add(cell, {'fid_classifier': 1 + 0.01 * cell.seed + (cell.arm == 'B') * (2 + 0.02 * cell.seed)}, 1, '1')
    assert summarize(study, record, [0, 1, 2]).sentence('fid_classifier', 'B') == 'A is better than B (n=3).'


def test_what_was_not_run_is_missing(tmp_path):
    record = Record(tmp_path / 'noise.json')
    summary = summarize(STUDY, record, [0, 1])
    assert (len(summary.missing), summary.waiting) == (4, 8)  # rates first: the other runs wait for them
    tuned(record)
    summary = summarize(STUDY, record, [0, 1])
    assert (len(summary.missing), summary.waiting) == (8, 0)
    assert summary.mean('test_accuracy', 'ConvNorm', summary.columns[0]) is None


def test_a_run_that_diverged_is_counted_and_not_averaged(record):
    cell = next(cells(STUDY, RATES, [0]))
    record.add(cell, None, 1.0, '1')
    summary = summarize(STUDY, record, [0, 1, 2])
    assert summary.diverged == {('ConvNorm', '0'): 1} and not summary.missing
    assert summary.mean('test_accuracy', 'ConvNorm', summary.columns[0]).count == 2
    assert summary.difference('test_accuracy', 'BatchNorm', summary.columns[0]).count == 2


def test_a_study_over_rates_says_what_holds_at_the_chosen_one_and_over_all(tmp_path):
    rates = (0.01, 0.1, 1.0)
    study = Study(
        'rates', 'rates', 'digits_convnorm', {}, {'A': {'model.layer': 'convnorm'}, 'B': {'model.layer': 'batchnorm'}},
        {RATE: rates}, rates=rates,
    )  # fmt: skip
    record = Record(tmp_path / 'training.json')
    tuned(record, study, {'A': 0.1, 'B': 0.01})
    for cell in cells(study, {}, [0, 1]):
        record.add(cell, {'test_accuracy': cell.settings[RATE] / 10 + 0.01 * cell.seed}, 1, '1')
    summary = summarize(study, record, [0, 1])
    assert [column.name for column in summary.columns] == ['0.01', '0.1', '1', AT_CHOSEN, OVER_RATES]
    chosen, over = summary.columns[3:]
    assert summary.mean('test_accuracy', 'A', chosen).mean == pytest.approx(100 * (0.01 + 0.005))
    assert summary.mean('test_accuracy', 'B', chosen).mean == pytest.approx(100 * (0.001 + 0.005))
    assert summary.mean('test_accuracy', 'B', over).mean == pytest.approx(100 * (0.037 + 0.005))
    assert not summary.missing and not summary.waiting


def test_measures_are_related_over_the_arms(tmp_path):
    arms = {name: {'model.layer': name} for name in ('convnorm', 'batchnorm', 'oni', 'own')}
    study = Study(
        'free', 'Free', 'digits_free_adversarial', {}, arms, figures=('pgd_accuracy',), measures=('largest_conv_norm',)
    )  # fmt: skip
    record = Record(tmp_path / 'robust.json')
    norms, accuracies = [1.0, 9.0, 4.0, 2.0], [0.5, 0.1, 0.3, 0.2]
    for cell in cells(study, dict.fromkeys(arms), [0, 1]):
        place = list(arms).index(cell.arm)
        record.add(cell, {'pgd_accuracy': accuracies[place], 'largest_conv_norm': norms[place] + cell.seed}, 1, '1')
    relation = summarize(study, record, [0, 1]).relation('largest_conv_norm')
    assert (relation.correlation, relation.count) == (pytest.approx(stats.spearmanr(norms, accuracies).statistic), 4)
    assert not math.isnan(relation.p_value)
