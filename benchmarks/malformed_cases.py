"""Mistakes of the kinds that people make, drawn at random, for benchmarks/malformed.py."""

import json
import os
import pickle
import shutil
import tarfile

import cv2
import numpy as np

from convnorm_jax.configs import default
from convnorm_jax.configs.keys import flatten

DIGITS, GAN, CIFAR = (f'configs/{name}.py' for name in ('digits_convnorm', 'digits_gan', 'cifar10_convnorm'))

# A run of a second. Whatever is taken for right by mistake ends soon, too.
SHORT = ['--config.train.steps=2', '--config.model.width=4', '--noconfig.plots', '--config.attack.names=()']
TINY = [f'--config={DIGITS}', *SHORT, '--config.model.depth=(1,)', '--config.checkpoint.every_steps=1']

KINDS = {}


def kind(function):
    """Registers a kind of mistake: (random.Random, its folder, a finished run) -> the arguments of the command."""
    KINDS[function.__name__.replace('_', ' ')] = function
    return function


def base_keys():
    """{key: value} of the base config."""
    return flatten(default.get_config())


def keys_with(attribute):
    """The keys that have choices, names or an interval."""
    return [name for name, key in default.KEYS.items() if getattr(key, attribute)]


def digits(place, *more):
    """A short command on digits with a run folder that is not there yet."""
    return [f'--config={DIGITS}', *SHORT, *more, f'--workdir={place}/run']


def copy_of(trained, place):
    """A copy of the finished run."""
    shutil.copytree(trained, place / 'run')
    return place / 'run'


def again(place, *more):
    """The command that the finished run was trained with, for its copy."""
    return [*TINY, *more, f'--workdir={place}/run']


