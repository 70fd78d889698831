"""The command that exports a run's net, on a classifier of a few steps and on a GAN."""

import json
import os
import sys

import jax
import numpy as np
import pytest
from absl import logging

from convnorm_jax import load_exported, load_weights
from convnorm_jax.cli import export

CLASSIFIER = [
    '--config=configs/digits_convnorm.py',
    '--config.model.width=2',
    '--config.model.depth=(1,)',
    '--config.train.epochs=0',
    '--config.train.steps=2',
    '--config.train.ema_decay=0.9',
]
GAN = [
    '--config=configs/digits_gan.py',
    '--config.model.name=dcgan',
    '--config.gan.generator_layer=convnorm',
    '--config.model.width=2',
    '--config.gan.generator_width=2',
    '--config.gan.latent=4',
    '--config.gan.conditional=False',
    '--config.gan.n_dis=1',
    '--config.gan.score_examples=0',
    '--config.data.subset_fraction=0.1',
    '--config.train.epochs=0',
    '--config.train.steps=2',
]


def train(arguments, folder):
    from convnorm_jax.cli.command_line import read_config
    from convnorm_jax.training import loop, setup

    experiment = setup.build(read_config(arguments), jax.devices()[:1])
    loop.train(experiment, str(folder))
    return experiment, str(folder)


@pytest.fixture(scope='module')
def patched_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CONVNORM_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def classifier(quick_compilation, patched_cache, tmp_path_factory):
    return train(CLASSIFIER, tmp_path_factory.mktemp('runs') / 'run')


@pytest.fixture
def command(monkeypatch, capsys, patched_cache):
    """Function of arguments -> (exit code, stdout, lines of stderr)."""
    from convnorm_jax import mesh

    create_mesh = mesh.create_mesh
    monkeypatch.setattr(mesh, 'create_mesh', lambda given=None: create_mesh(given or jax.devices()[:1]))
    monkeypatch.setattr(export, 'TIMED', 0)
    verbosity = logging.get_verbosity()

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, 'argv', ['export', *arguments])
        code = export.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    yield run
    logging.set_verbosity(verbosity)


def cells(out):
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.splitlines() if line.startswith('| ')]
    return dict(lines)


def test_a_classifier(command, classifier, tmp_path):
    from convnorm_jax.training.loop import restore_state

    experiment, workdir = classifier
    path, weights = tmp_path / 'net', tmp_path / 'net.safetensors'
    code, out, err = command(f'--workdir={workdir}', f'--out={path}', f'--weights={weights}')
    assert (code, err) == (0, [])
    assert sorted(os.listdir(tmp_path)) == ['net', 'net.safetensors', 'net.safetensors.json']
    net = load_exported(path)
    assert net.config == json.loads((tmp_path / 'net.safetensors.json').read_text()) == load_weights(weights)[1]
    assert net.config['model']['depth'] == [1] and net.platforms == ('cpu', 'cuda', 'tpu') and net.folded
    # The averaged parameters, with pixels normalized as by the evaluation.
    state = restore_state(experiment, workdir, 'latest')[0]
    pixels = np.asarray(experiment.prepared.test.images[:6], np.float32) / 255
    logits = jax.jit(experiment.evaluator.logits_fn)
    expected = np.asarray(logits(state.eval_variables, pixels))
    np.testing.assert_allclose(net(pixels), expected, atol=1e-5 * np.abs(expected).max())
    raw = logits({'params': state.params, **state.model_state}, pixels)
    assert np.abs(raw - expected).max() > 1e-3 * np.abs(expected).max()
    jax.tree.map(np.testing.assert_array_equal, load_weights(weights)[0], dict(state.eval_variables))
    table = cells(out)
    assert table['net'] == 'simple_cnn with convnorm, folded' and table['checkpoint'] == 'latest (step 2)'
    assert table['takes'] == 'images float32 [B, 8, 8, 1]' and table['gives'] == 'logits float32 [B, 10]'
    assert table['parameters'] == f'{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}'
    assert table['size'] == f'{path.stat().st_size / 1e6:.2f} MB' and table['platforms'] == 'cpu, cuda, tpu'
    difference, largest = table['largest difference from the net'].split(' (of outputs up to ')
    assert float(difference) <= 1e-4 * float(largest.rstrip(')')) and float(largest.rstrip(')')) > 0
    for name in ('net', 'exported'):
        assert float(table[f'{name}, measured once'].removesuffix(' images/s')) > 0
    assert out.splitlines()[-2:] == [f'wrote {path}', f'wrote {weights}']


def test_a_file_that_differs_is_not_written(command, classifier, tmp_path, monkeypatch):
    from convnorm_jax.exported import save

    right = save.normalize
    monkeypatch.setattr(save, 'normalize', lambda images, mean, std: right(images, mean, std) + 0.01)
    code, out, err = command(f'--workdir={classifier[1]}', f'--out={tmp_path / "net"}', '--platforms=cpu')
    assert code == 1 and out == '' and not os.listdir(tmp_path)
    assert any('RuntimeError: the exported net differs from the net by' in line for line in err)


@pytest.mark.slow
def test_a_generator(command, tmp_path_factory, tmp_path, patched_cache):
    experiment, workdir = train(GAN, tmp_path_factory.mktemp('runs') / 'gan')
    code, out, err = command(f'--workdir={workdir}', f'--out={tmp_path / "generator"}', '--platforms=cpu')
    assert (code, err) == (0, [])
    net = load_exported(tmp_path / 'generator')
    assert net.kind == 'generator' and net.image_shape == experiment.input_shape and net.folded
    assert cells(out)['takes'] == 'z float32 [B, 4]' and cells(out)['platforms'] == 'cpu'
    assert net(np.zeros((3, 4), np.float32)).shape == (3, *net.image_shape)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([], '--workdir is missing: give the folder of a run'),
        (['--workdir=a'], '--out is missing: give the file to write'),
        (['--workdir=a', '--out=b', '--weights=./b'], '--weights=./b: is --out as well'),
        (['--workdir=nowhere', '--out=b'], '--workdir=nowhere: no run there'),
        (['--workdir=a', '--out=nowhere/b'], "--out='nowhere/b': cannot be written"),
        (['--workdir=a', '--out=b', '--weights=nowhere/c'], "--weights='nowhere/c': cannot be written"),
        (['--workdir=a', '--out=b', '--platforms=cpu,gpu'], '--platforms=cpu,gpu: expected some of cpu, cuda, tpu'),
        (['--workdir=a', '--out=b', '--platforms='], '--platforms=: expected some of'),
        (['--workdir=a', '--out=b', '--checkpoint=first'], 'best|latest'),
        (['--workdir=a', '--output=b'], 'output'),
        (['--workdir=a', '--out=b', 'c'], "'c': not understood"),
    ],
)
def test_a_mistake_is_one_line(command, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out, len(err)) == (2, '', 1), err
    assert err[0].startswith('error: ') and words in err[0] and not os.listdir(tmp_path)


def test_missing_packages_are_one_line(command, monkeypatch, tmp_path):
    arguments = ['--workdir=a', f'--out={tmp_path / "net"}', f'--weights={tmp_path / "w"}']
    monkeypatch.setitem(sys.modules, 'safetensors.numpy', None)
    assert "pip install 'convnorm_jax[safetensors]'" in command(*arguments)[2][0]
    monkeypatch.setitem(sys.modules, 'flatbuffers', None)
    assert "pip install 'convnorm_jax[export]'" in command(*arguments)[2][0]


def test_help(command):
    code, out, _ = command('--help')
    assert code == 0 and 'convnorm export --workdir=DIR --out=FILE' in out
