"""Sweeps: what a grid becomes, the tables against NumPy, and small sweeps that run, fail, stop and go on."""

import csv
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from convnorm_jax.cli import sweep
from convnorm_jax.configs.keys import value_text
from convnorm_jax.reports import sweep as sweep_report
from convnorm_jax.runs import sweep as sweep_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = f'--config={ROOT}/configs/digits_convnorm.py'
NOISE = '--config.data.label_noise.kind=symmetric'
LAYERS = '--grid=model.layer=convnorm,batchnorm'
RATES = '--grid=data.label_noise.rate=0.0,0.2,0.4'
TINY = (
    DIGITS,
    '--config.model.width=4',
    '--config.model.depth=(1,)',
    '--config.model.layer=batchnorm',
    '--config.attack.names=()',
    '--config.schedule.kind=constant',
    '--noconfig.plots',
)


@pytest.fixture
def command(monkeypatch, run_main):
    """Function of arguments -> (exit code, stdout, lines of stderr), in this process, in the repository's root."""
    monkeypatch.chdir(ROOT)
    return functools.partial(run_main, sweep.main)


def accuracy(layer, rate, seed, name='test'):
    """An accuracy in [0, 1] for a run that never ran."""
    drawn = np.random.default_rng([len(layer), int(10 * rate), seed, len(name)])
    return float(drawn.uniform())


@pytest.fixture
def written(tmp_path):
    """The folder of a sweep whose runs are written by hand: two layers, three rates, seeds 0, 1, 2."""
    grid = {'model.layer': ['convnorm', 'batchnorm'], 'data.label_noise.rate': ['0.0', '0.2', '0.4']}
    for run in sweep.plan([DIGITS, NOISE], grid, [0, 1, 2], str(tmp_path)):
        place = *run.values.values(), run.seed
        result = {
            'test_accuracy': accuracy(*place),
            'pgd_accuracy': accuracy(*place, 'pgd'),
            'test_loss': 1.5,
            'data': 'digits',
            'seed': run.seed,
            'best_validation_accuracy': None,
            'epsilon': 8.0,
            'attacked_examples': 360,
        }
        os.makedirs(run.folder)
        for name, content in (('config.json', run.config.to_dict()), ('result.json', result)):
            pathlib.Path(run.folder, name).write_text(json.dumps(content))
    return tmp_path


def tables(text):
    """Cells of the Markdown tables in a text: a list of lists of lists."""
    blocks = re.findall(r'(?:^\|.*\|\n)+', text, re.MULTILINE)
    return [[[c.strip() for c in line.split('|')[1:-1]] for line in block.splitlines()] for block in blocks]


def mean_and_deviation(layer, rate, seeds, name='test'):
    values = np.array([100 * accuracy(layer, rate, seed, name) for seed in seeds])
    mean = values.sum() / len(values)
    return mean, np.sqrt(((values - mean) ** 2).sum() / (len(values) - 1))


def test_names_of_folders():
    runs = sweep.plan([DIGITS, NOISE], {'model.layer': ['oni', 'none'], 'data.label_noise.rate': ['0.40']}, [0, 1], 'x')
    assert [run.folder for run in runs[:2]] == [f'x/layer={n},label_noise.rate=0.4,seed=0' for n in ('oni', 'none')]
    assert [run.seed for run in runs] == [0, 0, 1, 1]
    assert runs[3].config.seed == 1 and runs[3].config.model.layer == 'none'
    assert runs[3].config.data.label_noise.rate == 0.4 and runs[3].config.data.label_noise.kind == 'symmetric'
    (odd,) = sweep.plan([DIGITS], {'model.depth': ['(1, 1)'], 'model.name': ['simple_cnn']}, [0], 'x')
    assert odd.folder == 'x/depth=1-1,model.name=simple_cnn,seed=0'


def test_tables_against_numpy(command, written):
    code, out, err = command(DIGITS, NOISE, LAYERS, RATES, '--seeds=0,1,2', f'--workdir={written}', '--mode=report')
    assert code == 0 and err == []
    found = tables(out)
    assert len(found) == 2  # test and PGD; without a number the validation has none
    for table, name in zip(found, ('test', 'pgd'), strict=True):
        assert table[0] == ['layer / label noise rate', '0', '0.2', '0.4']
        for line, layer in zip(table[2:], ('convnorm', 'batchnorm'), strict=True):
            expected = [
                '{:.2f} +- {:.2f}'.format(*mean_and_deviation(layer, r, (0, 1, 2), name)) for r in (0, 0.2, 0.4)
            ]
            assert line == [layer, *expected]
    assert out.index('test accuracy:') < out.index('PGD accuracy:')
    assert 'seeds 0, 1, 2' in out and 'data digits' in out and 'epsilon 8/255' in out
    markdown = (written / 'sweep.md').read_text()
    assert tables(markdown) == found and '--seeds=0,1,2' in markdown and '--mode' not in markdown


