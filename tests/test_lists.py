"""What two places say is the same: lists of names, defaults, keys of configs."""

import inspect
import json
import pathlib
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.attacks import inputs, losses, run_ensemble
from convnorm_jax.attacks.auto_attack import members
from convnorm_jax.attacks.inputs import fewest_classes
from convnorm_jax.cli import export, spectra
from convnorm_jax.configs import default
from convnorm_jax.configs.default import KEYS
from convnorm_jax.configs.keys import Key, flatten
from convnorm_jax.data.corruptions import CORRUPTIONS, corrupt
from convnorm_jax.evaluation import classifier, features, suite
from convnorm_jax.layers import factory
from convnorm_jax.reports import gan as gan_report
from convnorm_jax.reports import robustness, robustness_text
from convnorm_jax.reports import sweep as sweep_report
from convnorm_jax.runs import sweep as sweep_lib
from convnorm_jax.runs.workdir import differences
from convnorm_jax.training import classification, evaluation_checks, generation
from convnorm_jax.training.experiment import STREAMED_ATTACK_EXAMPLES

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / 'convnorm_jax' / 'configs'
PAGES = sorted(p for p in (ROOT / 'docs').rglob('*.md') if '_build' not in p.parts)
BASE = flatten(default.get_config())
NAMED = {name: key.allowed() for name, key in KEYS.items() if key.choices or key.names}
# Where the text on a key stands for another key's.
SAME_AS = {'gan.generator_layer': 'model.layer'}


@pytest.mark.parametrize('key', NAMED)
def test_the_text_on_a_key_names_every_choice(key):
    text = KEYS[key].doc
    if key in SAME_AS:
        assert f'as {SAME_AS[key]}' in text and set(NAMED[SAME_AS[key]]) <= set(NAMED[key])
        return
    words = set(re.findall(r'[\w-]+', text))
    assert [choice for choice in NAMED[key] if choice not in ('', None) and choice not in words] == []


def test_a_key_says_what_it_is():
    for name, key in KEYS.items():
        assert key.doc and isinstance(key, Key), name
        assert (key.kind is None) == (key.default is not None), f'{name}: a default of None has a type'
        assert key.resume in ('fixed', 'free', 'duration'), name
        assert bool(key.bounds()) == bool(key.interval), f'{name}: {key.interval} is not an interval'
        if key.choices:
            assert key.default in key.allowed(), name
        if key.names:
            assert set(key.default) <= set(key.allowed()), name
        if key.bounds() and key.default is not None:
            low, high, _, _ = key.bounds()
            assert low <= key.default <= high, name


def test_the_table_makes_the_config():
    assert list(BASE) == sorted(BASE) and set(BASE) == set(KEYS)
    assert json.loads(json.dumps(BASE)) == {
        n: list(k.default) if isinstance(k.default, tuple) else k.default for n, k in KEYS.items()
    }


def test_a_key_that_was_removed():
    # Of a section that may change as a whole, nobody asks; of another one, the run is another.
    assert differences({**BASE, 'eval.removed': 1}, BASE) == {}
    assert differences({**BASE, 'model.removed': 1}, BASE) == {'model.removed': (1, None)}
    assert differences({**BASE, 'removed': 1}, BASE) == {'removed': (1, None)}


def test_numbers_in_texts():
    said = re.findall(r'(\d+) \(([\w, ]+)\)', KEYS['train.adversarial.step_size'].doc)
    assert {n: float(v) for v, names in said for n in names.split(', ')} == classification.DEFAULT_STEP_SIZES
    assert set(classification.DEFAULT_STEP_SIZES) == set(KEYS['train.algorithm'].allowed()) - {'clean', 'gan'}
    assert f'(imagenet, folder: {STREAMED_ATTACK_EXAMPLES})' in KEYS['eval.examples'].doc


def test_the_standard_ensemble_is_the_librarys():
    section, options = default.get_config().eval.autoattack, inspect.signature(run_ensemble).parameters
    assert {key: options[key].default for key in section} == section.to_dict()
    assert set(robustness_text.ATTACK_NAMES) == set(members.MEMBERS)


def test_all_of_robustness_is_measured_by_default():
    assert (*BASE['eval.parts'], 'operators') == suite.PARTS and tuple(BASE['attack.names']) == classifier.ATTACKS
    config = default.get_config()
    for section, function in (('simba', suite.run_simba), ('autoattack', run_ensemble)):
        assert set(config.eval[section]) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize('part', suite.PARTS)
