"""The nets that come with the package: files, cards, and what they compute."""

import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest

from convnorm_jax import attacks, pretrained
from convnorm_jax.data.sources import load_source
from convnorm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_compilation')
FOLDER = pathlib.Path(pretrained.__file__).parent


def digits():
    test = load_source('digits').test
    return np.asarray(test.images, np.float32) / 255, np.asarray(test.labels, np.int32)


def test_all_of_them_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 1_000_000
    assert {path.stem for path in FOLDER.glob('*.npz')} == set(pretrained.NAMES)


@pytest.mark.parametrize('name', pretrained.NAMES)
def test_a_card_says_what_is_needed(name):
    card = pretrained.load_pretrained(name).card
    assert card.content['name'] == name and card.content['figures'] and card.content['limits']
    for words in (card.content['data'], *card.content['commands'], *card.content['figures'], *card.content['limits']):
        assert words in str(card)
    assert card.content['sha256'] == hashlib.sha256((FOLDER / f'{name}.npz').read_bytes()).hexdigest()
    net = pretrained.load_pretrained(name)
    assert sum(x.size for x in jax.tree.leaves(net.variables['params'])) == card.content['parameters']


@pytest.mark.parametrize('name', ['digits_convnorm', 'digits_robust'])
def test_the_clean_accuracy_of_a_classifier_is_that_of_its_card(name):
    net = pretrained.load_pretrained(name)
    images, labels = digits()
    accuracy = 100 * (np.asarray(jax.jit(net)(images)).argmax(-1) == labels).mean()
    assert accuracy == pytest.approx(net.card.content['figures']['clean'], abs=0.3)  # one image in 360


@pytest.mark.slow
def test_the_robust_net_is_the_more_robust_one(monkeypatch):
    monkeypatch.setattr('convnorm_jax.attacks.loops.unrolls', lambda copies: False)  # quicker to compile
    images, labels = (part[:100] for part in digits())
    epsilon, left = 32 / 255, {}
    for name in ('digits_convnorm', 'digits_robust'):
        net = pretrained.load_pretrained(name)
        options = {'epsilon': epsilon, 'step_size': epsilon / 4, 'steps': 5, 'rng': jax.random.key(0)}
        logits = jax.jit(lambda images, net=net, options=options: net(attacks.pgd(net, images, labels, **options)))
        left[name] = (np.asarray(logits(images)).argmax(-1) == labels).mean()
    assert left['digits_robust'] > left['digits_convnorm'] + 0.2


def test_the_generator_draws_the_digits_it_is_asked_for():
    labels = np.tile(np.arange(10, dtype=np.int32), 10)
    images = jax.jit(pretrained.load_pretrained('digits_gan').sample)(jax.random.key(0), labels)
    assert images.shape == (100, 8, 8, 1) and images.min() >= 0 and images.max() <= 1
    named = np.asarray(jax.jit(pretrained.load_pretrained('digits_convnorm'))(images)).argmax(-1)
    assert (named == labels).mean() > 0.85


def test_an_unknown_name():
    with pytest.raises(UserError, match=r"name='resnet18': expected one of \('digits_convnorm'"):
        pretrained.load_pretrained('resnet18')


@pytest.fixture
def copied(tmp_path, monkeypatch):
    for path in FOLDER.glob('digits_convnorm.*'):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(pretrained, '_FOLDER', tmp_path)
    return tmp_path


def test_a_damaged_file(copied):
    assert pretrained.load_pretrained('digits_convnorm').card.content == json.loads(
        (copied / 'digits_convnorm.json').read_text()
    )
    content = bytearray((copied / 'digits_convnorm.npz').read_bytes())
    content[len(content) // 2] ^= 1
    (copied / 'digits_convnorm.npz').write_bytes(content)
    with pytest.raises(UserError, match=r'digits_convnorm.npz: is damaged .* install convnorm_jax again'):
        pretrained.load_pretrained('digits_convnorm')


def test_a_missing_file(copied):
    (copied / 'digits_convnorm.npz').unlink()
    with pytest.raises(UserError, match=r'digits_convnorm.npz: cannot be read .*No such file'):
        pretrained.load_pretrained('digits_convnorm')
