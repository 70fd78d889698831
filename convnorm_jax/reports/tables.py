"""Tables that read well as text and as Markdown."""


def aligned_table(head, body, labels):
    """A Markdown table whose columns line up in the text too.

    Args:
      head: texts.
      body: rows of as many texts.
      labels: how many columns, from the first, stand to the left; the others, figures, to the right.
    """
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        '| ' + ' | '.join(c.ljust(w) if i < labels else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + ' |'
        for line in (head, *body)
    ]
    rule = '|'.join('-' * (w + 2) if i < labels else '-' * (w + 1) + ':' for i, w in enumerate(widths))
    return '\n'.join([lines[0], f'|{rule}|', *lines[1:]])
