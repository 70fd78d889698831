"""A GAN from the command line: training, scores, pictures, evaluation again, and what a user gets wrong."""

import json

import numpy as np
import pytest

from convnorm_jax.reports import gan as gan_report
from convnorm_jax.reports import gan_scores
from convnorm_jax.runs import lock
from convnorm_jax.runs.metrics import read_rows

pytestmark = pytest.mark.usefixtures('quick_compilation')

TINY = (
    '--config=configs/digits_gan.py',
    '--config.model.width=4',
    '--config.gan.generator_width=4',
    '--config.gan.latent=4',
    '--config.gan.n_dis=1',
    '--config.gan.passes=2',
    '--config.data.subset_fraction=0.1',
    '--config.train.steps=8',
    '--config.gan.score_examples=40',
    '--config.eval.samples=60',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('runs') / 'run'


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    monkeypatch.setitem(gan_scores._EPOCHS, 'digits', 1.0)


@pytest.fixture
def workdir(command, folder):
    """Of a finished run, which the first test makes; what it printed is in `printed.txt`."""
    if not folder.exists():
        code, out, err = command(*TINY, f'--workdir={folder}')
        assert code == 0, err
        (folder / 'printed.txt').write_text(out)
    return folder


@pytest.mark.slow
def test_the_run(workdir):
    out = (workdir / 'printed.txt').read_text()
    result = json.loads((workdir / 'result.json').read_text())
    assert not any(isinstance(value, (dict, list)) for value in result.values())
    expected = {'model': 'sngan', 'layer': 'convnorm', 'samples': 60, 'test_examples': 360, 'checkpoint_step': 8}
    assert {key: result[key] for key in expected} == expected
    # Real pictures are nearer to the real training pictures than those of an untrained generator.
    assert result['real_fid_classifier'] < result['fid_classifier'] and 1 <= result['classifier_score'] <= 10
    for name in ('fid_classifier', 'kid_classifier', 'classifier_score'):
        line = next(line for line in out.splitlines() if line.startswith(f'| {name}'))
        cells = [cell.split('+-')[0].strip() for cell in line.split('|')[2:-1]]
        assert cells == [f'{result[name]:.4f}', f'{result[f"real_{name}"]:.4f}']
    assert 0 <= result['label_agreement'] <= 1 and result['real_label_agreement'] > 0.2
    assert 'fid ' not in out and 'inception' not in out
    rows = read_rows(str(workdir / 'metrics.csv'))
    assert [row['step'] for row in rows] == [4, 8] and all(row['fid_classifier'] > 0 for row in rows)
    drawn = {path.name for path in (workdir / 'plots').iterdir()}
    assert drawn == {
        'samples.png',
        'real_and_fake.png',
        'interpolation.png',
        'progress.png',
        'learning_curves.png',
        'layer_spectra.png',
    }
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in (workdir / 'plots').iterdir())


@pytest.mark.slow
def test_evaluation_again_with_other_samples(command, workdir):
    before = json.loads((workdir / 'result.json').read_text())
    code, _, err = command('--mode=eval', f'--workdir={workdir}', '--config.eval.samples=30', '--noconfig.plots')
    assert code == 0, err
    after = json.loads((workdir / 'result.json').read_text())
    assert after['samples'] == 30 and after['real_fid_classifier'] == before['real_fid_classifier']
    assert json.loads((workdir / 'result-1.json').read_text()) == before


@pytest.mark.slow
def test_features_that_fail_cost_no_other_score(command, workdir, monkeypatch):
    make_scorer = gan_report.make_scorer

    def fails(experiment, workdir, features):
        if features == 'inception':
            raise ValueError('of NumPy')
        return make_scorer(experiment, workdir, features)

    monkeypatch.setattr(gan_report, 'make_scorer', fails)
    (workdir / 'result.json').unlink()
    options = '--config.eval.samples=30', '--config.eval.features=classifier,inception', '--noconfig.plots'
    code, out, err = command('--mode=eval', f'--workdir={workdir}', *options)
    result = json.loads((workdir / 'result.json').read_text())
    assert code == 1 and err[-2] == 'ValueError: of NumPy' and '| fid_classifier' in out
    assert result['incomplete'] == 'ValueError: of NumPy' and result['fid_classifier'] > 0


@pytest.mark.slow
def test_two_evaluations_at_a_time(command, workdir):
    """The classifier is trained already: neither needs its folder for itself."""
    with lock.locked(str(workdir / 'classifier')):
        code, _, err = command('--mode=eval', f'--workdir={workdir}', '--config.eval.samples=30', '--noconfig.plots')
    assert code == 0, err


@pytest.mark.slow
def test_samples_appear_whole(command, workdir):
    """An evaluation may read them while the training writes."""
    names = sorted(path.name for path in (workdir / 'samples').iterdir())
    assert names == ['00000004.npz', '00000008.npz']
    assert np.load(workdir / 'samples' / names[0])['images'].shape == (50, 8, 8, 1)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--config.model.name=simple_cnn', "config.model.name='simple_cnn' with config.train.algorithm='gan'"),
        ('--config.gan.loss=minimax', "config.gan.loss='minimax': expected one of"),
        ('--config.gan.setting=G', "config.gan.setting='G': expected one of"),
        ('--config.gan.augmentation=flip', "config.gan.augmentation=('flip',): expected some of"),
        ('--config.gan.n_dis=0', 'config.gan.n_dis=0: expected at least 1'),
        ('--config.eval.features=vgg', "config.eval.features=('vgg',): expected some of"),
        ('--config.data.batch_size=2000', 'batch_size'),
    ],
)
def test_what_a_user_gets_wrong(command, tmp_path, options, message):
    code, _, err = command(*TINY, f'--workdir={tmp_path}/run', *options.split())
    assert code == 2 and message in err[-1] and len(err) == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_folder_that_holds_no_classifier(command, workdir, tmp_path):
    code, _, err = command(*TINY, f'--workdir={tmp_path}/run', f'--config.gan.classifier={workdir}')
    assert code == 2 and f'config.gan.classifier={workdir}: expected a run of a classifier on digits' in err[-1]
