"""A sample of benchmarks/malformed.py: a mistake is one line of error, and nothing is written."""

import pathlib
import random

import pytest

from benchmarks import malformed, malformed_cases

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Kinds that end before anything is compiled; of the others the benchmark takes care.
SAMPLE = (
    'a number out of range',
    'an unknown name',
    'a contradiction',
    'processes that are not all told',
    'a config that raises',
    'a config with another type',
    'an archive of other contents',
    'a damaged TFDS folder',
    'a run folder that cannot be',
    'a damaged config json',
    'a damaged record of the splits',
    'only damaged checkpoints to evaluate',
)


def rooted(arguments):
    """The arguments with the paths of the configs from here."""
    return [a.replace('--config=configs/', f'--config={ROOT}/configs/') for a in arguments]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of two steps."""
    from convnorm_jax.cli.command_line import read_config
    from convnorm_jax.training import loop, setup

    folder = tmp_path_factory.mktemp('trained') / 'run'
    import jax

    experiment = setup.build(read_config(rooted(malformed_cases.TINY)), jax.devices()[:1])
    loop.train(experiment, str(folder))
    return folder


def test_there_are_kinds_enough():
    assert len(malformed_cases.KINDS) >= 30 and set(SAMPLE) <= set(malformed_cases.KINDS)


@pytest.mark.covering(1)
@pytest.mark.parametrize('name', SAMPLE)
@pytest.mark.parametrize('seed', [0, 1])
def test_a_mistake_is_one_line_and_changes_nothing(command, trained, tmp_path, quick_compilation, name, seed):
    case = tmp_path / 'case'
    case.mkdir()
    arguments = malformed_cases.KINDS[name](random.Random(seed), case, trained)
    before = malformed.fingerprint(case)
    code, out, err = command(*rooted(arguments))
    assert malformed.verdict(code, out, '\n'.join(err), before, malformed.fingerprint(case)) == ''


@pytest.mark.parametrize(
    'code, err, after, word',
    [
        (0, 'error: a long enough one', {'a': '1'}, 'exit code 0'),
        (2, '', {'a': '1'}, '0 lines'),
        (2, 'error: a long enough one\nerror: and another', {'a': '1'}, '2 lines'),
        (2, 'error: a long enough one\nTraceback (most', {'a': '1'}, 'traceback'),
        (2, 'error: a long enough one', {'a': '2'}, 'changed a'),
        (2, 'error: a long enough one', {'a': '1', 'b': '1'}, 'changed b'),
        (None, 'error: a long enough one', {'a': '1'}, 'did not end'),
        (2, 'error: None', {'a': '1'}, 'says nothing'),
    ],
)
def test_the_verdict_can_be_bad(code, err, after, word):
    assert word in malformed.verdict(code, '', err, {'a': '1'}, after)
    assert malformed.verdict(2, '', 'error: a long enough one', {'a': '1'}, {'a': '1'}) == ''
