"""Docstrings are plain text with `code` and Google sections: this makes reStructuredText of them.

A docstring is written to be read in the source. So `|x|`, `a*b` and `name_` mean themselves, single backticks are code,
and a block that is indented after a line with a colon is code, too.
"""

import re

_SECTION = re.compile(r'^\s*(Args|Arguments|Returns|Raises|Attributes|Yields|Example|Examples|Note|References?)s?:$')
# What is reStructuredText already: a role, or a literal in double backticks.
_MARKUP = re.compile(r'(:[a-z:]+:`[^`]+`|``.+?``|`[^`]+`(?:_{1,2}(?!\w))?)')
_DIRECTIVE = re.compile(r'^\s*\.\. [a-z-]+::')


def convert(lines):
    """The lines of a docstring as reStructuredText."""
    found, verbatim = [], None  # the indentation that a verbatim block must exceed
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if verbatim is not None and line.strip() and indent <= verbatim:
            verbatim = None
        if verbatim is not None or line.lstrip().startswith(('>>>', '...')):
            found.append(line)
            continue
        if _DIRECTIVE.match(line):
            verbatim = indent
            found.append(line)
            continue
        opens = _opens_a_block(lines, number, indent)
        found.append(_escaped(line) + (opens and not line.endswith('::')) * ':')
        if opens:
            verbatim = indent
    return found


def _opens_a_block(lines, number, indent):
    """Whether an indented block follows after a blank line."""
    line = lines[number].rstrip()
    if not line.endswith(':') or _SECTION.match(line) or number + 1 >= len(lines) or lines[number + 1].strip():
        return False
    following = next((other for other in lines[number + 1 :] if other.strip()), '')
    return len(following) - len(following.lstrip()) > indent and not following.lstrip().startswith('>>>')


def _escaped(line):
    parts = _MARKUP.split(line)
    for place, part in enumerate(parts):
        if place % 2 == 0:
            part = re.sub(r'(?<!\\)([*|])', r'\\\1', part)
            part = re.sub(r'(\w)_(?=\W|$)', r'\1\\_', part)
        elif not part.startswith((':', '``')) and not part.endswith('_'):
            part = f'`{part}`'
            if place + 1 < len(parts) and parts[place + 1][:1].isalnum():  # `layer`s
                part += '\\ '
        parts[place] = part
    return ''.join(parts)


def _process(app, what, name, obj, options, lines):
    lines[:] = convert(lines)


def _signature(app, what, name, obj, options, signature, annotation):
    """Without what every Linen module takes."""
    if signature:
        signature = signature.split(', parent=')[0] + ')' if ', parent=' in signature else signature
        signature = signature.replace("<class 'jax.numpy.float32'>", 'float32')
    return signature, annotation


def setup(app):
    """Sphinx's hook. Before napoleon, which is at 500."""
    app.connect('autodoc-process-docstring', _process, priority=400)
    app.connect('autodoc-process-signature', _signature)
    return {'parallel_read_safe': True}
