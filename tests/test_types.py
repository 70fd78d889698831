"""Every public function, method and constructor of the library has types, for its arguments and its result."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'convnorm_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
DUNDERS = ('__call__', '__init__', '__str__', '__repr__', '__getattr__', '__dir__')


def untyped(tree, of_class=False):
    """Yields (function, name of what has no type) for what a module or a class has in public."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            yield from untyped(node, of_class=True)
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith('_') or node.name in DUNDERS):
            static = any(ast.unparse(decorator) == 'staticmethod' for decorator in node.decorator_list)
            given = node.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            arguments = arguments[1 if of_class and not static else 0 :]
            yield from ((node.name, a.arg) for a in arguments if a is not None and a.annotation is None)
            if node.returns is None:
                yield node.name, 'its result'


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_have_types(path):
    assert list(untyped(ast.parse(path.read_text()))) == []


def test_what_has_no_type_is_found():
    tree = ast.parse('def f(x, *, y: int): pass\nclass A:\n  def __call__(self, z) -> int: pass\n  def _g(self): pass')
    assert list(untyped(tree)) == [('f', 'x'), ('f', 'its result'), ('__call__', 'z')]
