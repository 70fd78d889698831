"""A run's folder: its config, splits and results, and whether a config continues that run."""

import contextlib
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from convnorm_jax.configs import default, keys
from convnorm_jax.data import splits
from convnorm_jax.errors import UserError
from convnorm_jax.files import write_json, write_new, write_text, written
from convnorm_jax.mesh import is_leader, wait_for_all


def has_checkpoints(workdir: str) -> bool:
    """Whether a folder holds checkpoints; until the first one, another config may use the folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return bool(os.listdir(os.path.join(workdir, 'checkpoints')))
    return False


def check_workdir(workdir: str, config: ConfigDict) -> None:
    """Raises UserError if a folder holds checkpoints of another run, or is a file."""
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise UserError(f'--workdir={workdir}: cannot write there (it is a file); give another folder')
    if not has_checkpoints(workdir):
        return
    if not os.path.exists(os.path.join(workdir, 'config.json')):
        raise UserError(f'--workdir={workdir}: holds checkpoints but no config.json; give another folder')
    check_same_run(load_config(workdir), config.to_dict(), workdir)


def prepare_workdir(workdir: str, config: ConfigDict, prepared: splits.Prepared) -> None:
    """Makes a run's folder, or checks that it holds this same run on the same data.

    Raises:
      UserError: it holds another run.
      OSError: it cannot be written.
    """
    check_workdir(workdir, config)
    record = os.path.join(workdir, 'splits.npz')
    if has_checkpoints(workdir) and os.path.exists(record):
        _check_same_data(splits.load_record(record), prepared.record, workdir)
    wait_for_all('the run folder is checked')  # before any process writes there
    if not is_leader():
        return
    with written(workdir):
        os.makedirs(workdir, exist_ok=True)
        splits.save_record(prepared, record)


def save_config(workdir: str, config: ConfigDict) -> None:
    """Writes config.json."""
    write_json(os.path.join(workdir, 'config.json'), config.to_dict())


def read_result(workdir: str) -> dict[str, Any] | None:
    """The flat dict of result.json; None if there is none that can be read."""
    try:
        with open(os.path.join(workdir, 'result.json')) as file:
            return dict(json.load(file))
    except (ValueError, TypeError, OSError):
        return None


def write_result(workdir: str, result: Mapping[str, Any]) -> str:
    """Writes result.json; an earlier one is kept by `keep_earlier_result`.

    If several processes evaluate one folder at a time, each result stays in one of the files. A result with the key
    'incomplete' never replaces one without: it is written to result-incomplete.json.

    Returns:
      The path of the result.
    """
    path, content = os.path.join(workdir, 'result.json'), json.dumps(result, indent=2) + '\n'
    if 'incomplete' in result and 'incomplete' not in (read_result(workdir) or result):
        path = os.path.join(workdir, 'result-incomplete.json')
        write_text(path, content)
        return path
    while is_leader():
        keep_earlier_result(workdir)
        with contextlib.suppress(FileExistsError):  # another process was faster
            write_new(path, lambda file: file.write(content.encode()))
            break
    return path


def keep_earlier_result(workdir: str) -> None:
    """Renames an earlier result.json, perhaps of other attacks, to result-1.json, result-2.json, ..."""
    path = os.path.join(workdir, 'result.json')
    if not is_leader() or not os.path.exists(path):
        return
    for number in itertools.count(1):
        name = os.path.join(workdir, f'result-{number}.json')
        try:
            with written(name):
                os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o644))  # no other process takes the name now
        except FileExistsError:
            continue
        try:
            with written(name):
                os.replace(path, name)
        except FileNotFoundError:  # another process has kept it already
            os.unlink(name)
        return


def _check_same_data(saved, given, workdir):
    changed = [name for name in saved if name not in given or not np.array_equal(saved[name], given[name])]
    if changed:
        raise UserError(
            f'{workdir} holds a run on other data ({", ".join(changed)} differ from its splits.npz); '
            'give the --config.data.data_dir it was started with, or another --workdir'
        )


def load_config(workdir: str) -> dict[str, Any]:
    """The config a run was started with, as nested dicts.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = os.path.join(workdir, 'config.json')
    try:
        with open(path) as file:
            saved = json.load(file)
    except FileNotFoundError as error:
        raise UserError(
            f'--workdir={workdir}: no run there (no config.json); train one first, or give its folder'
        ) from error
    except (ValueError, OSError) as error:
        raise UserError(f'{path}: cannot be read ({error})') from error
    if not isinstance(saved, dict) or not {'seed', 'model', 'data', 'train'} <= set(saved):
        raise UserError(f'{path}: is not the config of a run; put a good copy of it there, or give another --workdir')
    return saved


def differences(saved: Mapping, given: Mapping) -> dict[str, tuple]:
    """Keys that make `given` another run than `saved`: {key: (saved value, given value)}.

    Keys that `saved` lacks came with a later version and are passed over.
    """
    old, new = keys.flatten(saved), keys.flatten(given)
    longer = old.get('schedule.kind') == 'constant'  # other schedules follow the length of the run
    return {
        key: (old[key], new.get(key))
        for key in sorted(old)
        if old[key] != new.get(key) and _resume(key) not in ('free', *(['duration'] if longer else []))
    }


def check_same_run(saved: Mapping, given: Mapping, workdir: str) -> None:
    """Raises UserError, naming each difference, unless `given` continues the run in `workdir`."""
    changed = differences(saved, given)
    if changed:
        words = '; '.join(f'config.{key} was {old!r}, is now {new!r}' for key, (old, new) in changed.items())
        raise UserError(
            f'{workdir} holds a run with another config: {words}; give the old values back, or another --workdir'
        )


def _resume(key):
    """`Key.resume`; of a key that this version no longer has, that of its whole section."""
    if key in default.KEYS:
        return default.KEYS[key].resume
    section = key.split('.')[0] + '.'
    return 'free' if {k.resume for n, k in default.KEYS.items() if n.startswith(section)} == {'free'} else 'fixed'
