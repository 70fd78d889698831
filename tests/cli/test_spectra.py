"""The command that puts the layers of trained nets side by side, on two short runs."""

import json
import math
import os
import sys

import matplotlib.image
import pytest
from absl import logging

from convnorm_jax.cli import spectra

TRAIN = [
    '--config=configs/digits_convnorm.py',
    '--config.model.width=2',
    '--config.model.depth=(1,)',
    '--config.train.epochs=0',
    '--config.train.steps=2',
    '--config.attack.names=()',
    '--config.plots=False',
]
LAYERS = ('convnorm', 'oni')


@pytest.fixture(scope='module')
def runs(quick_compilation, tmp_path_factory):
    """Folders of two runs of a few steps."""
    from convnorm_jax.cli.command_line import read_config
    from convnorm_jax.training import loop, setup

    folders = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CONVNORM_CACHE', str(tmp_path_factory.mktemp('cache')))
        for layer in LAYERS:
            config = read_config([*TRAIN, f'--config.model.layer={layer}'])
            folder = str(tmp_path_factory.mktemp('runs') / f'run-{layer}')
            loop.train(setup.build(config), folder)
            folders.append(folder)
    return folders


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Function of arguments -> (exit code, stdout, lines of stderr)."""
    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'cache'))
    verbosity = logging.get_verbosity()

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['spectra', *arguments])
        code = spectra.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    yield run
    logging.set_verbosity(verbosity)


def test_two_runs_side_by_side(command, runs, tmp_path):
    output = tmp_path / 'out'
    code, out, err = command(f'--workdirs={",".join(runs)}', f'--output={output}', '--checkpoint=latest')
    assert code == 0 and err == [f'measuring {run} ({layer})' for run, layer in zip(runs, LAYERS)]
    assert sorted(os.listdir(output)) == ['spectra.json', 'spectra.md', 'spectra.png']
    content = json.loads((output / 'spectra.json').read_text())
    assert 'not certified' in content['note'] and list(content['runs']) == list(LAYERS)
    for label, found in content['runs'].items():
        check_run(found, label, runs[LAYERS.index(label)])
    check_table((output / 'spectra.md').read_text(), content['runs'])
    assert out.startswith((output / 'spectra.md').read_text())
    picture = matplotlib.image.imread(output / 'spectra.png')
    assert picture.shape[1] == 1440 and picture[..., :3].std() > 0.05


def check_run(found, label, workdir):
    facts = {key: found[key] for key in ('workdir', 'model', 'layer', 'seed', 'checkpoint', 'checkpoint_step')}
    assert facts == {
        'workdir': workdir,
        'model': 'simple_cnn',
        'layer': label,
        'seed': 0,
        'checkpoint': 'latest',
        'checkpoint_step': 2,
    }
    assert [layer['name'] for layer in found['layers']] == ['conv1_1', 'linear']
    assert found['layers'][0]['kind'] == {'convnorm': 'ConvNorm', 'oni': 'ONIConv'}[label]
    assert found['layers'][0]['picture'] == [8, 8, 1] and found['layers'][0]['output'] == [8, 8, 2]
    for layer in found['layers']:
        for stage in ('conv', 'layer'):
            low, *_, high = quantiles = list(layer[f'{stage}_circular'].values())
            assert quantiles == sorted(quantiles) and low >= 0
            assert 0 < layer[f'{stage}_norm'] <= 1.5 * high
    norms = [layer['layer_norm'] for layer in found['layers']]
    assert math.isclose(found['product_bound'], math.prod(norms))


def check_table(text, found):
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]
    assert lines[0] == ['layer', 'image', 'stride', 'convnorm: conv', 'convnorm: layer', 'oni: conv', 'oni: layer']
    assert [line[0] for line in lines[2:]] == ['conv1_1', 'linear', 'product bound']
    for label, column in (('convnorm', 3), ('oni', 5)):
        for line, layer in zip(lines[2:], found[label]['layers']):
            norms = layer['conv_norm'], layer['layer_norm']
            assert line[column : column + 2] == [f'{norm:.4g}' for norm in norms]
        assert lines[4][column + 1] == f'{found[label]["product_bound"]:.4g}'
    assert 'measured, not certified' in text


def test_one_run_writes_into_its_folder_and_old_configs_are_read(command, runs):
    path = os.path.join(runs[0], 'config.json')
    with open(path) as file:
        saved = json.load(file)
    del saved['attack'], saved['model']['spectralnorm']
    with open(path, 'w') as file:
        json.dump({**saved, 'gone': 1}, file)
    code, out, _ = command(f'--workdirs={runs[0]}')
    assert code == 0 and f'wrote {runs[0]}/spectra/spectra.png' in out
    assert len(os.listdir(os.path.join(runs[0], 'spectra'))) == 3


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([], '--workdirs=: expected folders of runs'),
        (['--workdirs=a,b,a/'], '--workdirs=a,b,a/: expected folders of runs'),
        (['--workdirs=nowhere'], '--workdir=nowhere: no run there'),
        (['--workdirs=a', '--checkpoint=first'], 'best|latest'),
        (['--workdirs=a', '--chekpoint=best'], 'chekpoint'),
        (['--workdirs', 'a', 'b'], "'b': not understood"),
        (['--workdirs=a,b,c,d,e,f,g,h'], '8 runs'),
    ],
)
def test_a_mistake_is_one_line(command, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out, len(err)) == (2, '', 1)
    assert err[0].startswith('error: ') and words in err[0]
    assert not os.listdir(tmp_path)


def test_output_that_is_a_file(command, runs, tmp_path):
    path = tmp_path / 'file'
    path.write_text('')
    code, _, err = command(f'--workdirs={runs[1]}', f'--output={path}')
    assert code == 2 and f'--output={path}: cannot write there' in err[-1] and len(err) == 1


def test_help(command):
    code, out, _ = command('--help')
    assert code == 0 and 'convnorm spectra --workdirs=runs/A,runs/B' in out


def test_labels_tell_the_runs_apart():
    from types import SimpleNamespace

    def config(layer, seed=0):
        return SimpleNamespace(model=SimpleNamespace(name='vgg11', layer=layer), seed=seed)

    two = config('oni'), config('convnorm')
    assert spectra._labels(['x/a', 'y/a'], two) == ['oni', 'convnorm']
    assert spectra._labels(['x/a', 'y/a'], (config('oni'), config('oni', 1))) == [
        'vgg11, oni, seed 0',
        'vgg11, oni, seed 1',
    ]
    assert spectra._labels(['x/a', 'x/b'], (two[0], two[0])) == ['a', 'b']
    assert spectra._labels(['x/a', 'y/a'], (two[0], two[0])) == ['x/a', 'y/a']
