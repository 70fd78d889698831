"""Measures how many images a second the host can read, decode and crop, by the number of workers.

    python -m benchmarks.input [--workers=0,1,2,4] [--data_dir=DIR] [--name=folder] [--image_size=224]
        [--batch_size=64] [--images=512] [--seconds=10] [--needed=0] [--config=configs/imagenet_convnorm.py]
        [--output=FILE.json]

The batches are those of `data.streaming`, as in the training loop, from DIR (a folder with train/ and val/, or a
TFDS directory with --name=imagenet). Without DIR they are from JPEGs made for this: 500x375, quality 90. 0 workers
means threads of the main process. Time starts with the second batch of each worker, when all of them run. The table
also shows what training needs: --needed=N images a second, or, if that is 0, the measured rate of steps of the
config's net on one batch that stays on the device. --needed=-1 leaves it out.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import cv2
import jax
import numpy as np

from benchmarks import machine
from convnorm_jax.cli.command_line import read_config
from convnorm_jax.data import sources, streaming
from convnorm_jax.files import write_json
from convnorm_jax.steps import classify
from convnorm_jax.steps.state import create_state, make_optimizer
from convnorm_jax.training.nets import build_model

SHAPE, QUALITY = (375, 500), 90  # the size of most images of ImageNet
CLASSES = 4


def main():
    """Prints one table, and writes it to --output."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        if not options.data_dir:
            make_images(folder, options.images)
        source = sources.load_source(options.name, options.data_dir or folder, image_size=options.image_size, workers=0)
        rows = [
            {'workers': int(workers), 'images_per_second': reading_speed(source, int(workers), options)}
            for workers in options.workers.split(',')
        ]
    needed = options.needed or training_speed(options)
    _print(rows, needed, options, source)
    if options.output:
        found = {'machine': machine.description(), 'options': vars(options), 'needed': needed, 'rows': rows}
        write_json(options.output, found)


def make_images(folder, count):
    """Writes train/ and val/ with `count` and a few JPEGs that take as long to decode as photographs."""
    rng = np.random.default_rng(0)
    for part, number in (('train', count), ('val', CLASSES)):
        for i in range(number):
            path = Path(folder) / part / f'class{i % CLASSES}' / f'{i:05d}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            # Noise of several scales, stronger at larger ones: about 100 kB, as in ImageNet.
            image = np.full((*SHAPE, 3), 128.0)
            for cell in (64, 16, 4, 1):
                noise = rng.normal(0, 4 * cell**0.6, (SHAPE[0] // cell + 1, SHAPE[1] // cell + 1, 3))
                image += cv2.resize(noise, SHAPE[::-1], interpolation=cv2.INTER_LINEAR)
            cv2.imwrite(str(path), np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def reading_speed(source, workers, options):
    """Images a second of the training batches, over --seconds."""
    train = source.train
    load = streaming.TrainingBatches(train.images, train.labels, options.batch_size, 'resized_crop_flip', seed=0)
    batches = streaming.read(load, 10**6, workers=workers)
    for _ in range(2 * max(workers, 1)):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < options.seconds:
        count += len(next(batches)['labels'])
    found = count / (time.perf_counter() - start)
    batches.close()
    return found


def training_speed(options, steps=5):
    """Images a second of training steps of the config's net on the first device."""
    config = read_config([f'--config={options.config}'])
    model = build_model(config, num_classes=1000)
    tx = make_optimizer('sgd', 0.1, momentum=0.9)
    mean, std = (0.5,) * 3, (0.25,) * 3
    step = classify.make_train_step(model, tx, mean=mean, std=std, augment_fn=lambda key, images: images)
    shape = (options.image_size, options.image_size, 3)
    state = jax.jit(lambda: create_state(model, tx, shape, 0))()
    images = np.random.default_rng(0).integers(0, 256, (options.batch_size, *shape), dtype=np.uint8)
    batch = jax.device_put({'images': images, 'labels': np.zeros(options.batch_size, np.int32)})
    run = jax.jit(step, donate_argnums=0)
    state, _ = run(state, batch)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(steps):
        state, _ = run(state, batch)
    jax.block_until_ready(state)
    return steps * options.batch_size / (time.perf_counter() - start)


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--workers', default='0,1,2,4')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--name', default='folder', choices=sources.STREAMED)
    parser.add_argument('--config', default=os.path.join('configs', 'imagenet_convnorm.py'))
    for name, value in (('image_size', 224), ('batch_size', 64), ('images', 512)):
        parser.add_argument(f'--{name}', type=int, default=value)
    for name, value in (('seconds', 10.0), ('needed', 0.0)):
        parser.add_argument(f'--{name}', type=float, default=value)
    parser.add_argument('--output')
    return parser.parse_args()


def _print(rows, needed, options, source):
    print(f'{source.description}, batch {options.batch_size}; {machine.description()}')
    if needed > 0:
        print(f'training needs {needed:,.1f} images/s')
    print('| workers | images/s | of what training needs |')
    print('|---:|---:|---:|')
    for row in rows:
        speed = row['images_per_second']
        share = f'{speed / needed:.1f} times' if needed > 0 else ''
        print(f'| {row["workers"]} | {speed:,.0f} | {share} |')


if __name__ == '__main__':
    main()
