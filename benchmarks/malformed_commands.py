"""Mistakes in the command line and in config files, for benchmarks/malformed.py."""

import os
import shutil

from benchmarks.malformed_base import (
    CIFAR,
    DIGITS,
    GAN,
    base_keys,
    copy_of,
    digits,
    image_folder,
    keys_with,
    on_images,
    registry,
)
from convnorm_jax.configs import default

KINDS, kind = registry()


# --- the command line --------------------------------------------------------------------------------


@kind
def a_misspelt_key(rng, place, trained):
    key = rng.choice([k for k in base_keys() if '.' in k])
    i = rng.randrange(key.index('.') + 1, len(key))
    return digits(place, f'--config.{key[:i]}q{key[i + 1 :]}x=1')


@kind
def an_unknown_option(rng, place, trained):
    return digits(place, rng.choice(['--epochs=3', '--lr=0.1', '-x', '--gpu', '--workdirs=a', '--confg.seed=1']))


@kind
def a_value_of_another_type(rng, place, trained):
    numbers = [k for k, v in base_keys().items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return digits(place, f'--config.{rng.choice(numbers)}={rng.choice(["ten", "1,2", "(1,)", "", "1e", "0x", "--"])}')


@kind
def a_fraction_for_a_whole_number(rng, place, trained):
    whole = [k for k, v in base_keys().items() if isinstance(v, int) and not isinstance(v, bool)]
    return digits(place, f'--config.{rng.choice(whole)}={rng.choice(["1.5", "0.1", "1e3", "inf", "nan"])}')


@kind
def no_boolean(rng, place, trained):
    return digits(place, rng.choice(['--config.plots=maybe', '--config.gan.conditional=2', '--config.plots=']))


@kind
def a_section_as_a_value(rng, place, trained):
    sections = sorted({k.rsplit('.', 1)[0] for k in base_keys() if '.' in k})
    return digits(place, f'--config.{rng.choice(sections)}={rng.choice(["1", "adam", "{}"])}')


@kind
def a_key_below_a_value(rng, place, trained):
    return digits(place, f'--config.{rng.choice(list(base_keys()))}.more=1')


@kind
def a_number_out_of_range(rng, place, trained):
    key = rng.choice([k for k in keys_with('interval') if base_keys()[k] is not None])
    low, high, low_allowed, high_allowed = default.KEYS[key].bounds()
    values = [low - 1] + [low] * (not low_allowed) + [high * 2 + 1] + [high] * (not high_allowed)
    value = rng.choice(values)
    return digits(place, f'--config.{key}={int(value) if isinstance(base_keys()[key], int) else value}')


@kind
def no_number(rng, place, trained):
    floats = [k for k, v in base_keys().items() if isinstance(v, float)]
    return digits(place, f'--config.{rng.choice(floats)}={rng.choice(["nan", "inf", "-inf"])}')


@kind
def an_unknown_name(rng, place, trained):
    key = rng.choice(keys_with('choices'))
    return digits(place, f'--config.{key}={rng.choice(["resnet19", "Best", "x y", "None"])}')


@kind
def an_unknown_name_among_several(rng, place, trained):
    return digits(place, f'--config.{rng.choice(keys_with("names"))}={rng.choice(["pgd,xyz", "fgms", "(1,2)"])}')


CONTRADICTIONS = [
    ['--config.train.algorithm=gan'],
    ['--config.model.name=sngan'],
    ['--config.data.label_noise.rate=0.2'],
    ['--config.attack.norm=l2', '--config.attack.names=fgsm'],
    ['--config.train.early_stopping_epochs=3', '--config.data.validation_fraction=0'],
    ['--config.train.epochs=0', '--config.train.steps=0'],
    ['--config.schedule.milestones=(0.9,0.1)'],
    ['--config.schedule.milestones=(0,1.5)'],
    ['--config.schedule.milestones=a'],
    ['--config.eval.curve=(1,0)'],
    ['--config.eval.curve=x'],
    ['--config.model.stem=imagenet'],
    ['--config.model.depth=(0,)'],
    ['--config.model.depth=()'],
    ['--config.model.depth=(-1,2)'],
    ['--config.model.depth=a'],
    ['--config.model.depth=(1.5,)'],
    ['--config.model.name=vgg11'],
    ['--config.data.batch_size=100000'],
    ['--config.data.subset_fraction=1e-9'],
    ['--config.data.validation_fraction=0.9999'],
    ['--config.train.ocnn.weight=1', '--config.train.ocnn.pattern=nosuchlayer'],
    ['--config.train.ocnn.weight=1', '--config.train.ocnn.pattern=('],
    ['--config.model.layer=oni', '--config.model.oni.groups=3'],
    ['--config.schedule.warmup_epochs=500'],
]


@kind
def a_contradiction(rng, place, trained):
    return digits(place, *rng.choice(CONTRADICTIONS))


@kind
def a_contradiction_of_a_GAN(rng, place, trained):
    choices = [
        ['--config.model.name=simple_cnn'],
        ['--config.gan.classifier=nowhere'],
        [f'--config.gan.classifier={place}'],
        ['--config.gan.augmentation=blur'],
        ['--config.gan.setting=Z'],
        ['--config.data.batch_size=5000'],
        ['--config.model.layer=oni', '--config.model.oni.groups=7'],
    ]
    return [f'--config={GAN}', '--config.train.steps=1', *rng.choice(choices), f'--workdir={place}/run']


# Detected only after the training, or after hours of attacks, unless it is checked first.
LATE = [
    ['--config.attack.epsilon=0'],
    ['--config.eval.suite=standard', '--config.attack.epsilon=0'],
    ['--config.eval.suite=standard', '--config.attack.epsilon=0', '--config.eval.parts=curve'],
    ['--config.eval.suite=standard', '--config.eval.curve=()'],
    ['--config.eval.suite=standard', '--config.eval.curve=(1,32)'],
    ['--config.eval.suite=standard', '--config.eval.curve=(0,1e400)'],
    ['--config.eval.suite=standard', '--config.eval.autoattack.attacks=()'],
]


@kind
def a_suite_that_would_fail_after_hours(rng, place, trained):
    names = [] if rng.random() < 0.5 else ['--config.attack.names=pgd']
    options = rng.choice(LATE)
    return digits(place, *(names if len(options) > 1 else ['--config.attack.names=pgd']), *options)


@kind
def images_too_few_for_a_score(rng, place, trained):
    key = rng.choice(['gan.score_examples', 'eval.samples'])
    return [
        f'--config={GAN}',
        '--config.train.steps=1',
        f'--config.{key}={rng.randint(1, 9)}',
        f'--workdir={place}/run',
    ]


@kind
def nothing_to_score_a_GAN_with(rng, place, trained):
    choices = [
        ['--config.gan.classifier=nowhere'],
        [f'--config.gan.classifier={copy_of(trained, place)}'],  # made unusable below
        ['--config.eval.features=inception', f'--config.eval.inception={place}/none.pth'],
        ['--config.eval.features=inception', f'--config.eval.inception={place}'],
    ]
    shutil.rmtree(place / 'run' / 'checkpoints')
    os.rename(place / 'run', place / 'classifier')
    chosen = [option.replace(f'{place}/run', f'{place}/classifier') for option in rng.choice(choices)]
    return [
        f'--config={GAN}',
        '--config.train.steps=1',
        '--config.gan.score_examples=0',
        *chosen,
        f'--workdir={place}/run',
    ]


@kind
def more_classes_than_there_are(rng, place, trained):
    classes = rng.choice([1, 2])
    image_folder(place, classes)
    losses = [['--config.attack.names=pgd', '--config.attack.loss=dlr']]
    losses += [['--config.eval.suite=standard', '--config.eval.autoattack.attacks=apgd-dlr']]
    losses += [['--config.eval.suite=standard', '--config.eval.parts=curve', '--config.attack.loss=dlr']]
    return on_images(place, *rng.choice(losses))


@kind
def None_where_it_is_no_value(rng, place, trained):
    keys = [k for k, v in base_keys().items() if v is not None and k not in ('data.name',)]
    return digits(place, rng.choice([f'--config.{rng.choice(keys)}=None', '--config.model.width=none']))


@kind
def a_config_given_twice(rng, place, trained):
    other = rng.choice([f'--config={GAN}', f'--config={DIGITS}', f'--config={CIFAR}'])
    return digits(place, *rng.choice([[other], other.split('=')]))


@kind
def a_stray_word(rng, place, trained):
    return digits(place, rng.choice(['epochs=3', 'train', '=', '10']))


@kind
def another_mode(rng, place, trained):
    return digits(place, f'--mode={rng.choice(["test", "evaluate", "TRAIN", ""])}')


@kind
def no_config(rng, place, trained):
    return [rng.choice(['--config.seed=1', '--config', '--config=', f'--config={place}']), f'--workdir={place}/run']


@kind
def no_such_config(rng, place, trained):
    return [f'--config=configs/{rng.choice(["nosuch.py", "digits", "default", "README.md"])}', f'--workdir={place}/run']


@kind
def processes_that_are_not_all_told(rng, place, trained):
    choices = [
        ['--coordinator=localhost:1234'],
        ['--num_processes=2'],
        ['--process_id=0', '--num_processes=2'],
        ['--coordinator=localhost', '--num_processes=2', '--process_id=0'],
        ['--coordinator=localhost:1234', '--num_processes=2', '--process_id=2'],
        ['--coordinator=localhost:1234', '--num_processes=two', '--process_id=0'],
        ['--coordinator=localhost:port', '--num_processes=1', '--process_id=0'],
        ['--coordinator=:', '--num_processes=1', '--process_id=0'],
        ['--coordinator=localhost:123456', '--num_processes=1', '--process_id=0'],
        ['--coordinator=localhost:1234', '--num_processes=-1', '--process_id=0'],
    ]
    return digits(place, *rng.choice(choices))


# --- a config file -----------------------------------------------------------------------------------


def config_file(place, body, head='from configs import default\n'):
    """A command with a config file whose get_config() has this body."""
    text = f'{head}\n\ndef get_config():\n    config = default.get_config()\n    {body}\n    return config\n'
    (place / 'own.py').write_text(text)
    return [f'--config={place}/own.py', '--config.train.steps=2', f'--workdir={place}/run']


@kind
def a_config_with_a_syntax_error(rng, place, trained):
    return config_file(place, rng.choice(['config.seed = = 1', 'if True', 'return (', '\tconfig.seed = 1\n  x', 'é$']))


@kind
def a_config_that_raises(rng, place, trained):
    bodies = ['1 / 0', 'raise SystemExit(0)', 'import nosuchmodule', 'open("/nowhere")', 'raise KeyError(3)']
    return config_file(place, rng.choice([*bodies, 'assert False', 'undefined', 'raise SystemExit("no")']))


@kind
def a_config_with_an_unknown_key(rng, place, trained):
    return config_file(place, rng.choice(['config.epochs = 3', 'config.train.lr = 1', 'config.data.path = "a"']))


@kind
def a_config_without_a_key(rng, place, trained):
    return config_file(
        place, rng.choice(['del config.seed', 'del config.train.steps', 'del config.gan', 'config.clear()'])
    )


@kind
def a_config_with_another_type(rng, place, trained):
    values = ['seed = "a"', 'train = 3', 'model.width = "wide"', 'data.batch_size = None', 'model.depth = {1: 2}']
    value = rng.choice([*values, 'train.epochs = [1]', 'seed = default.get_config()', 'optimizer.learning_rate = None'])
    return config_file(place, f'with config.unlocked(), config.ignore_type():\n        config.{value}')


@kind
def a_config_that_returns_something_else(rng, place, trained):
    return config_file(
        place, f'return {rng.choice(["{}", "None", "3", "config.to_dict()", "default", "config.train"])}'
    )


@kind
def a_config_without_get_config(rng, place, trained):
    texts = [
        '',
        'config = 1\n',
        'get_config = 3\n',
        'def get_config(x, y):\n    return x\n',
        'def config():\n    pass\n',
    ]
    (place / 'own.py').write_text(rng.choice(texts))
    return [f'--config={place}/own.py', f'--workdir={place}/run']


@kind
def a_config_that_is_no_text(rng, place, trained):
    (place / 'own.py').write_bytes(rng.choice([rng.randbytes(300), b'\0' * 50, b'\xff\xfe' + b'a\0' * 20]))
    return [f'--config={place}/own.py', f'--workdir={place}/run']
