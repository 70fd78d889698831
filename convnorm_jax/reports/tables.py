"""Markdown tables that also read well as text."""

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """A Markdown table whose columns line up in the text.

    Args:
      head: the titles of the columns.
      rows: as many texts each.
      labels: the first so many columns are aligned left, the others, figures, right.

    Example:
      >>> print(markdown_table(['attack', 'accuracy %'], [['clean', '84.10'], ['PGD-10', '44.75']]))
      | attack | accuracy % |
      |--------|-----------:|
      | clean  |      84.10 |
      | PGD-10 |      44.75 |
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        '| ' + ' | '.join(c.ljust(w) if i < labels else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + ' |'
        for line in (head, *rows)
    ]
    rule = '|'.join('-' * (w + 2) if i < labels else '-' * (w + 1) + ':' for i, w in enumerate(widths))
    return '\n'.join([lines[0], f'|{rule}|', *lines[1:]])
