"""The README and the pages of the site: their code runs, what they name exists. The build runs the notebooks."""

import ast
import importlib
import importlib.util
import json
import pathlib
import re

import pytest

from convnorm_jax.cli.convnorm import COMMANDS

pytestmark = pytest.mark.usefixtures('quick_compilation')
ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
DOCS = ROOT / 'docs'
PAGES = sorted(p for p in DOCS.rglob('*.md') if '_build' not in p.parts)
RESULTS = sorted((DOCS / 'results').glob('*.json'))
CONFIGS = {p.stem for p in (ROOT / 'convnorm_jax' / 'configs').glob('*.py')} - {'__init__', 'default', 'keys'}


def blocks(language, text=README):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.S | re.M)


LAYER = README.split('## The layer in your own net')[1].split('\n## ')[0]
NET_PAGE = (DOCS / 'your_net.md').read_text()


def run(code, name):
    found = {'__name__': 'documentation'}
    exec(compile(code, name, 'exec'), found)
    return found


def extension(name):
    """A module of docs/_ext, without Sphinx where it needs none."""
    spec = importlib.util.spec_from_file_location(f'documentation_{name}', DOCS / '_ext' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize('library', ['linen', 'nnx', 'equinox'])
def test_the_layer_examples_run(library):
    if library == 'equinox':
        pytest.importorskip('equinox')
    codes = blocks('python', LAYER)
    assert len(codes) == 3
    (code,) = (code for code in codes if f'import {library}' in code)
    assert len([line for line in code.splitlines() if line.strip() and not re.search(r'^(from|import) ', line)]) <= 10
    assert run(code, 'README.md')['logits'].shape == (64, 10)


def test_the_page_has_the_readmes_examples():
    assert blocks('python', NET_PAGE)[:3] == blocks('python', LAYER)


@pytest.mark.slow
def test_the_training_loop_learns(capsys):
    run(blocks('python', NET_PAGE)[3], 'docs/your_net.md')
    assert float(re.search(r'loss ([\d.]+)', capsys.readouterr().out)[1]) < 2.0  # chance is ln 10 = 2.30


@pytest.mark.slow
def test_the_training_loop_of_nnx_learns_and_its_net_is_restored(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = run('\n'.join(blocks('python', NET_PAGE)[4:6]), 'docs/your_net.md')
    assert float(re.search(r'loss ([\d.]+)', capsys.readouterr().out)[1]) < 2.0
    for net in (found['net'], found['restored']):
        net.eval()
    images = found['images'][:4]
    assert (found['restored'](images) == found['net'](images)).all()


def test_the_other_examples_of_that_page(capsys):
    nnx, equinox, functions = blocks('python', NET_PAGE)[6:]
    assert run(functions, 'docs/your_net.md')['y'].shape == (8, 32, 32, 16)
    assert run(nnx, 'docs/your_net.md')['logits'].shape == (64, 10)
    assert capsys.readouterr().out.strip() == blocks('text', NET_PAGE)[0].strip()
    pytest.importorskip('equinox')
    assert run(equinox, 'docs/your_net.md')['logits'].shape == (64, 10)


def imported(tree):
    """[(module, name or None)] of what a piece of code imports from us."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
    return [(module, name) for module, name in found if module.split('.')[0] == 'convnorm_jax']


@pytest.mark.parametrize('path', PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_what_the_pages_import_exists(path):
    text = path.read_text()
    codes = blocks('python', text)
    # A notebook's cells, without their options and IPython's commands.
    cells = blocks(r'\{code-cell\} ipython3', text)
    codes += [re.sub(r'^[:%].*\n', '', code, flags=re.M) for code in cells]
    assert bool(cells) == (path.parent.name == 'notebooks')
    for code in codes:
        for module, name in imported(ast.parse(code)):
            if module == 'convnorm_jax.equinox':
                pytest.importorskip('equinox')
            assert name is None or hasattr(importlib.import_module(module), name), f'{module}.{name}'


@pytest.mark.parametrize('path', [ROOT / 'README.md', *PAGES, *RESULTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_the_pages(path):
    text = path.read_text()
    lines = [line for block in blocks('bash', text) for line in block.splitlines()]
    lines += re.findall(r'`((?:GLIBC\S+ )?convnorm [^`]+)`', text) + re.findall(r'"(convnorm [^"]+)', text)
    for line in lines:
        for command in re.findall(r'(?:^|\s)convnorm (\w+)', line):
            assert command in {*COMMANDS, 'COMMAND'}, line
        for config in re.findall(r'--config=([\w/.]+)', line):
            assert pathlib.Path(config).stem in {*CONFIGS, 'mine', 'NAME'}, line


def test_ci_runs_the_readmes_test_line():
    line = next(line for line in blocks('bash') if 'pytest' in line).strip()
    assert line in (ROOT / '.ci' / 'run').read_text().splitlines()


def test_the_readmes_two_commands():
    first, second = (block.strip() for block in blocks('bash')[:2])
    begin = "python3.11 -m venv .venv && . .venv/bin/activate && pip install -q -e '.[{}]' && "
    assert first == begin.format('experiments') + 'python -m experiments.main --config=configs/digits_convnorm.py'
    assert second == begin.format('test') + 'python -m pytest'
    assert all(command in (DOCS / 'index.md').read_text() for command in (first, second))


def test_the_training_page_names_every_config():
    table = (DOCS / 'training.md').read_text().split('| config |')[1].split('\n\n')[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r'`(\w+)`', row.split('|')[1])]
    assert sorted(named) == sorted(CONFIGS)


def test_the_readmes_links_lead_somewhere():
    links = [link.split('#')[0] for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link]
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []


# --- tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_a_results_file_is_a_table_of_a_page(path):
    tables = json.loads(path.read_text())
    for table in tables:
        assert {'columns', 'rows'} <= set(table) <= {'columns', 'rows', 'decimals', 'before', 'command', 'after'}
        assert {len(row) for row in table['rows']} == {len(table['columns'])}
        assert len(table.get('decimals', table['columns'])) == len(table['columns'])
    assert any(f'{{results}} {path.stem}\n' in page.read_text() for page in PAGES)


def test_a_table_as_markdown():
    pytest.importorskip('sphinx')
    table = {'columns': ['net', '%'], 'decimals': [None, 2], 'rows': [['a', [99.07, 0.5]], ['b', None]], 'command': 'x'}
    lines = extension('tables').markdown(table).splitlines()
    assert lines[:4] == ['| net | % |', '| --- | ---: |', '| a | 99.07\xa0±\xa00.50 |', '| b |  |']
    assert lines[4:] == ['', '```bash', 'x', '```']


def test_long_commands_are_folded():
    pytest.importorskip('sphinx')
    folded = extension('tables').folded('convnorm train --a=1 --b=2 "--c=()"', width=24)
    assert folded == 'convnorm train --a=1 \\\n  --b=2 "--c=()"'


def numbers(table):
    return {value for row in table['rows'] for cell in row for value in (cell if isinstance(cell, list) else [cell])}


def test_the_readmes_figures_are_those_of_the_data():
    tables = [table for path in RESULTS for table in json.loads(path.read_text())]
    known = {float(n) for table in tables for n in numbers(table) if isinstance(n, (int, float))}
    section = README.split('## Three figures')[1].split('\n## ')[0]
    rows = [line for line in section.splitlines() if line.startswith('|') and '---' not in line]
    cells = [cell for row in rows for cell in row.split('|')[2:-1] if not re.search('[a-zA-Z]', cell)]
    figures = [float(n) for cell in cells for n in re.findall(r'[\d.]+', cell)]
    assert len(figures) > 15 and [n for n in figures if n not in known] == []


# --- docstrings ----------------------------------------------------------------------------------------------


def test_docstrings_become_markup():
    convert = extension('docstrings').convert
    text = """Sum of |x| over `axis`, `a`s of name_ and *rest.

    A layer is called so:

        layer(features, **options)

    Args:
      x: a*b.

    See :func:`f`:

    Args: see `g`. A line
      that continues.

    >>> f(2 * 3)
    """.splitlines()
    assert [line.strip() for line in convert(text)] == [
        r'Sum of \|x\| over ``axis``, ``a``\ s of name\_ and \*rest.',
        '',
        'A layer is called so::',
        '',
        'layer(features, **options)',
        '',
        'Args:',
        r'x: a\*b.',
        '',
        'See :func:`f`:',
        '',
        'Args: see ``g``. A line',
        'that continues.',
        '',
        '>>> f(2 * 3)',
        '',
    ]


def test_the_help_of_every_command_is_on_the_page():
    page = (DOCS / 'api' / 'commands.md').read_text()
    shown = set(re.findall(r'\{command-help\} (\w+)', page))
    assert shown == set(COMMANDS) - {'eval'}  # which is that of train
