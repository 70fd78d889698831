"""Docstrings are plain text with `code` and Google sections: this makes reStructuredText of them.

A docstring is written to be read in the source. So `|x|`, `a*b` and `name_` mean themselves, single backticks are code,
and a block that is indented after a line with a colon is code, too.
"""

import inspect
import re

_SECTION = re.compile(r'^\s*(Args|Arguments|Returns|Raises|Attributes|Yields|Example|Examples|Note|References?)s?:$')
_INLINE = re.compile(r'^\s*(Args|Returns|Raises)\b.*[^:\s]$')
# What is reStructuredText already: a role, or a literal in double backticks.
_MARKUP = re.compile(r'(:[a-z:]+:`[^`]+`|``.+?``|`[^`]+`(?:_{1,2}(?!\w))?)')
_DIRECTIVE = re.compile(r'^\s*\.\. [a-z-]+::')


def convert(lines):
    """The lines of a docstring as reStructuredText."""
    lines = _continued(lines)
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


def _continued(lines):
    """`Args: see ...` with more lines indented below it, as one paragraph; `The others:` in a section as a name."""
    found, base = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if base is not None and (not line.strip() or indent <= base):
            base = None
        if base is not None:
            line = ' ' * base + line.lstrip()
        elif _INLINE.match(line):
            base = indent
        found.append(re.sub(r'^(\s+)The others: ', r'\1others: ', line))
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


def _names_joined(lines):
    """In a section Attributes `a, b: what they are` as `a,b: ...`: Sphinx takes the first of two words for a type."""
    found, inside = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() == 'Attributes:':
            inside = indent
        elif inside is not None and line.strip() and indent <= inside:
            inside = None
        elif inside is not None and indent == inside + 2:
            names, colon, rest = line.partition(': ')
            line = names[:indent] + names.strip().replace(', ', ',') + colon + rest
        found.append(line)
    return found


def _process(app, what, name, obj, options, lines):
    lines[:] = _names_joined(convert(lines))


def _signature(app, what, name, obj, options, signature, annotation):
    """Without what every Linen module takes; of an NNX module that of its constructor."""
    if what == 'class' and signature == '(*args, **kwargs)':
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        plain = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
        signature = str(inspect.Signature(plain))
    if signature:
        signature = signature.split(', parent=')[0] + ')' if ', parent=' in signature else signature
        signature = signature.replace("<class 'jax.numpy.float32'>", 'float32')
    return signature, annotation


def setup(app):
    """Sphinx's hook. Before napoleon, which is at 500."""
    app.connect('autodoc-process-docstring', _process, priority=400)
    app.connect('autodoc-process-signature', _signature)
    return {'parallel_read_safe': True}
