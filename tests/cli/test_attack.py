"""`convnorm attack`: a net of one's own, its report, and what people get wrong."""

import json
import os
import pathlib
import sys

import numpy as np
import pytest

from convnorm_jax.cli import attack

pytestmark = pytest.mark.usefixtures('quick_compilation', 'short_programs')

NET = """
import jax.numpy as jnp
import numpy as np
import tables  # from its own folder

def net():
    return lambda x: (x.reshape(len(x), -1) - 0.5) @ jnp.asarray(tables.WEIGHTS, jnp.float32)

def broken():
    return 1 / 0

def no_net():
    return 3
"""
TABLES = """
import numpy as np
WEIGHTS = np.random.default_rng(0).normal(size=(16, 3))
"""


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Function of arguments -> (exit code, stdout, lines of stderr), in a folder with net.py and images.npz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delitem(sys.modules, 'tables', raising=False)
    (tmp_path / 'net.py').write_text(NET)
    (tmp_path / 'tables.py').write_text(TABLES)
    images = np.random.default_rng(1).integers(90, 166, (12, 4, 4, 1), np.uint8)
    weights = np.random.default_rng(0).normal(size=(16, 3))
    labels = ((images.reshape(12, -1) / 255 - 0.5) @ weights).argmax(1)
    np.savez('images.npz', images=images, labels=labels)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['attack', *arguments])
        capsys.readouterr()
        code = attack.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def test_a_net_of_ones_own(command):
    few = ('--attacks=apgd-ce,apgd-dlr', '--batch_size=5', '--epsilon=4')
    code, out, err = command('--model=net.py:net', '--images=images.npz', *few)
    assert code == 0, err
    content = json.loads(pathlib.Path('attack/attack.json').read_text())
    assert f'**Robust accuracy {100 * content["robust_accuracy"]:.2f} %**' in out
    assert pathlib.Path('attack/attack.md').read_text().strip() in out
    with np.load('attack/adversarial.npz') as file, np.load('images.npz') as given:
        assert file['robust'].mean() == content['robust_accuracy'] < 1
        clean = given['images'] / np.float32(255)
        assert 0 < np.abs(file['images'] - clean).max() <= 4 / 255 * 1.001
        np.testing.assert_array_equal(file['labels'], given['labels'])
    assert content['autoattack']['attacks'][0]['name'] == 'apgd-ce' and content['autoattack']['accuracy_again'] <= 1
    # The same command again resumes from what there is.
    code, _, err = command('--model=net.py:net', '--images=images.npz', *few)
    assert code == 0 and any('resuming from attack/state.npz' in line for line in err)
    # The first few images alone.
    assert command('--model=net.py:net', '--images=images.npz', '--examples=7', '--output=seven', *few)[0] == 0
    assert json.loads(pathlib.Path('seven/attack.json').read_text())['examples'] == 7


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--images=images.npz',), '--model is missing: give --model=FILE.py:FUNCTION'),
        (('--model=net.py:net',), '--images is missing: give --images=FILE.npz'),
        (('--model=net.py', '--images=images.npz'), 'expected FILE.py:FUNCTION'),
        (('--model=none.py:net', '--images=images.npz'), 'there is no file none.py'),
        (('--model=net.py:other', '--images=images.npz'), 'there is no function other in net.py'),
        (('--model=net.py:broken', '--images=images.npz'), 'ZeroDivisionError: division by zero'),
        (('--model=net.py:no_net', '--images=images.npz'), 'net is a int: expected'),
        (('--model=net.py:net', '--images=net.py'), '--images=net.py: cannot be read as a .npz file'),
        (('--model=net.py:net', '--images=none.npz'), '--images=none.npz: cannot be read'),
        (('--model=net.py:net', '--images=other.npz'), 'holds x; expected images and labels'),
        (('--model=net.py:net', '--images=images.npz', '--norm=l3'), 'l3'),
        (('--model=net.py:net', '--images=images.npz', '--attacks=apgd'), "'apgd', expected some of"),
        (('--model=net.py:net', '--images=images.npz', '--output=net.py'), '--output=net.py: cannot write there'),
        (('--model=net.py:net', '--images=images.npz', '--config=x'), 'config'),
    ],
)
def test_a_mistake_is_one_line(command, arguments, words):
    np.savez('other.npz', x=np.zeros(3))
    code, _, err = command(*arguments)
    assert code == 2 and err[-1].startswith('error: ') and words in err[-1], err
    assert os.path.isfile('net.py')
