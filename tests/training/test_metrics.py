"""metrics.csv across resumes, means of (sum, count) pairs, TensorBoard events."""

import math

import jax.numpy as jnp
import pytest

from convnorm_jax.runs.metrics import MetricWriter, read_lines, read_rows
from convnorm_jax.training.classification import COLUMNS
from convnorm_jax.training.totals import means, zero_totals


def row(epoch, **values):
    return {'epoch': epoch, 'step': 10 * epoch, 'train_loss': 1 / epoch, 'learning_rate': 0.1, **values}


@pytest.fixture
def written(tmp_path):
    """Folder of a run of three epochs."""
    writer = MetricWriter(str(tmp_path), 0, COLUMNS)
    for epoch in (1, 2, 3):
        writer.write(row(epoch, validation_accuracy=epoch / 7))
    writer.close()
    return tmp_path


def test_rows_come_back_as_written(written):
    assert read_rows(str(written / 'metrics.csv')) == [row(e, validation_accuracy=e / 7) for e in (1, 2, 3)]
    assert (written / 'metrics.csv').read_text().splitlines()[0] == ','.join(COLUMNS)
    assert len(list(written.glob('events.out.tfevents.*'))) == 1


def test_rows_after_the_restored_step_are_dropped(written):
    before = (written / 'metrics.csv').read_bytes()
    writer = MetricWriter(str(written), 20, COLUMNS)
    assert [r['step'] for r in read_rows(writer.path)] == [10, 20]
    writer.write(row(3, validation_accuracy=3 / 7))
    writer.close()
    assert (written / 'metrics.csv').read_bytes() == before  # byte for byte that of an uninterrupted run


def test_a_start_from_nothing_keeps_nothing(written):
    MetricWriter(str(written), 0, COLUMNS).close()
    assert (written / 'metrics.csv').read_text().splitlines() == [','.join(COLUMNS)]


def test_a_step_between_two_epochs_keeps_the_rows_before(written):
    MetricWriter(str(written), 25, COLUMNS).close()
    assert [r['step'] for r in read_rows(str(written / 'metrics.csv'))] == [10, 20]


def test_absent_values_are_left_out(tmp_path):
    writer = MetricWriter(str(tmp_path), 0, COLUMNS)
    writer.write(row(1))
    writer.close()
    MetricWriter(str(tmp_path), 10, COLUMNS).close()  # rewrites the file
    assert read_rows(str(tmp_path / 'metrics.csv')) == [row(1)]


def test_nan_is_kept(tmp_path):
    writer = MetricWriter(str(tmp_path), 0, COLUMNS)
    writer.write(row(1, validation_loss=math.nan))
    writer.close()
    assert math.isnan(read_rows(str(tmp_path / 'metrics.csv'))[0]['validation_loss'])


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(str(tmp_path / 'metrics.csv')) == []


def test_means():
    found = means({'loss': (jnp.float32(6), jnp.float32(4)), 'accuracy': (jnp.float32(jnp.nan), jnp.float32(2))})
    assert found['loss'] == 1.5 and math.isnan(found['accuracy'])
    assert all(math.isnan(v) for v in means(zero_totals(['loss'])).values())
    assert set(zero_totals(('a', 'b'))) == {'a', 'b'}


def test_json_lines_hold_rows_and_what_is_between_and_survive_a_resume(tmp_path):
    writer = MetricWriter(str(tmp_path), 0, COLUMNS)
    writer.scalars({'running_loss': 0.5}, 5)
    writer.write(row(1))
    writer.scalars({'running_loss': 0.4}, 15)
    whole = (tmp_path / 'metrics.jsonl').read_text()
    writer.scalars({'running_loss': 0.3}, 17)
    writer.close()
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 1')  # cut short
    MetricWriter(str(tmp_path), 10, COLUMNS, 16).close()
    assert (tmp_path / 'metrics.jsonl').read_text() == whole
    assert [line['step'] for line in read_lines(str(tmp_path / 'metrics.jsonl'))] == [5, 10, 15]
