"""The rules of the house that a machine can read: imports, sizes, docstrings, commands."""

import ast
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'convnorm_jax'
MODULES = sorted(PACKAGE.rglob('*.py'))
CONFIGS = sorted(p for p in (PACKAGE / 'configs').glob('*.py') if p.name not in ('__init__.py', 'keys.py'))
NAMES = {path: str(path.relative_to(PACKAGE)) for path in MODULES}

# What every part may import, and what each may beside that and itself. Leaves: nothing else.
COMMON = {'errors', 'files'}
ALLOWED = {
    'layers': set(),
    'models': {'layers'},
    'data': set(),
    'attacks': {'mesh'},
    'mesh': set(),
    'steps': {'models', 'layers', 'data', 'attacks'},
    'evaluation': {'attacks', 'layers', 'steps', 'data', 'mesh', 'models'},
    'runs': {'configs', 'data', 'mesh'},
    'training': {'steps', 'models', 'layers', 'data', 'attacks', 'mesh', 'evaluation', 'runs', 'configs'},
    'configs': set(),
    'reports': {'attacks', 'configs', 'data', 'evaluation', 'layers', 'mesh', 'models', 'plots', 'runs', 'training'},
    'cli': {
        *('configs', 'data', 'evaluation', 'exported', 'mesh', 'plots', 'reports', 'runs', 'training'),
        *('version', 'weights'),
    },
    'functional': {'layers'},
    'nnx': {'conversion', 'dataflow', 'layers'},
    'equinox': {'conversion', 'dataflow', 'layers'},
    'conversion': {'dataflow', 'layers'},
    'dataflow': set(),
    'torch_import': {'models', 'layers'},
    'plots': {'evaluation'},
    'exported': {'steps', 'layers', 'data', 'mesh', 'version'},
    'weights': {'mesh'},
    'pretrained': {'models', 'steps'},
    'version': set(),
    'errors': set(),
    'files': {'mesh'},
    '__init__': {'layers', 'version', 'exported', 'weights'},
}


def imports(path):
    """Absolute names of all modules that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: a relative import'
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    return names


def part(path):
    return NAMES[path].split('/')[0].removesuffix('.py')


def test_the_rules_speak_of_every_part():
    assert {part(path) for path in MODULES} == set(ALLOWED)


@pytest.mark.parametrize('path', MODULES, ids=NAMES.get)
def test_import_direction(path):
    own = part(path)
    for name in imports(path):
        root, *rest = name.split('.')
        assert root not in ('experiments', 'configs', 'benchmarks', 'tests'), f'{NAMES[path]} imports {name}'
        if root == 'convnorm_jax':
            assert rest and rest[0] in {own, *COMMON, *ALLOWED[own]}, f'{NAMES[path]} imports {name}'


@pytest.mark.parametrize('path', MODULES, ids=NAMES.get)
def test_size_and_name(path):
    assert len(path.read_text().splitlines()) <= 350
    assert path.stem not in ('utils', 'util', 'helpers', 'misc', 'common')


@pytest.mark.parametrize('path', [*MODULES, *sorted((ROOT / 'experiments').glob('*.py'))], ids=str)
def test_docstrings(path):
    tree = ast.parse(path.read_text())
    if not tree.body:  # an empty __init__.py
        assert path.name == '__init__.py'
        return
    assert ast.get_docstring(tree), f'{path} has none'
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            assert ast.get_docstring(node), f'{path}: {node.name} has none'
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            for method in node.body:
                # Linen's __call__ and setup, and whatever overrides nothing of ours, are told in the class.
                if isinstance(method, ast.FunctionDef) and not method.name.startswith('_') and method.name != 'setup':
                    assert ast.get_docstring(method), f'{path}: {node.name}.{method.name} has none'


@pytest.mark.parametrize('path', [p for p in CONFIGS if p.name != 'default.py'], ids=lambda p: p.name)
def test_the_command_of_a_config(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f'    python -m experiments.main --config=configs/{path.name}\n' in text + '\n'
    assert len(text.splitlines()[0]) <= 100
    assert callable(importlib.import_module(f'convnorm_jax.configs.{path.stem}').get_config)


def test_a_clone_has_a_file_for_each_config():
    shims = sorted(p for p in (ROOT / 'configs').glob('*.py') if p.name != '__init__.py')
    assert [p.name for p in shims] == [p.name for p in CONFIGS]
    for path in shims:
        ours = importlib.import_module(f'configs.{path.stem}')
        packaged = importlib.import_module(f'convnorm_jax.configs.{path.stem}')
        assert ours.get_config is packaged.get_config


def test_nothing_in_the_tests_reads_the_shared_folder():
    outside = '/'.join(('..', 'shared')), '/'.join(('', 'work', ''))
    found = [p for p in (ROOT / 'tests').rglob('*.py') if any(word in p.read_text() for word in outside)]
    assert found == []


CATCH = {'ValueError', 'Exception', 'BaseException'}


def plain_value_errors(tree):
    """Lines that make a ValueError, but within a `try` that catches it: such a one is a signal, no user sees it."""
    signals = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            caught = {n.id for h in node.handlers if h.type for n in ast.walk(h.type) if isinstance(n, ast.Name)}
            if caught & CATCH:
                signals |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and id(n) not in signals]
    bases = [b for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for b in n.bases]
    names = [*(n.func for n in calls), *bases]
    return [n.lineno for n in names if isinstance(n, ast.Name) and n.id == 'ValueError']


@pytest.mark.parametrize('path', [*MODULES, *sorted((ROOT / 'experiments').glob('*.py'))], ids=str)
def test_a_mistake_of_the_user_is_a_class_of_its_own(path):
    # A plain ValueError is shown as a fault of the program.
    assert path.name == 'errors.py' or plain_value_errors(ast.parse(path.read_text())) == []


def test_a_plain_value_error_is_seen():
    assert plain_value_errors(ast.parse('def f():\n    raise ValueError(1)')) == [2]
    assert plain_value_errors(ast.parse('class A(ValueError):\n    pass')) == [1]
    assert plain_value_errors(ast.parse('try:\n    raise ValueError(1)\nexcept ValueError:\n    pass')) == []


def test_no_assert_for_the_user():
    # `assert` is for us: nothing in the package may rely on it to speak to a user.
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f'{NAMES[path]}, line {node.lineno}'