def spoil(rng, path):
    """Cuts a file short, empties it, or overwrites a stretch of it with noise."""
    content = bytearray(path.read_bytes())
    how = rng.choice(['cut', 'empty', 'noise'])
    if how == 'noise':
        start = rng.randrange(len(content))
        content[start : start + 200] = rng.randbytes(min(200, len(content) - start))
        content[:4] = b'\xff\x00{]'  # wherever the noise falls, this can not be read
    path.write_bytes(
        content if how == 'noise' else content[: rng.randrange(len(content) // 2)] if how == 'cut' else b''
    )


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


# Found out only after the training, or after hours of attacks, unless it is looked at first.
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
    picture_folder(place, classes)
    losses = [['--config.attack.names=pgd', '--config.attack.loss=dlr']]
    losses += [['--config.eval.suite=standard', '--config.eval.autoattack.attacks=apgd-dlr']]
    losses += [['--config.eval.suite=standard', '--config.eval.parts=curve', '--config.attack.loss=dlr']]
    return on_pictures(place, *rng.choice(losses))


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


# --- data --------------------------------------------------------------------------------------------


def cifar(place, *more):
    """A command on the CIFAR-10 of place/data."""
    return [f'--config={CIFAR}', *SHORT, f'--config.data.data_dir={place}/data', *more, f'--workdir={place}/run']


def archive(place, count=40):
    """The files of the official archive, of few pictures."""
    folder = place / 'data' / 'cifar-10-batches-py'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch'):
        labels = [i % 10 for i in range(count)]
        batch = {b'data': rng.integers(0, 256, (count, 3072), np.uint8), b'labels': labels}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    (folder / 'batches.meta').write_bytes(pickle.dumps({b'label_names': [b'a%d' % i for i in range(10)]}, 2))
    return folder


@kind
def no_data(rng, place, trained):
    what = rng.choice(['absent', 'file', 'empty'])
    if what == 'file':
        (place / 'data').write_text('no folder')
    elif what == 'empty':
        (place / 'data').mkdir()
    return cifar(place, *rng.choice([[], ['--config.data.name=cifar100'], ['--config.data.name=svhn']]))


@kind
def a_damaged_archive(rng, place, trained):
    folder = archive(place)
    spoil(rng, rng.choice(sorted(folder.iterdir())))
    return cifar(place)


@kind
def an_archive_without_a_file(rng, place, trained):
    folder = archive(place)
    rng.choice(sorted(folder.iterdir())).unlink()
    return cifar(place)


@kind
def an_archive_of_other_contents(rng, place, trained):
    path = archive(place) / rng.choice(['data_batch_1', 'test_batch'])
    batch = pickle.loads(path.read_bytes())
    changes = [
        {b'data': batch[b'data'][:, :-1]},
        {b'data': batch[b'data'].astype(np.float32)},
        {b'labels': [10] * 40},
        {b'labels': [-1] * 40},
        {b'labels': [0] * 39},
        {b'labels': None},
        {b'labels': ['a'] * 40},
        {b'data': None},
    ]
    path.write_bytes(pickle.dumps({**batch, **rng.choice(changes)}, 2))
    return cifar(place)


@kind
def a_pickle_that_would_run_something(rng, place, trained):
    path = archive(place) / 'data_batch_2'
    path.write_bytes(b'cos\nsystem\n(S"touch %s/pwned"\ntR.' % str(place).encode())
    return cifar(place)


@kind
def a_damaged_tar(rng, place, trained):
    folder = archive(place)
    path = place / 'data' / 'cifar-10-python.tar.gz'
    with tarfile.open(path, 'w:gz') as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    spoil(rng, path)
    return cifar(place)


@kind
def a_damaged_TFDS_folder(rng, place, trained):
    folder = place / 'data' / 'cifar10' / '3.0.2'
    folder.mkdir(parents=True)
    info = {
        'name': 'cifar10',
        'version': '3.0.2',
        'fileFormat': rng.choice(['array_record', 'tfrecord', 'array_record']),
    }
    info['splits'] = [{'name': name, 'shardLengths': ['10'], 'numBytes': '9'} for name in ('train', 'test')]
    texts = [json.dumps(info), json.dumps(info)[:-9], '[]', '', json.dumps({**info, 'splits': 3})]
    (folder / 'dataset_info.json').write_text(rng.choice(texts))
    if rng.random() < 0.5:
        (folder / 'features.json').write_text(rng.choice(['{', '{}', '[1]']))
    (folder / 'cifar10-train.array_record-00000-of-00001').write_bytes(rng.randbytes(500))
    return cifar(place)


def picture_folder(place, classes):
    """Class folders of small pictures in place/data; returns the paths of the pictures to train with."""
    paths = []
    for part in ('train', 'val'):
        for name in 'abcd'[:classes]:
            folder = place / 'data' / part / name
            folder.mkdir(parents=True)
            for i in range(6):
                path = folder / f'{i}.png'
                cv2.imwrite(str(path), np.full((16, 16, 3), 20 * i + 10, np.uint8))
                paths += [path] if part == 'train' else []
    return paths


def on_pictures(place, *more):
    """A command on these folders."""
    sizes = {'image_size': 16, 'batch_size': 4, 'validation_fraction': 0, 'workers': 0, 'data_dir': f'{place}/data'}
    options = ['--config.data.name=folder', *(f'--config.data.{key}={value}' for key, value in sizes.items())]
    return digits(place, *options, *more)


@kind
def a_folder_without_pictures(rng, place, trained):
    for path in picture_folder(place, 3):
        if rng.random() < 0.5 or path.parent.name == 'a':
            path.unlink()
    (place / 'data' / 'train' / 'a').rename(place / 'data' / 'train' / rng.choice(['z', 'x.jpg']))
    return on_pictures(place)


# --- the run folder ----------------------------------------------------------------------------------


@kind
def a_run_folder_that_is_a_file(rng, place, trained):
    (place / 'run').write_text('no folder')
    return [*digits(place)[:-1], f'--workdir={place}/run{rng.choice(["", "/below", "/a/b"])}']


@kind
def a_run_folder_that_can_not_be(rng, place, trained):
    names = ['/proc/run', '/sys/run', '/dev/null', '/dev/null/run', f'{place}/{"x" * 300}', f'{place}/a\0b'[:-2]]
    return [*digits(place)[:-1], f'--workdir={rng.choice(names[:5])}']


@kind
def a_folder_of_another_run(rng, place, trained):
    copy_of(trained, place)
    others = ['model.layer=batchnorm', 'seed=3', 'optimizer.learning_rate=0.3', 'train.steps=5', 'data.batch_size=32']
    return again(place, f'--config.{rng.choice(others)}')


@kind
def a_damaged_config_json(rng, place, trained):
    path = copy_of(trained, place) / 'config.json'
    saved = json.loads(path.read_text())
    texts = ['{', '', '[]', '3', 'null', '{}', json.dumps({**saved, 'model': 3}), json.dumps({**saved, 'seed': 'a'})]
    texts += [json.dumps({**saved, 'train': {**saved['train'], 'steps': None}}), json.dumps(saved)[:-30], '{"a": {}}']
    path.write_text(rng.choice(texts))
    return rng.choice([again(place), ['--mode=eval', f'--workdir={place}/run']])


@kind
def no_config_json(rng, place, trained):
    (copy_of(trained, place) / 'config.json').unlink()
    return rng.choice([again(place), ['--mode=eval', f'--workdir={place}/run']])


@kind
def a_damaged_record_of_the_splits(rng, place, trained):
    spoil(rng, copy_of(trained, place) / 'splits.npz')
    return again(place)


@kind
def other_splits(rng, place, trained):
    path = copy_of(trained, place) / 'splits.npz'
    record = dict(np.load(path))
    record['train_indices'] = record['train_indices'][::-1] if rng.random() < 0.5 else record['train_indices'][:-3]
    np.savez(path, **record)
    return again(place)


@kind
def nothing_to_evaluate(rng, place, trained):
    if rng.random() < 0.5:
        shutil.rmtree(copy_of(trained, place) / 'checkpoints')
        if rng.random() < 0.5:
            (place / 'run' / 'checkpoints').mkdir()
    return ['--mode=eval', f'--workdir={place}/run']


@kind
def an_evaluation_of_another_net(rng, place, trained):
    copy_of(trained, place)
    others = ['--config.model.width=8', '--config.model.name=resnet18', '--config.seed=2', '--config.nosuch=1']
    return ['--mode=eval', f'--workdir={place}/run', rng.choice(others)]


@kind
def only_damaged_checkpoints_to_evaluate(rng, place, trained):
    steps = sorted((copy_of(trained, place) / 'checkpoints').iterdir())
    for step in steps:
        for path in (step / 'arrays').rglob('*') if rng.random() < 0.5 else [step / 'progress' / 'metadata']:
            if path.is_file():
                path.write_bytes(b'')
    return ['--mode=eval', f'--workdir={place}/run']


@kind
def checkpoints_of_another_net(rng, place, trained):
    path = copy_of(trained, place) / 'config.json'
    saved = json.loads(path.read_text())
    saved['model']['width'] = 8
    path.write_text(json.dumps(saved))
    return rng.choice([again(place, '--config.model.width=8'), ['--mode=eval', f'--workdir={place}/run']])


@kind
def a_run_past_the_end(rng, place, trained):
    path = copy_of(trained, place) / 'config.json'
    saved = json.loads(path.read_text())
    saved['train']['steps'], saved['schedule']['kind'] = 1, 'constant'
    path.write_text(json.dumps(saved))
    return again(place, '--config.train.steps=1', '--config.schedule.kind=constant')


@kind
def a_suite_that_can_not_be(rng, place, trained):
    copy_of(trained, place)
    choices = [
        'eval.suite=fast',
        'eval.parts=all',
        'eval.autoattack.attacks=pgd',
        'eval.simba.step_size=0',
        'eval.features=x',
    ]
    return ['--mode=eval', f'--workdir={place}/run', f'--config.{rng.choice(choices)}']


assert len(KINDS) >= 30 and os.sep == '/'
