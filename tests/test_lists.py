"""What two places say is the same: lists of names, defaults, keys of configs."""

import inspect
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax.attacks import inputs, losses, run_ensemble
from convnorm_jax.attacks.auto_attack import members
from convnorm_jax.attacks.inputs import fewest_classes
from convnorm_jax.cli import export, spectra, sweep_runs
from convnorm_jax.configs import default
from convnorm_jax.data.corruptions import CORRUPTIONS, corrupt
from convnorm_jax.evaluation import classifier, features, suite
from convnorm_jax.layers import factory
from convnorm_jax.reports import gan as gan_report
from convnorm_jax.reports import robustness, robustness_text
from convnorm_jax.reports import sweep as sweep_report
from convnorm_jax.training import classification, evaluation_checks, generation
from convnorm_jax.training import config as config_lib
from convnorm_jax.training.experiment import STREAMED_ATTACK_EXAMPLES

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / 'convnorm_jax' / 'configs'
PAGES = sorted(p for p in (ROOT / 'docs').rglob('*.md') if '_build' not in p.parts)
DEFAULT = (CONFIGS / 'default.py').read_text()
BASE = config_lib.flatten(default.get_config())
NAMED = config_lib._CHOICES | config_lib.SUBSETS
# Where the comment on a key stands for another key's.
SAME_AS = {'gan.generator_layer': 'model.layer'}


def comment(key):
    """The comment on a key in configs/default.py: on its line, or in lines of their own above."""
    found = re.search(rf'((?:^    #.*\n)*)^    config\.{re.escape(key)} = [^#]*(#.*)?$', DEFAULT, re.M)
    return ' '.join(part or '' for part in found.groups())


@pytest.mark.parametrize('key', NAMED)
def test_the_comment_on_a_key_names_every_choice(key):
    text, given = comment(key), BASE[key]
    if key in SAME_AS:
        assert f'as {SAME_AS[key]}' in text and set(NAMED[SAME_AS[key]]) <= set(NAMED[key])
        return
    words = {*re.findall(r'[\w-]+', text), *(given if isinstance(given, list) else [given])}
    assert [choice for choice in NAMED[key] if choice not in ('', None) and choice not in words] == []


def test_a_choice_left_out_would_be_seen():
    assert comment('attack.loss').startswith(' # or margin') and comment('model.name').count('resnet') == 5


def test_numbers_in_comments():
    said = re.findall(r'(\d+) \(([\w, ]+)\)', comment('train.adversarial.step_size'))
    assert {n: float(v) for v, names in said for n in names.split(', ')} == classification.DEFAULT_STEP_SIZES
    assert set(classification.DEFAULT_STEP_SIZES) == set(config_lib.ALGORITHMS) - {'clean', 'gan'}
    assert f'(imagenet, folder: {STREAMED_ATTACK_EXAMPLES})' in comment('eval.examples')


def test_the_standard_ensemble_is_the_librarys():
    section, options = default.get_config().eval.autoattack, inspect.signature(run_ensemble).parameters
    assert {key: options[key].default for key in section} == section.to_dict()
    assert set(robustness_text.ATTACK_NAMES) == set(members.MEMBERS)


def test_everything_is_measured_by_default():
    assert tuple(BASE['eval.parts']) == suite.PARTS and tuple(BASE['attack.names']) == classifier.ATTACKS
    config = default.get_config()
    for section, function in (('simba', suite.run_simba), ('autoattack', run_ensemble)):
        assert set(config.eval[section]) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize('part', suite.PARTS)
def test_every_part_of_the_suite_is_run(part, monkeypatch):
    called = []
    for name in suite.PARTS:
        monkeypatch.setattr(suite, f'run_{name}', lambda *_, _name=name, **__: called.append(_name))
    robustness._measure(part, None, default.get_config())
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
    assert set(gan_report.SCORES_SHOWN) <= written and set(config_lib.FEATURES) == set(features.SCORE_NAMES)
    assert inspect.signature(features.generative_scores).parameters['splits'].default == features.SPLITS
    assert config_lib._RANGES['eval.samples'][0] == features.SPLITS


def test_the_checkpoints_of_the_commands(monkeypatch):
    for which in config_lib.CHECKPOINTS:
        assert spectra.parse(['spectra', '--workdirs=a', f'--checkpoint={which}'])[2] == which
        assert export.parse(['export', '--workdir=a', '--out=b', f'--checkpoint={which}']).checkpoint == which
    with pytest.raises(ValueError, match=f'should be one of <{"|".join(config_lib.CHECKPOINTS)}>'):
        spectra.parse(['spectra', '--workdirs=a', '--checkpoint=none'])


LISTS = {
    'choices': [*NAMED, *config_lib._RANGES, *config_lib.DURATION_KEYS],
    'prefixes': [*config_lib.FREE_KEYS, *robustness._DECIDES, *sweep_runs._WITHOUT_EFFECT],
    'figures': [f'attack.{name}' for name in (*sweep_runs._ATTACK_FIGURES, *sweep_report._ATTACK_FACTS)],
}


@pytest.mark.parametrize('name', LISTS)
def test_keys_in_lists_exist(name):
    prefixes = [key for key in LISTS[name] if key != 'attack.attacked_examples']  # which is of result.json alone
    assert [p for p in prefixes if not any(k == p or (p.endswith('.') and k.startswith(p)) for k in BASE)] == []


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