def test_csv_and_json_against_numpy(command, written):
    assert command(DIGITS, NOISE, LAYERS, RATES, '--seeds=2,0', f'--workdir={written}', '--mode=report')[0] == 0
    with open(written / 'sweep.csv', newline='') as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    record = json.loads((written / 'sweep.json').read_text())
    assert record['unit'] == '%' and len(record['runs']) == 12 and len(record['combinations']) == 6
    for line in lines:
        place = line['model.layer'], float(line['data.label_noise.rate'])
        mean, deviation = mean_and_deviation(*place, (2, 0), line['metric'].removesuffix('_accuracy'))
        assert float(line['mean_percent']) == pytest.approx(mean, rel=1e-12)
        assert float(line['standard_deviation_percent']) == pytest.approx(deviation, rel=1e-9)
        assert line['seeds'] == '2'
        (cell,) = [c for c in record['combinations'] if tuple(c['values'].values()) == place]
        assert cell['figures'][line['metric']]['mean'] == pytest.approx(mean, rel=1e-12)
    picture = (written / 'plots' / 'sweep.png').read_bytes()
    assert picture.startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('options', 'head', 'lines'),
    [
        (['--columns=model.layer'], ['label noise rate / layer', 'convnorm', 'batchnorm'], ['0', '0.2', '0.4']),
        (['--rows=data.label_noise.rate'], ['label noise rate / layer', 'convnorm', 'batchnorm'], ['0', '0.2', '0.4']),
        (
            ['--columns='],
            ['layer', 'label noise rate', 'test accuracy', 'PGD accuracy'],
            ['convnorm'] * 3 + ['batchnorm'] * 3,
        ),
        (
            ['--rows='],
            ['layer, label noise rate', *(f'{n}, {r}' for n in ('convnorm', 'batchnorm') for r in ('0', '0.2', '0.4'))],
            ['test accuracy', 'PGD accuracy'],
        ),
    ],
)  # fmt: skip
def test_rows_and_columns(command, written, options, head, lines):
    code, out, _ = command(DIGITS, NOISE, LAYERS, RATES, f'--workdir={written}', '--mode=report', *options)
    table = tables(out)[0]
    assert code == 0 and table[0] == head and [line[0] for line in table[2:]] == lines
    # One seed: a plain value.
    assert f'{100 * accuracy("convnorm", 0.0, 0):.2f}' in table[2] and '+-' not in out and 'seed 0' in out


def test_runs_that_are_missing_are_named(command, written):
    (written / 'layer=convnorm,label_noise.rate=0.2,seed=1' / 'result.json').unlink()
    arguments = DIGITS, NOISE, LAYERS, RATES, f'--workdir={written}', '--mode=report'
    code, out, err = command(*arguments, '--seeds=0,1,2')
    assert code == 0 and err == ['1 of 18 runs are not finished']
    assert 'Not finished, and not in the figures: layer=convnorm,label_noise.rate=0.2,seed=1.' in out
    mean, deviation = mean_and_deviation('convnorm', 0.2, (0, 2))
    assert f'{mean:.2f} +- {deviation:.2f} (2 of 3 seeds)' in tables(out)[0][2]
    code, out, _ = command(*arguments, '--seeds=1')
    assert tables(out)[0][2][2] == '-'


