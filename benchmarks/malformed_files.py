"""Mistakes in the data and in the run folder, for benchmarks/malformed.py."""

import json
import pickle
import shutil
import tarfile

import numpy as np

from benchmarks.malformed_base import (
    CIFAR,
    SHORT,
    again,
    copy_of,
    digits,
    image_folder,
    on_images,
    registry,
    spoil,
)

KINDS, kind = registry()


# --- data --------------------------------------------------------------------------------------------


def cifar(place, *more):
    """A command on the CIFAR-10 of place/data."""
    return [f'--config={CIFAR}', *SHORT, f'--config.data.data_dir={place}/data', *more, f'--workdir={place}/run']


def archive(place, count=40):
    """The files of the official archive, with few images."""
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


@kind
def a_folder_without_images(rng, place, trained):
    for path in image_folder(place, 3):
        if rng.random() < 0.5 or path.parent.name == 'a':
            path.unlink()
    (place / 'data' / 'train' / 'a').rename(place / 'data' / 'train' / rng.choice(['z', 'x.jpg']))
    return on_images(place)


# --- the run folder ----------------------------------------------------------------------------------


@kind
def a_run_folder_that_is_a_file(rng, place, trained):
    (place / 'run').write_text('no folder')
    return [*digits(place)[:-1], f'--workdir={place}/run{rng.choice(["", "/below", "/a/b"])}']


@kind
def a_run_folder_that_cannot_be(rng, place, trained):
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
