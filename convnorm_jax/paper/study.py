"""What a study is: the runs that a claim rests on, and the protocol that makes them comparable.

The fair protocol: for each arm (a layer) the learning rate is chosen from a small fixed grid by the validation figure
of one run with the seed 100, which is used for nothing else. Then every seed runs at that rate. Steps, data,
augmentation and schedule are the same for all arms. The published protocol has one rate for all layers; it is a study
of its own.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convnorm_jax.configs.keys import value_text

TUNING_SEED = 100
RATE = 'optimizer.learning_rate'


@dataclasses.dataclass(frozen=True)
class Study:
    """One protocol, run for every arm, setting and seed.

    Attributes:
      name: of its folder.
      title: what it is, in a few words.
      config: a config of `convnorm_jax.configs`.
      options: {key: value} that all runs share.
      arms: {name of a layer: {key: value}}; the first is compared with the others.
      settings: {key: values}: all combinations are run. With `RATE` among them, every rate is run.
      rates: that the learning rate of an arm is chosen from; () where the config's is used for all.
      tuned_at: {key: value} of the runs that choose it.
      chosen_by: the name in result.json that chooses it.
      figures: the names in result.json that are reported, the most important first.
      measures: names in result.json that the first figure is related to, across the arms.
      lower_is_better: of `figures` and `chosen_by`.
      seconds: of a run on one core, an estimate until one is finished.
      tuning_seconds: of a run that chooses the rate; 0 for as long.
      published: {arm: {figure: (mean, standard deviation)}} in the paper's units, for this very protocol.
    """

    name: str
    title: str
    config: str
    options: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    rates: Sequence[float] = ()
    tuned_at: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chosen_by: str = 'best_validation_accuracy'
    figures: Sequence[str] = ('test_accuracy',)
    measures: Sequence[str] = ()
    lower_is_better: bool = False
    seconds: float = 60.0
    tuning_seconds: float = 0.0
    published: Mapping[str, Mapping[str, tuple[float, float]]] = dataclasses.field(default_factory=dict)

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the settings."""
        return [dict(zip(self.settings, values, strict=True)) for values in itertools.product(*self.settings.values())]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      study: that it belongs to.
      arm: its name.
      settings: {key: value}.
      seed: of the run.
      rate: the learning rate; None for the config's.
      tuning: whether it chooses the rate.
    """

    study: Study
    arm: str
    settings: Mapping[str, Any]
    seed: int
    rate: float | None
    tuning: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of `convnorm train`, without the places of data and results."""
        extra = self.study.tuned_at if self.tuning else {}
        options = {**self.study.options, **self.study.arms[self.arm], **extra, **self.settings}
        if self.rate is not None:
            options[RATE] = self.rate
        options['seed'] = self.seed
        return (f'--config={self.study.config}', *(_argument(key, value) for key, value in options.items()))

    @property
    def folder(self) -> str:
        """Its folder in that of the claim."""
        words = [self.arm.replace(' ', '-')]
        words += [f'{key.rpartition(".")[2]}={value_text(value)}' for key, value in self.settings.items()]
        words += [f'rate={value_text(self.rate)}'] if self.rate is not None else []
        return f'{self.study.name}/{"tuning/" if self.tuning else ""}{",".join([*words, f"seed={self.seed}"])}'


def tuning_cells(study: Study) -> list[Cell]:
    """The runs that choose the learning rates."""
    return [Cell(study, arm, {}, TUNING_SEED, rate, tuning=True) for rate in study.rates for arm in study.arms]


def cells(study: Study, rates: Mapping[str, float | None], seeds: Sequence[int]) -> Iterator[Cell]:
    """The runs that are reported, seed by seed.

    Args:
      study: what is run.
      rates: {arm: learning rate}; an arm without one is left out.
      seeds: of the runs.
    """
    for seed, settings, arm in itertools.product(seeds, study.combinations(), study.arms):
        if RATE in settings:
            yield Cell(study, arm, settings, seed, None)
        elif arm in rates:
            yield Cell(study, arm, settings, seed, rates[arm])


def chosen_rates(study: Study, found: Mapping[tuple[str, float], float | None]) -> dict[str, float | None]:
    """{arm: learning rate}, of the arms whose rates were all tried; {arm: None} where nothing is chosen.

    Args:
      study: what is run.
      found: {(arm, rate): the figure of its tuning run, None if it diverged}.
    """
    if not study.rates:
        return dict.fromkeys(study.arms)
    chosen: dict[str, float | None] = {}
    for arm in study.arms:
        tried = {rate: found[arm, rate] for rate in study.rates if (arm, rate) in found}
        figures = {rate: figure for rate, figure in tried.items() if figure is not None}
        if len(tried) == len(study.rates) and figures:
            best = min if study.lower_is_better else max
            chosen[arm] = best(figures, key=lambda rate: figures[rate])
    return chosen


def _argument(key, value):
    if isinstance(value, bool):
        return f'--{"" if value else "no"}config.{key}'
    return f'--config.{key}={value!r}' if isinstance(value, (tuple, float)) else f'--config.{key}={value}'