@pytest.mark.slow
def test_a_result_of_another_config_does_not_count(command, written):
    arguments = DIGITS, NOISE, LAYERS, RATES, f'--workdir={written}', '--mode=report'
    for change in ('--config.attack.epsilon=4', '--config.eval.examples=100', '--config.attack.names=pgd'):
        code, _, err = command(*arguments, change)
        assert code == 2 and len(err) == 1 and 'no finished run there' in err[0]
    assert command(*arguments, '--noconfig.plots', '--config.log.every_steps=3')[0] == 0
    # An evaluation by hand, with another epsilon.
    path = written / 'layer=convnorm,label_noise.rate=0,seed=0' / 'result.json'
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, 'epsilon': 4.0}))
    assert command(*arguments)[2] == ['1 of 6 runs are not finished']
    # One whose report failed in part, or that is cut short.
    for text in (json.dumps({**whole, 'incomplete': 'ValueError: x'}), '{"test_accuracy": 0.', '3'):
        path.write_text(text)
        assert command(*arguments)[2] == ['1 of 6 runs are not finished']


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([LAYERS], ['--workdir is missing']),
        (['--workdir=x', '--grid=model.layer'], ['--grid=model.layer', 'KEY=VALUE']),
        (['--workdir=x', '--grid=model.layer=a,,b'], ["config.model.layer='a'"]),
        (['--workdir=x', '--grid=model.layr=oni'], ['config.model.layr', 'did you mean config.model.layer?']),
        (['--workdir=x', '--grid=model.layer=oni,convnrom'], ["config.model.layer='convnrom'", 'convnorm']),
        (['--workdir=x', '--grid=model.width=4,wide'], ['config.model.width=wide', 'type']),
        (['--workdir=x', '--grid=train.epochs=1,1.0'], ['epochs=1,seed=0', 'twice']),
        (['--workdir=x', LAYERS, '--grid=model.layer=oni'], ['model.layer', 'twice']),
        (['--workdir=x', '--grid=seed=0,1'], ['--grid=seed=0,1', '--seeds']),
        (['--workdir=x', '--config.seed=1'], ['--config.seed', '--seeds']),
        (['--workdir=x', LAYERS, '--config.model.layer=oni'], ['--config.model.layer', '--grid']),
        (['--workdir=x', '--grid=plots=True,False', '--noconfig.plots'], ['--config.plots', '--grid']),
        (['--workdir=x', '--seeds=0,a'], ['--seeds=0,a', 'whole numbers']),
        (['--workdir=x', '--seeds=0,0'], ['--seeds=0,0', 'once']),
        (['--workdir=x', '--seeds=-1'], ['config.seed=-1', 'at least 0']),
        (['--workdir=x', '--jobs=0'], ['--jobs=0']),
        (['--workdir=x', '--mode=eval'], ['--mode=eval', 'report']),
        (['--workdir=x', '--grids=a=b'], ['--grids', '--grid']),
        (['--workdir=x', 'word'], ["'word': not understood"]),
        (['--workdir=x', LAYERS, '--rows=model.name'], ['--rows=model.name', 'model.layer']),
        (['--workdir=x', LAYERS, '--rows=model.layer', '--columns=model.layer'], ['each key of the grid once']),
        (['--workdir=x', '--config.train.epoch=3'], ['config.train.epoch', 'did you mean config.train.epochs?']),
        ([f'--workdir={ROOT}/README.md'], ['README.md', 'it is a file']),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(command, arguments, words):
    before = set(os.listdir(ROOT))
    code, out, err = command(DIGITS, *arguments)
    assert code == 2 and out == '' and len(err) == 1 and err[0].startswith('error: '), err
    place = 0
    for word in words:
        place = err[0].find(word, place)
        assert place >= 0, f'{word!r} not (in this order) in {err[0]!r}'
    assert set(os.listdir(ROOT)) == before


def test_no_config(command):
    code, _, err = command('--workdir=x', LAYERS)
    assert code == 2 and len(err) == 1 and '--config is missing' in err[0]


def test_a_folder_with_another_run(command, written):
    (written / 'layer=oni,seed=0' / 'checkpoints' / '5').mkdir(parents=True)
    content = (written / 'layer=convnorm,label_noise.rate=0,seed=0' / 'config.json').read_text()
    (written / 'layer=oni,seed=0' / 'config.json').write_text(content)
    code, _, err = command(DIGITS, '--grid=model.layer=oni', f'--workdir={written}')
    assert code == 2 and len(err) == 1 and "config.model.layer was 'convnorm', is now 'oni'" in err[0]


def test_values_as_people_write_them():
    assert [value_text(v) for v in (0.2, 30.0, 1e-4, 0.123456789, 3, True, 'oni', None)] == [
        '0.2', '30', '0.0001', '0.123456789', '3', 'True', 'oni', 'None',
    ]  # fmt: skip
    keys = ['model.name', 'data.name', 'data.label_noise.rate', 'model.groupnorm.groups', 'model.layer']
    short = ['model.name', 'data.name', 'label_noise.rate', 'groupnorm.groups', 'layer']
    assert list(sweep_lib.short_keys(keys).values()) == short


@pytest.mark.parametrize(
    ('keys', 'expected'),
    [([], ([], [])), (['a'], (['a'], [])), (['a', 'b'], (['a'], ['b'])), (['a', 'b', 'c'], (['a', 'b'], ['c']))],
)
def test_default_layout(keys, expected):
    assert sweep_report.layout(keys, None, None) == expected


@pytest.mark.slow
def test_a_sweep_that_runs_and_partly_fails(command, tmp_path):
    grid = '--grid=data.batch_size=64,128'
    tiny = *TINY, '--config.train.steps=3', f'--workdir={tmp_path}/sweep', '--jobs=2'
    code, out, err = command(*tiny, '--grid=data.batch_size=64,4096,128')
    assert code == 1
    assert any(
        line.startswith('[2/3] batch_size=4096,seed=0: failed: exit code 2: error: batch_size=4096') for line in err
    )
    assert err[-1] == '1 of 3 runs failed; rerun the same command to try them again'
    (table,) = tables(out)
    results = {n: tmp_path / 'sweep' / f'batch_size={n},seed=0' / 'result.json' for n in (64, 128)}
    for line, size in ((table[2], 64), (table[4], 128)):
        assert line[:2] == [str(size), f'{100 * json.loads(results[size].read_text())["test_accuracy"]:.2f}']
    assert table[3] == ['4096', '-', '-']
    # Again, without the failing one: nothing runs.
    before = {path: path.stat().st_mtime_ns for path in results.values()}
    code, out, err = command(*tiny, grid)
    assert code == 0 and len(err) == 1 and '2 runs in' in err[0] and '2 of them done before' in err[0]
    assert {path: path.stat().st_mtime_ns for path in results.values()} == before
    assert tables(out)[0][2:] == [table[2], table[4]]
    assert (tmp_path / 'sweep' / 'plots' / 'sweep.png').exists()


