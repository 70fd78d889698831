"""The README's code runs as it stands, and its commands are those of CI."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', README, re.S)


def test_the_layer_example_runs_and_learns(capsys):
    code, _ = blocks('python')  # the second needs a net of the reader's
    assert len(code.strip().splitlines()) <= 30
    exec(compile(code, 'README.md', 'exec'), {'__name__': 'readme'})
    assert float(re.search(r'loss ([\d.]+)', capsys.readouterr().out)[1]) < 2.0  # chance is ln 10 = 2.30


def test_ci_runs_the_readmes_test_line():
    line = next(line for line in blocks('bash') if 'pytest' in line).strip()
    assert line in (ROOT / '.ci' / 'run').read_text().splitlines()


def test_every_named_config_exists():
    names = re.findall(r'`(\w+\.py)`', README.split('| config | what |')[1].split('\n\n')[0])
    assert sorted(names) == sorted(
        path.name for path in (ROOT / 'configs').glob('*.py') if path.stem not in ('__init__', 'default')
    )
