"""Every value of a config is checked; every config of the house passes; what may change at a resume."""

import importlib
import json
import pathlib

import pytest

from convnorm_jax.configs import default
from convnorm_jax.configs.default import KEYS
from convnorm_jax.configs.keys import flatten
from convnorm_jax.runs.workdir import check_same_run, differences
from convnorm_jax.training.config import check_config

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[2] / 'configs').glob('[!_]*.py'))


def changed(key, value):
    """The default config with one value, of whatever type."""
    config = default.get_config()
    *sections, name = key.split('.')
    section = config
    for part in sections:
        section = section[part]
    with section.ignore_type():
        section[name] = value
    return config


def test_there_are_configs():
    assert {'default', 'digits_convnorm', 'cifar10_convnorm', 'cifar10_published'} <= set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_configs_of_the_house(name):
    config = importlib.import_module(f'configs.{name}').get_config()
    check_config(config)
    config.lock()
    with pytest.raises((AttributeError, KeyError)):
        config.train.epoch = 1
    assert set(flatten(config)) == set(flatten(default.get_config()))
    assert flatten(json.loads(config.to_json())) == flatten(config)  # a run's folder holds it as JSON


@pytest.mark.parametrize('key', [name for name, key in KEYS.items() if key.choices])
def test_an_unknown_choice(key):
    with pytest.raises(ValueError, match=rf"config\.{key}='nonsense': expected one of ") as error:
        check_config(changed(key, 'nonsense'))
    assert all(repr(choice) in str(error.value) for choice in KEYS[key].allowed())


# Needed beside a value for the whole config to pass.
L2 = {'attack.norm': 'l2', 'attack.names': ('pgd',)}
COMPANIONS = {
    'data.label_noise.rate': {'data.label_noise.kind': 'symmetric'},
    'attack.epsilon': L2 | {'attack.names': ()},
    'attack.step_size': L2,
    'train.microbatches': {'data.batch_size': 2**20},
}


@pytest.mark.parametrize('key', [name for name, key in KEYS.items() if key.interval])
def test_a_value_out_of_range(key):
    low, high, low_allowed, high_allowed = KEYS[key].bounds()
    wrong = [low - 1, high * 2 + 1, float('nan'), *([] if low_allowed else [low]), *([] if high_allowed else [high])]
    for value in wrong:
        with pytest.raises(ValueError, match=rf'config\.{key}={value}(\.0)?: expected (at|above|below)'):
            check_config(changed(key, value))
    for value in ([low] if low_allowed else []) + ([high] if high_allowed else []):
        if key == 'train.epochs' and not value:
            continue
        config = changed(key, value)
        config.update_from_flattened_dict(COMPANIONS.get(key, {}))
        check_config(config)


def test_every_number_of_the_config_is_checked():
    numbers = {
        key
        for key, value in flatten(default.get_config()).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    assert numbers <= {name for name, key in KEYS.items() if key.interval}


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        ({'train.microbatches': 3}, 'train.microbatches=3: expected a divisor of config.data.batch_size=128'),
        ({'train.microbatches': 2, 'train.algorithm': 'free'}, "train.algorithm='clean' .now 'free'"),
        ({'train.epochs': 0.0}, 'train.epochs=0.*train.steps, train.examples'),
        ({'data.label_noise.rate': 0.2}, "rate=0.2 with kind='none'.*asymmetric"),
        ({'train.early_stopping_epochs': 3, 'data.validation_fraction': 0.0}, 'early_stopping_epochs needs validation'),
        ({'attack.names': ('fgsm', 'cw')}, "attack.names=.*'cw'.*fgsm"),
        ({'schedule.milestones': (0.7, 0.3)}, 'milestones=.*rising shares'),
        ({'schedule.milestones': (40, 80)}, 'milestones=.*rising shares'),
        ({'model.depth': (1, 1, 1, 1)}, 'model.depth=.*1 to 3 whole numbers'),
        ({'model.depth': (0,)}, 'model.depth=.*1 to 3 whole numbers'),
        ({'model.stem': 'cifar'}, "model.stem='cifar' with model.name='simple_cnn'"),
    ],
)
def test_values_that_do_not_fit_together(values, words):
    config = default.get_config()
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=words):
        check_config(config)


def test_one_duration_is_enough():
    for unit in ('steps', 'examples'):
        config = default.get_config()
        config.train.epochs = 0.0
        config.train[unit] = 1
        check_config(config)


def test_differences_name_what_differs():
    saved = json.loads(default.get_config().to_json())
    assert differences(saved, default.get_config()) == {}
    given = default.get_config()
    given.model.layer, given.optimizer.learning_rate, given.model.depth = 'batchnorm', 0.3, (1, 2)
    assert differences(saved, given) == {
        'model.layer': ('convnorm', 'batchnorm'),
        'optimizer.learning_rate': (0.1, 0.3),
        'model.depth': (None, [1, 2]),
    }
    with pytest.raises(ValueError, match=r"^DIR holds .*model\.depth was None.*model\.layer was 'convnorm', is now 'b"):
        check_same_run(saved, given.to_dict(), 'DIR')


FREE = {
    'model.convnorm.spectrum': 'exact',
    'model.convnorm.method': 'spatial',
    'attack.pgd_steps': 20,
    'attack.names': ('pgd',),
    'eval.checkpoint': 'latest',
    'log.every_steps': 1,
    'checkpoint.keep': 9,
    'plots': False,
    'data.data_dir': '/elsewhere',
    'data.workers': 3,
    'train.early_stopping_epochs': 2,
}


def test_free_keys_do_not_make_another_run():
    given = default.get_config()
    given.update_from_flattened_dict(FREE)
    check_same_run(json.loads(default.get_config().to_json()), given.to_dict(), 'DIR')


@pytest.mark.parametrize('key, value', [('train.epochs', 7.0), ('train.steps', 70), ('train.examples', 700)])
@pytest.mark.parametrize('kind', ['constant', 'cosine', 'step'])
def test_only_a_constant_learning_rate_may_be_trained_for_longer(key, value, kind):
    saved = default.get_config()
    saved.schedule.kind = kind
    given = saved.copy_and_resolve_references()
    given.update_from_flattened_dict({key: value})
    assert list(differences(saved, given)) == ([] if kind == 'constant' else [key])


def test_all_other_keys_make_another_run():
    base = default.get_config()
    saved = json.loads(base.to_json())
    bound = [
        k for k in flatten(base) if not k.startswith(('attack.', 'eval.', 'log.', 'checkpoint.')) and k not in FREE
    ]
    for key in bound:
        assert set(differences(saved, changed(key, 'other'))) == {key}
    assert len(bound) > 20