@pytest.mark.parametrize(
    ('script', 'problem'),
    [
        ('echo a; echo b >&2; exit 3', 'exit code 3: b'),
        ('exit 3', 'exit code 3: it said nothing'),
        ('echo a; kill -9 $$', 'killed by signal 9: a'),
        ('printf "1 %%\\r2 %%\\r"; exit 1', 'exit code 1: 2 %'),
        ('exit 0', 'no result.json of this config in'),
    ],
)
def test_how_a_run_failed(command, monkeypatch, tmp_path, script, problem):
    def start(_, log):
        return subprocess.Popen(['sh', '-c', script], stdout=log, stderr=log)

    monkeypatch.setattr(sweep_lib, '_start', start)
    code, _, err = command(DIGITS, f'--workdir={tmp_path}')
    assert code == 1 and err[2].startswith(f'[1/1] seed=0: failed: {problem}') and '1 of 1 runs failed' in err[3]


def test_an_earlier_result_is_kept(command, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep_lib, '_start', lambda _, log: subprocess.Popen(['false']))
    folder = tmp_path / 'seed=0'
    folder.mkdir()
    for number in (1, 2):
        (folder / 'result.json').write_text(str(number))
        assert command(DIGITS, f'--workdir={tmp_path}')[0] == 1
    assert [(folder / f'result-{number}.json').read_text() for number in (1, 2)] == ['1', '2']
    assert not (folder / 'result.json').exists()


def wait_for(condition, process):
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(command, quick_environment, tmp_path):
    folder = tmp_path / 'seed=0'
    process = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'convnorm_jax.cli.sweep',
            *TINY,
            f'--workdir={tmp_path}',
            '--config.train.steps=1000000',
        ],
        cwd=ROOT,
        env=quick_environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: (folder / 'log.txt').exists() and 'epoch ' in (folder / 'log.txt').read_text(), process)
    # Another sweep in the same folder leaves the run alone.
    other = command(*TINY, f'--workdir={tmp_path}', '--config.train.steps=1000000')
    assert other[0] == 1 and 'another process is working in' in other[2][1]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130 and 'Traceback' not in err
    step = int(re.search(r'seed=0: stopped and saved at step (\d+)', err)[1])
    assert err.splitlines()[-1] == 'stopped; rerun the same command to resume'
    assert str(step) in os.listdir(folder / 'checkpoints') and not (folder / 'result.json').exists()
    # A constant learning rate may train for another length: here one that ends.
    code, _, err = command(*TINY, f'--workdir={tmp_path}', f'--config.train.steps={step + 2}')
    result = json.loads((folder / 'result.json').read_text())
    assert code == 0 and result['checkpoint_step'] == step + 2, err
    rows = (folder / 'metrics.csv').read_text().splitlines()
    assert len(rows) > 2  # the epochs before and after the stop


def test_scores_of_generators(command, tmp_path):
    gan = f'--config={ROOT}/configs/digits_gan.py'
    for run in sweep.plan([gan], {'model.layer': ['convnorm', 'spectralnorm']}, [0, 1], str(tmp_path)):
        distance = accuracy(run.values['model.layer'], 0, run.seed)
        result = {'fid_classifier': distance, 'real_fid_classifier': 0.1, 'data': 'digits', 'seed': run.seed}
        os.makedirs(run.folder)
        for name, content in (('config.json', run.config.to_dict()), ('result.json', result)):
            pathlib.Path(run.folder, name).write_text(json.dumps(content))
    code, out, err = command(
        gan, LAYERS.replace('batch', 'spectral'), '--seeds=0,1', f'--workdir={tmp_path}', '--mode=report'
    )
    assert code == 0 and err == [] and 'Scores, mean' in out
    (table,) = tables(out)
    assert table[0] == ['layer', 'FID classifier']
    for line, layer in zip(table[2:], ('convnorm', 'spectralnorm'), strict=True):
        mean, deviation = (number / 100 for number in mean_and_deviation(layer, 0, (0, 1)))
        assert line == [layer, f'{mean:.2f} +- {deviation:.2f}']