def test_every_part_of_the_suite_is_run(part, monkeypatch):
    called = []
    for name in suite.PARTS:
        monkeypatch.setattr(suite, f'run_{name}', lambda *_, _name=name, **__: called.append(_name))
    robustness._measure(part, None, types.SimpleNamespace(config=default.get_config(), model=None))
    assert called == [part]


def test_every_loss_says_how_many_classes_it_needs():
    for loss in inputs.LOSSES:
        labels, needed = jnp.zeros(1, int), fewest_classes(loss)
        assert losses.attack_loss(jnp.ones((1, needed)), labels, loss).shape == (1,)
        with pytest.raises(ValueError, match='logits'):
            losses.attack_loss(jnp.ones((1, needed - 1)), labels, loss)


def test_an_attack_says_how_many_classes_it_needs():
    sizes = {'steps': 2, 'queries': 2, 'targets': 9, 'restarts': 1}
    for name in members.MEMBERS:
        needed = fewest_classes('dlr') if name == 'apgd-dlr' else 2
        assert members.make_member(name, 'linf', needed, **sizes).name == name
        if needed > 2:
            with pytest.raises(ValueError, match='at least three classes'):
                members.make_member(name, 'linf', needed - 1, **sizes)


def test_the_corruptions_say_what_size_they_need():
    side = evaluation_checks.SIDE_NEEDED
    assert corrupt(np.zeros((1, side, side, 1), np.uint8), CORRUPTIONS[0], 1, 0).shape == (1, side, side, 1)
    with pytest.raises(ValueError, match='images'):
        corrupt(np.zeros((1, side - 1, side, 1), np.uint8), CORRUPTIONS[0], 1, 0)


def test_every_layer_can_be_made():
    for name in factory.LAYERS:
        assert callable(factory.make_layer(name))
    for name in factory.DENSE_LAYERS:
        assert callable(factory.make_dense(name))
    config = default.get_config()
    for name, options in factory.LAYER_OPTIONS.items():
        assert set(config.model.get(name, {})) <= set(options)


def test_the_scores_of_generators():
    frechet, kernel, score = features.SCORE_NAMES['classifier']
    written = {frechet, kernel, f'{kernel}_std', score, f'{score}_std'}
    assert written <= set(generation.Generation.columns)
    assert set(gan_report.SCORES_SHOWN) <= written
    assert inspect.signature(features.generative_scores).parameters['splits'].default == features.SPLITS
    assert KEYS['eval.samples'].bounds()[0] == features.SPLITS


def test_the_checkpoints_of_the_commands(monkeypatch):
    checkpoints = KEYS['eval.checkpoint'].allowed()
    for which in checkpoints:
        assert spectra.parse(['spectra', '--workdirs=a', f'--checkpoint={which}'])[2] == which
        assert export.parse(['export', '--workdir=a', '--out=b', f'--checkpoint={which}']).checkpoint == which
    with pytest.raises(ValueError, match=f'should be one of <{"|".join(checkpoints)}>'):
        spectra.parse(['spectra', '--workdirs=a', '--checkpoint=none'])


def test_the_figures_of_attacks_have_the_names_of_keys():
    names = {*sweep_lib._ATTACK_FIGURES, *sweep_report._ATTACK_FACTS} - {'attacked_examples'}  # of result.json alone
    assert {f'attack.{name}' for name in names} <= set(KEYS)


@pytest.mark.parametrize('path', [*sorted(ROOT.glob('*.md')), *PAGES, *sorted(CONFIGS.glob('*.py'))], ids=str)
def test_keys_in_texts_exist(path):
    text = path.read_text()
    keys = set(re.findall(r'--(?:no)?config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)', text))
    keys |= set(re.findall(r'--grid=([a-z_0-9]+(?:\.[a-z_0-9]+)*)=', text))
    keys -= {'section.key'}  # of a docstring; --config.data.label_noise.{kind,rate} names a section
    assert [k for k in keys if k not in BASE and not any(other.startswith(f'{k}.') for other in BASE)] == []


def test_the_site_says_what_every_library_is_for():
    text = (ROOT / 'docs' / 'house.md').read_text()
    names = re.findall(r'^([\w-]+)', (ROOT / 'requirements.txt').read_text(), re.M)
    assert len(names) > 5 and [name for name in names if name.replace('-', '_') not in text.replace('-', '_')] == []
