"""`{results} NAME`: the tables of docs/results/NAME.json; `{claim} NAME`: the part of results/report.md on a claim.

A file of docs/results holds a list of tables. Each has 'columns', a heading each, and 'rows', lists of cells: numbers,
texts, null, or [mean, standard deviation]. If they are there: 'decimals' of the numbers of each column (null: as
written), 'command', and 'before' and 'after' (Markdown).
"""

import json
import pathlib
import re

from sphinx.util.docutils import SphinxDirective

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'results'


def load(name):
    """The tables of a file."""
    return json.loads((FOLDER / f'{name}.json').read_text())


def cell(value, decimals):
    """A cell as it is shown; a list is a mean and its standard deviation."""
    if value is None:
        return ''
    if isinstance(value, list):
        return '\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}'.join(cell(part, decimals) for part in value)
    if isinstance(value, str) or decimals is None:
        return str(value)
    return f'{value:,.{decimals}f}'


def folded(command, width=96):
    """A command in lines of at most `width`, as a shell takes them."""
    lines = ['']
    for word in re.split(r' (?=-|")', command):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append(' ')
        lines[-1] += f' {word}' if lines[-1] else word
    return ' \\\n'.join(lines)


def markdown(table):
    """The table, with the text around it and the command that made it."""
    decimals = table.get('decimals') or [None] * len(table['columns'])
    numeric = [any(isinstance(row[i], (int, float, list)) for row in table['rows']) for i in range(len(decimals))]
    rows = [[cell(value, places) for value, places in zip(row, decimals, strict=True)] for row in table['rows']]
    rule = ['---:' if right else '---' for right in numeric]
    lines = ['| ' + ' | '.join(cells) + ' |' for cells in [table['columns'], rule, *rows]]
    command = table.get('command')
    commands = [folded(line) for line in ([command] if isinstance(command, str) else command or [])]
    parts = [table.get('before'), '\n'.join(lines), commands and '```bash\n' + '\n'.join(commands) + '\n```']
    return '\n\n'.join(part for part in [*parts, table.get('after')] if part)


class Results(SphinxDirective):
    """The directive."""

    required_arguments = 1

    def run(self):
        """Nodes of the tables."""
        name = self.arguments[0]
        self.env.note_dependency(str(FOLDER / f'{name}.json'))
        return self.parse_text_to_nodes('\n\n'.join(map(markdown, load(name))))


class Claim(SphinxDirective):
    """The directive: what `convnorm paper` wrote of a claim, with its plots."""

    required_arguments = 1

    def run(self):
        """Nodes of the section, without its heading."""
        path = FOLDER.parents[1] / 'results'
        found = path / f'{self.arguments[0]}.json'
        claim = json.loads(found.read_text()) if found.exists() else {}
        if 'title' not in claim:  # no run, or none but those that choose the learning rates
            return self.parse_text_to_nodes('Not run yet.')
        self.env.note_dependency(str(path / 'report.md'))
        text = section((path / 'report.md').read_text(), claim['title'])
        return self.parse_text_to_nodes(re.sub(r'\]\((?=[^)]*\.png)', '](../results/', text))


def section(report, heading):
    """The text below a heading of the second level."""
    found = report.partition(f'## {heading}\n')[2]
    if not found:
        raise ValueError(f'report.md has no section {heading!r}')
    return re.sub(r'^### (.*)$', r'**\1**', found.partition('\n## ')[0], flags=re.MULTILINE)


def setup(app):
    """Sphinx's hook."""
    app.add_directive('results', Results)
    app.add_directive('claim', Claim)
    return {'parallel_read_safe': True}
