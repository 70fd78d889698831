"""The README's code runs as it stands, and its commands are those of CI."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def blocks(language, text=README):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.S | re.M)


LAYER = README.split('## The layer in your own net')[1].split('\n## ')[0]
LAYER_PAGE = (ROOT / 'docs' / 'layer.md').read_text()


def run(code, name):
    found = {'__name__': 'documentation'}
    exec(compile(code, name, 'exec'), found)
    return found


@pytest.mark.parametrize('library', ['linen', 'nnx', 'equinox'])
def test_the_layer_examples_run(library):
    if library == 'equinox':
        pytest.importorskip('equinox')
    codes = blocks('python', LAYER)
    assert len(codes) == 3
    (code,) = (code for code in codes if f'import {library}' in code)
    assert len([line for line in code.splitlines() if line.strip() and not re.search(r'^(from|import) ', line)]) <= 10
    assert run(code, 'README.md')['logits'].shape == (64, 10)


def test_the_training_loop_learns(capsys):
    code = blocks('python', LAYER_PAGE)[0]
    run(code, 'docs/layer.md')
    assert float(re.search(r'loss ([\d.]+)', capsys.readouterr().out)[1]) < 2.0  # chance is ln 10 = 2.30


def test_the_other_examples_of_that_page(capsys):
    functions, nnx, equinox = blocks('python', LAYER_PAGE)[1:]
    assert run(functions, 'docs/layer.md')['y'].shape == (8, 32, 32, 16)
    assert run(nnx, 'docs/layer.md')['logits'].shape == (64, 10)
    assert capsys.readouterr().out.strip() == blocks('text', LAYER_PAGE)[0].strip()
    pytest.importorskip('equinox')
    assert run(equinox, 'docs/layer.md')['logits'].shape == (64, 10)


def test_ci_runs_the_readmes_test_line():
    line = next(line for line in blocks('bash') if 'pytest' in line).strip()
    assert line in (ROOT / '.ci' / 'run').read_text().splitlines()


def test_every_named_config_exists():
    names = re.findall(r'`(\w+\.py)`', README.split('| config | what |')[1].split('\n\n')[0])
    assert sorted(names) == sorted(
        path.name for path in (ROOT / 'configs').glob('*.py') if path.stem not in ('__init__', 'default')
    )
