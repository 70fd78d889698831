"""The results that are kept with the code, and their page."""

import json
import pathlib

import pytest

from convnorm_jax.paper import claims
from convnorm_jax.paper.study import Cell

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEPT = sorted((ROOT / 'results').glob('*.json'))


@pytest.mark.parametrize('path', KEPT, ids=lambda path: path.name)
def test_kept_runs_are_runs_of_the_grid(path):
    """By their arguments, which is how the command knows that it need not run them again."""
    content = json.loads(path.read_text())
    studies = {study.name: study for study in claims.studies(content['claim'], content['scale'])}
    assert content['runs']
    for run in content['runs']:
        study = studies[run['study']]
        cell = Cell(study, run['arm'], run['settings'], run['seed'], run['rate'], run['tuning'])
        assert list(cell.arguments) == run['arguments']
        assert not run['tuning'] or (run['rate'] in study.rates and run['seed'] == 100)
        assert run['tuning'] or run['settings'] in study.combinations()


def test_the_page_has_every_claim():
    text = (ROOT / 'docs' / 'paper.md').read_text()
    for claim in claims.CLAIMS:
        assert f'## {claims.title(claim)}\n\n```{{claim}} {claim}\n```' in text
