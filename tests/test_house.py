"""The rules of the house that a machine can check: imports, sizes, docstrings, writers, commands."""

import ast
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'convnorm_jax'
MODULES = sorted(PACKAGE.rglob('*.py'))
CONFIGS = sorted(p for p in (PACKAGE / 'configs').glob('*.py') if p.name not in ('__init__.py', 'keys.py'))
NAMES = {path: str(path.relative_to(PACKAGE)) for path in MODULES}

# What every part may import, and what each may import besides that and itself. Leaves: nothing else.
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
    'paper': {'configs'},
    'reports': {
        'attacks',
        'configs',
        'data',
        'evaluation',
        'layers',
        'mesh',
        'models',
        'paper',
        'plots',
        'runs',
        'training',
    },
    'cli': {
        *('attacks', 'configs', 'data', 'evaluation', 'exported', 'mesh', 'paper', 'plots', 'reports', 'runs'),
        *('training', 'version', 'weights'),
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
                # The docstring of the class covers Linen's __call__ and setup.
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


def public_functions(tree):
    """(name, node) of the functions of a module and of the methods of its public classes that users may call."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith('_'):
                    yield f'{node.name}.{method.name}', method


# What changes files without `files.py`: appending, locks, renaming what is whole, and nothing (os.devnull).
WRITERS = {
    'files.py': {'replace', 'link', 'unlink'},
    'cli/run.py': {'open'},
    'runs/checkpoint.py': {'replace'},
    'runs/lock.py': {'open'},
    'runs/metrics.py': {'open'},
    'runs/sweep.py': {'open'},
    'runs/workdir.py': {'replace', 'unlink'},
}
BY_NAME = {'write_text', 'write_bytes', 'savez', 'savez_compressed', 'savefig', 'tofile', 'NamedTemporaryFile'}
OF_OS = {'replace', 'rename', 'link', 'unlink'}


def called(call):
    """(owner, name) of a call: ('os', 'replace'), ('', 'open')."""
    owner = getattr(getattr(call.func, 'value', None), 'id', '?' if isinstance(call.func, ast.Attribute) else '')
    return owner, getattr(call.func, 'id', getattr(call.func, 'attr', ''))


def opens_to_write(call):
    modes = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == 'mode')]
    return any(set(getattr(mode, 'value', '')) & set('wax+') for mode in modes)


def writers(tree):
    """Calls by which a module writes files by their names: open, os.replace, Path.write_text, ..."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    atomic = [call for call in calls if called(call)[1] in ('write_atomically', 'write_new')]
    within = {id(node) for call in atomic for node in ast.walk(call)}
    found = set()
    for call in calls:
        owner, name = called(call)
        opened = (owner, name) == ('', 'open') and opens_to_write(call)
        # files.write_text is a function of its own; Path.write_text is a method.
        by_name = name in BY_NAME and owner not in ('', 'files')
        if id(call) not in within and (opened or by_name or (owner == 'os' and name in OF_OS)):
            found.add(name)
    return found


@pytest.mark.parametrize('path', MODULES, ids=NAMES.get)
def test_files_are_written_in_one_place(path):
    expected = WRITERS.get(NAMES[path], set())
    assert writers(ast.parse(path.read_text())) == expected


def test_a_writer_is_seen():
    assert writers(ast.parse("open(p, 'w')")) == writers(ast.parse("open(p, mode='ab')")) == {'open'}
    assert writers(ast.parse('p.write_text(t)\nos.replace(a, b)\nt.replace(a, b)')) == {'write_text', 'replace'}
    assert writers(ast.parse("open(p)\nopen(p, 'rb')\nfiles.write_atomically(p, lambda f: np.savez(f, a=1))")) == set()


@pytest.mark.parametrize('path', MODULES, ids=NAMES.get)
def test_processes_talk_in_one_place(path):
    if NAMES[path] != 'mesh.py':
        assert not [name for name in imports(path) if 'multihost_utils' in name]


# Parts whose functions serve the commands alone: whatever is in them, the package calls.
SERVING = ('cli', 'configs', 'files', 'mesh', 'reports', 'runs', 'training', 'attacks')


def test_what_only_tests_call_is_deleted():
    used, public = set(), set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name == '__init__.py':
                used.add(node.value)  # what `__all__` names
        if part(path) in SERVING:
            public |= {name for name, _ in public_functions(tree)}
    overriding = {'_LatestAndBest.should_preserve'}
    assert sorted(name for name in public - overriding if name.split('.')[-1] not in used) == []


@pytest.mark.parametrize('path', [p for p in MODULES if part(p) in SERVING], ids=NAMES.get)
def test_private_functions_have_few_arguments(path):
    """What passes more settings on passes them as one small dataclass."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith('_'):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len([a for a in arguments if a not in ('self', 'cls')]) <= 8, f'{NAMES[path]}: {node.name}'


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
