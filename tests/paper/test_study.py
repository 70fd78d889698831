"""Studies: their runs, the choice of the learning rate, and that every run of the paper is a possible one."""

import pytest

from convnorm_jax.cli.command_line import read_config
from convnorm_jax.configs.keys import flatten
from convnorm_jax.paper import claims
from convnorm_jax.paper.study import RATE, Study, cells, chosen_rates, tuning_cells
from tests.selection import few

STUDY = Study(
    'a',
    'a study',
    'digits_convnorm',
    {'train.steps': 3, 'plots': False, 'data.label_noise.kind': 'symmetric'},
    {'ConvNorm': {'model.layer': 'convnorm'}, 'spectral norm': {'model.layer': 'spectralnorm'}},
    {'data.label_noise.rate': (0.0, 0.4)},
    rates=(0.1, 0.01),
    tuned_at={'data.label_noise.rate': 0.4},
)


def test_the_runs_of_a_study():
    found = list(cells(STUDY, {'ConvNorm': 0.1, 'spectral norm': 0.01}, [0, 5]))
    assert len(found) == 8 and len({cell.folder for cell in found}) == 8
    assert [cell.seed for cell in found] == [0] * 4 + [5] * 4  # the first seed of everything first
    assert found[1].folder == 'a/spectral-norm,rate=0,rate=0.01,seed=0'
    config = flatten(read_config(found[3].arguments))
    assert (config['model.layer'], config['data.label_noise.rate'], config[RATE]) == ('spectralnorm', 0.4, 0.01)
    assert (config['train.steps'], config['plots'], config['seed']) == (3, False, 0)


def test_the_runs_that_choose_a_rate():
    found = tuning_cells(STUDY)
    assert [(cell.arm, cell.rate) for cell in found[:2]] == [('ConvNorm', 0.1), ('spectral norm', 0.1)]
    assert len(found) == 4 and {cell.seed for cell in found} == {100}
    assert '--config.data.label_noise.rate=0.4' in found[0].arguments
    assert not {cell.folder for cell in found} & {cell.folder for cell in cells(STUDY, {'ConvNorm': 0.1}, [100])}


def test_the_best_rate_is_chosen_when_all_were_tried():
    found = {('ConvNorm', 0.1): 0.5, ('ConvNorm', 0.01): 0.6, ('spectral norm', 0.1): 0.9}
    assert chosen_rates(STUDY, found) == {'ConvNorm': 0.01}
    found['spectral norm', 0.01] = None  # it diverged
    assert chosen_rates(STUDY, found) == {'ConvNorm': 0.01, 'spectral norm': 0.1}
    found['spectral norm', 0.1] = None
    assert chosen_rates(STUDY, found) == {'ConvNorm': 0.01}


def test_where_lower_is_better_the_lowest_is_chosen():
    study = Study('a', 'a', 'digits_gan', {}, {'A': {}}, rates=(1.0, 2.0), lower_is_better=True)
    assert chosen_rates(study, {('A', 1.0): 3.0, ('A', 2.0): 4.0}) == {'A': 1.0}


def test_without_rates_all_arms_have_that_of_the_config():
    study = Study('a', 'a', 'digits_convnorm', {}, {'A': {}, 'B': {}})
    assert chosen_rates(study, {}) == {'A': None, 'B': None}
    assert all(RATE not in ' '.join(cell.arguments) for cell in cells(study, {'A': None, 'B': None}, [0]))


@pytest.mark.parametrize('scale', few(claims.SCALES, 'small'))
@pytest.mark.parametrize('claim', claims.CLAIMS)
def test_every_run_of_the_paper_is_possible(claim, scale):
    folders = []
    for study in claims.studies(claim, scale):
        rates = dict.fromkeys(study.arms, study.rates[0] if study.rates else None)
        runs = [*tuning_cells(study), *cells(study, rates, [0, 1])]
        folders += [run.folder for run in runs]
        for arm in study.arms:
            for run in (next(r for r in runs if r.arm == arm), next(r for r in reversed(runs) if r.arm == arm)):
                config = read_config(run.arguments)
                assert all(flatten(config)[key] == value for key, value in run.settings.items())
    assert len(set(folders)) == len(folders)


def test_all_arms_of_a_study_share_the_protocol():
    """Of a claim's runs only the layer, and its own options, differ between arms."""
    for claim in claims.CLAIMS:
        for study in claims.studies(claim, 'small'):
            for options in study.arms.values():
                assert all(key.startswith(('model.', 'train.ocnn.')) for key in options), (study.name, options)
