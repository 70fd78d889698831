"""A folder of pictures from the command line: trained, killed, stopped, resumed, evaluated, attacked."""

import json
import os
import pathlib
import signal

import grain  # noqa: F401 - its flags must be there before the `command` notes which there are
import numpy as np
import pytest

from convnorm_jax.runs.metrics import read_rows
from convnorm_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN = [
    f'--config={ROOT}/configs/digits_convnorm.py',
    '--config.data.name=folder',
    '--config.data.image_size=16',
    '--config.data.batch_size=8',
    '--config.data.augmentation=resized_crop_flip',
    '--config.data.validation_fraction=0.16',  # 2 of 13
    '--config.data.workers=0',
    '--config.model.width=4',
    '--config.model.depth=(1,)',
    '--config.train.epochs=3',
    '--config.checkpoint.every_steps=3',
    '--config.attack.pgd_steps=2',
]


class Kill(BaseException):
    """Ends a run from within, with nothing saved."""


@pytest.fixture
def run(command, monkeypatch):
    """Function of (workdir, what happens before which step of the call, arguments) -> (exit code or None, greys).

    The greys are those of the pictures of every step that was taken.
    """

    def call(workdir, accidents, *arguments):
        seen, next_batch = [], loop._Run._next_batch

        def watched(self):
            accidents.get(len(seen), lambda: None)()
            batch = next_batch(self)
            seen.append(np.round(np.asarray(batch[0], float).mean((1, 2, 3)) / 5).astype(int).tolist())
            return batch

        with monkeypatch.context() as patch:
            patch.setattr(loop._Run, '_next_batch', watched)
            try:
                code, *_ = command(*TRAIN, f'--workdir={workdir}', '--noconfig.plots', *arguments)
            except Kill:
                code = None
        return code, seen

    return call


def kill():
    raise Kill


@pytest.mark.slow
def test_killed_stopped_resumed(run, command, make_picture_folder, tmp_path, quick_compilation):
    data = f'--config.data.data_dir={make_picture_folder(tmp_path / "bugs")}'
    code, whole = run(tmp_path / 'whole', {}, data)
    assert code == 0 and len(whole) == 12
    # Killed before step 6, of which step 3 is saved; then stopped after two more steps, in the second epoch.
    code, first = run(tmp_path / 'parts', {5: kill}, data)
    assert code is None and first == whole[:5]
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    code, second = run(tmp_path / 'parts', {1: stop}, data)
    steps = len(second)
    assert code == 128 + signal.SIGTERM
    start = next(n for n in range(6) if whole[n : n + steps] == second)
    assert start in (3, 4)  # the end of the first epoch is saved too
    code, third = run(tmp_path / 'parts', {}, data)
    assert code == 0 and whole[:start] + second + third == whole
    for epoch in range(3):
        greys = [grey for step in whole[4 * epoch : 4 * epoch + 4] for grey in step]
        assert len(set(greys)) == 32 and max(greys) < 39
    rows = [read_rows(tmp_path / name / 'metrics.csv') for name in ('whole', 'parts')]
    for one, other in zip(*rows, strict=True):
        assert {**one, 'examples_per_second': 0} == {**other, 'examples_per_second': 0}
    results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'parts')]
    differ = {key for key in results[0] if results[0][key] != results[1][key]}
    assert differ <= {'examples_per_second', 'training_seconds'}

    result = results[0]
    assert result['data'] == 'images in bugs (3 classes) at 16x16'
    assert (result['train_examples'], result['test_examples'], result['attacked_examples']) == (33, 12, 12)

    code, out, err = command(
        '--mode=eval',
        f'--workdir={tmp_path / "whole"}',
        '--config.eval.examples=5',
        '--config.eval.suite=standard',
        '--config.eval.parts=curve',
        '--config.eval.curve=(0.0,1.0)',
        '--config.attack.names=fgsm',
        '--config.plots',
    )
    again = json.loads((tmp_path / 'whole' / 'result.json').read_text())
    assert code == 0 and again['test_accuracy'] == result['test_accuracy'] and again['test_examples'] == 12
    assert again['attacked_examples'] == 5 and 'curve on 5 examples' in err
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.splitlines() if line.startswith('| ')]
    assert {row[0]: row[-1] for row in cells[1:]} == {'clean': '12', 'FGSM': '5'}
    assert (tmp_path / 'whole' / 'plots' / 'attacks.png').exists()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--config.data.name=folder'], "expected the folders train and val in it for name='folder'"),
        (['--config.data.name=imagenet'], 'imagenet2012 is TFDS-prepared'),
        (['--config.data.augmentation=resized_crop'], "the resized ones are for 'imagenet', 'folder'"),
        (['--config.data.workers=-1'], 'config.data.workers=-1: expected at least 0'),
        (['--config.data.image_size=0'], 'config.data.image_size=0: expected at least 1'),
    ],
)
def test_mistakes(command, tmp_path, arguments, words):
    code, out, err = command(
        TRAIN[0], *arguments, f'--workdir={tmp_path / "run"}', f'--config.data.data_dir={tmp_path}'
    )
    assert code == 2 and out == '' and len(err) == 1 and words in err[0]
    assert not (tmp_path / 'run').exists()


def test_a_broken_picture_ends_the_run_with_its_name(command, make_picture_folder, tmp_path, quick_compilation):
    root = make_picture_folder(tmp_path / 'bugs')
    broken = root / 'train' / 'bee' / '003.jpg'
    broken.write_bytes(b'')
    code, _, err = command(*TRAIN, f'--workdir={tmp_path / "run"}', f'--config.data.data_dir={root}')
    assert code == 2 and f'error: {broken}: expected an image' in err[-1]
