"""What the runs of a claim found: one JSON file, from which the report is made again without any run.

A run is known by its arguments. So a file that was committed on one machine spares another the runs in it.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from convnorm_jax.errors import UserError
from convnorm_jax.files import write_json
from convnorm_jax.paper.study import Cell, Study

# What is kept of result.json, next to the figures of the study.
_FACTS = (
    'data',
    'train_examples',
    'test_examples',
    'attacked_examples',
    'checkpoint_step',
    'total_steps',
    'training_seconds',
    'last_validation_pgd_accuracy',
    'device',
    'jax',
)


class Record:
    """The runs of a claim that are known.

    Args:
      path: of the JSON file; read if it is there.

    Raises:
      UserError: the file cannot be read, or is not one of ours.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._runs: dict[tuple[str, ...], dict[str, Any]] = {}
        if not os.path.exists(self.path):
            return
        try:
            with open(self.path) as file:
                for run in json.load(file)['runs']:
                    self._runs[tuple(run['arguments'])] = run
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'{self.path}: is not a file of results ({type(error).__name__}: {error}); move it, or give another '
                '--output'
            ) from error

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """What is known of a run: {'result': {...} or None if it diverged, 'seconds', ...}; None if it was not run."""
        return self._runs.get(cell.arguments)

    def add(self, cell: Cell, result: Mapping[str, Any] | None, seconds: float, version: str) -> None:
        """Adds a run that has ended.

        Args:
          cell: the run.
          result: of its result.json; None if its loss or gradient became infinite or NaN.
          seconds: that its command took.
          version: of this package.
        """
        wanted = dict.fromkeys([*cell.study.figures, *cell.study.measures, cell.study.chosen_by, *_FACTS])
        self._runs[cell.arguments] = {
            'study': cell.study.name,
            'arm': cell.arm,
            'settings': dict(cell.settings),
            'seed': cell.seed,
            'rate': cell.rate,
            'tuning': cell.tuning,
            'result': None if result is None else {name: result[name] for name in wanted if name in result},
            'seconds': round(seconds, 1),
            'version': version,
            'arguments': list(cell.arguments),
        }

    def figure(self, cell: Cell, name: str) -> float | None:
        """A figure of a run; None if it was not run, diverged, or does not have it."""
        found = self.find(cell)
        return None if found is None or found['result'] is None else found['result'].get(name)

    def diverged(self, cell: Cell) -> bool:
        """Whether a run's loss or gradient became infinite or NaN."""
        found = self.find(cell)
        return found is not None and found['result'] is None

    def fact(self, study: Study, name: str) -> Any:
        """What result.json says in the runs of a study, such as its 'data'; None without a run."""
        of_study = (run['result'] for run in self._runs.values() if run['study'] == study.name and run['result'])
        return next((result[name] for result in of_study if name in result), None)

    def seconds(self, study: Study, tuning: bool) -> list[float]:
        """Of the known runs of a study: those that choose its rates, or those that are reported."""
        runs = self._runs.values()
        return [run['seconds'] for run in runs if run['study'] == study.name and run['tuning'] == tuning]

    def hours(self) -> float:
        """Of all runs together, one after another."""
        return sum(run['seconds'] for run in self._runs.values()) / 3600

    def write(self, content: Mapping[str, Any]) -> None:
        """Writes the file: `content`, then all runs."""
        write_json(self.path, {**content, 'runs': list(self._runs.values())})
