"""The depthwise-separable and the 1-D net from the command line to the pictures and the measured operators."""

import importlib
import json

import jax
import numpy as np
import pytest

from convnorm_jax.cli import spectra
from convnorm_jax.training import setup

pytestmark = pytest.mark.usefixtures('quick_compilation')

SEPARABLE, SEQUENCE = ('digits_separable', 'mobilenet'), ('digits_sequence', 'sequence_cnn')
SMALL = ('--config.model.width=4', '--config.model.depth=(1,1)', '--config.data.batch_size=32')


@pytest.mark.slow
@pytest.mark.parametrize('net', (pytest.param(SEPARABLE, marks=pytest.mark.beyond), SEQUENCE), ids=' '.join)
def test_a_run_with_its_attacks_pictures_and_operators(command, net, tmp_path):
    config, name = net
    workdirs = [tmp_path / layer for layer in ('convnorm', 'batchnorm')]
    for workdir in workdirs:
        code, _, err = command(
            f'--config=configs/{config}.py',
            f'--workdir={workdir}',
            f'--config.model.layer={workdir.name}',
            *SMALL,
            '--config.train.steps=4',
            '--config.attack.pgd_steps=1',
            '--config.eval.examples=20',
            f'--{"no" if workdir.name == "batchnorm" else ""}config.plots',
        )
        assert code == 0, err
        result = json.loads((workdir / 'result.json').read_text())
        assert (result['model'], result['layer'], result['attacked_examples']) == (name, workdir.name, 20)
        assert 0 <= result['pgd_accuracy'] <= result['test_accuracy'] + 0.2
    pictures = {path.name for path in (workdirs[0] / 'plots').iterdir()}
    assert pictures == {'learning_curves.png', 'attacks.png', 'layer_spectra.png'}
    arguments = f'--workdirs={",".join(map(str, workdirs))}', f'--output={tmp_path}/spectra'
    code, _, err = command(*arguments, main=spectra.main)
    assert code == 0, err
    measured = json.loads((tmp_path / 'spectra' / 'spectra.json').read_text())['runs']
    for layer in 'convnorm', 'batchnorm':
        assert measured[layer]['product_bound'] > 0
        assert all(found['layer_norm'] > 0 for found in measured[layer]['layers'])
    assert (tmp_path / 'spectra' / 'spectra.png').stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    'config,algorithm,ema',
    [('digits_separable', 'free', 0.9), ('digits_separable', 'trades', 0.0), ('digits_sequence', 'fast', 0.9)],
)
def test_every_way_to_train(config, algorithm, ema):
    config = importlib.import_module(f'configs.{config}').get_config()
    config.model.width, config.model.depth, config.data.batch_size = 4, (1, 1), 16
    config.train.algorithm, config.train.ema_decay, config.train.steps = algorithm, ema, 10
    config.train.adversarial.steps, config.train.adversarial.replays = 1, 2
    config.train.ocnn.weight = 1e-2
    experiment = setup.build(config)
    state = jax.jit(experiment.create_state)()
    train = experiment.prepared.train
    batch = {'images': train.images[:16], 'labels': train.labels[:16].astype(np.int32)}
    after, metrics = jax.jit(experiment.train_step)(state, batch)
    assert np.isfinite([value for pair in metrics.values() for value in np.ravel(pair)]).all()
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.params, after.params)
    assert all(jax.tree.leaves(moved)) and (after.ema is not None) == (ema > 0)
