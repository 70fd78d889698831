"""What the runs of a study say: means over seeds, paired differences, and the sentence that they allow."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from convnorm_jax.configs.keys import value_text
from convnorm_jax.paper.record import Record
from convnorm_jax.paper.statistics import Difference, Mean, Relation, mean, paired_difference, rank_correlation
from convnorm_jax.paper.study import RATE, Cell, Study, cells, chosen_rates, tuning_cells

# Of a study over rates, next to each rate: the accuracy at the chosen one, and the mean over all.
AT_CHOSEN, OVER_RATES = 'at the chosen rate', 'mean over the rates'


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a study's tables: a setting.

    Attributes:
      name: of the column; '' where the study has no settings.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """A study's figures.

    Attributes:
      study: what was run.
      seeds: that were asked for.
      rates: {arm: the chosen learning rate}.
      columns: of its tables.
      figures: {figure or measure: {(arm, column name): {seed: value}}}; accuracies in %.
      diverged: {(arm, column name): number of runs}.
      missing: runs that were not run, in order; those that wait for a learning rate are not in it.
      waiting: number of those.
      seconds_left: that all of these take on one core, by the mean of the known runs, or the study's estimate.
    """

    study: Study
    seeds: Sequence[int]
    rates: Mapping[str, float | None]
    columns: Sequence[Column]
    figures: Mapping[str, Mapping[tuple[str, str], Mapping[int, float]]]
    diverged: Mapping[tuple[str, str], int]
    missing: Sequence[Cell]
    waiting: int
    seconds_left: float

    @property
    def first(self) -> str:
        """The arm that is compared with the others."""
        return next(iter(self.study.arms))

    def mean(self, figure: str, arm: str, column: Column) -> Mean | None:
        """Over the seeds; None without a run."""
        found = self.figures[figure].get((arm, column.name))
        return mean(found) if found else None

    def difference(self, figure: str, arm: str, column: Column) -> Difference | None:
        """The first arm minus another, over the seeds of both; None without one."""
        of = self.figures[figure]
        return paired_difference(of.get((self.first, column.name), {}), of.get((arm, column.name), {}))

    def relation(self, measure: str) -> Relation | None:
        """Of a measure to the first figure, over the arms that have both; None for fewer than three."""
        figure, column = self.study.figures[0], self.columns[0]
        pairs = {arm: (self.mean(measure, arm, column), self.mean(figure, arm, column)) for arm in self.study.arms}
        return rank_correlation([(x.mean, y.mean) for x, y in pairs.values() if x is not None and y is not None])

    def sentence(self, figure: str, arm: str) -> str:
        """What the intervals allow to say of the first arm against another."""
        found = [(column, self.difference(figure, arm, column)) for column in self.columns]
        compared = [(column, one) for column, one in found if one is not None and not math.isnan(one.low)]
        if not compared:
            return f'{self.first} and {arm}: fewer than two seeds of both.'
        better = -1 if self.study.lower_is_better else 1
        words = {better: f'better than {arm}', -better: f'worse than {arm}', 0: f'not separated from {arm}'}
        parts = []
        for sign in (better, -better, 0):
            places = [column.name for column, one in compared if one.sign == sign]
            if places:
                parts.append(f'{words[sign]}{_at(places, len(compared))}')
        counts = sorted({one.count for _, one in compared})
        return f'{self.first} is {_listed(parts)} (n={"-".join(map(str, counts))}).'


def summarize(study: Study, record: Record, seeds: Sequence[int]) -> Summary:
    """The figures of a study over the seeds, from what is known."""
    rates = rates_of(study, record)
    wanted = list(cells(study, rates, seeds))
    tuning = tuning_cells(study)
    columns = _columns(study)
    figures: dict[str, dict[tuple[str, str], dict[int, float]]] = {
        name: {} for name in (*study.figures, *study.measures)
    }
    diverged: dict[tuple[str, str], int] = {}
    for cell in wanted:
        place = cell.arm, _column_name(cell.settings)
        if record.diverged(cell):
            diverged[place] = diverged.get(place, 0) + 1
        for name in figures:
            value = record.figure(cell, name)
            if value is not None:
                figures[name].setdefault(place, {})[cell.seed] = value * (100 if name.endswith('_accuracy') else 1)
    if RATE in study.settings:
        for found in figures.values():
            _over_rates(study, rates, found)
    unchosen = [] if RATE in study.settings else [arm for arm in study.arms if arm not in rates]
    missing = [cell for cell in (*tuning, *wanted) if record.find(cell) is None]
    waiting = len(unchosen) * len(study.combinations()) * len(seeds)
    left = sum(_expected(study, record, cell.tuning) for cell in missing) + waiting * _expected(study, record, False)
    return Summary(study, seeds, rates, columns, figures, diverged, missing, waiting, left)


def _expected(study, record, tuning):
    """Seconds of a run that was not run."""
    known = record.seconds(study, tuning)
    return sum(known) / len(known) if known else study.tuning_seconds or study.seconds if tuning else study.seconds


def rates_of(study: Study, record: Record) -> dict[str, float | None]:
    """{arm: the chosen learning rate}, see `study.chosen_rates`."""
    known = {
        (cell.arm, cell.rate): record.figure(cell, study.chosen_by)
        for cell in tuning_cells(study)
        if record.find(cell) is not None and cell.rate is not None
    }
    return chosen_rates(study, known)


def _columns(study):
    if not study.settings:
        return [Column('')]
    found = [Column(_column_name(settings)) for settings in study.combinations()]
    return [*found, Column(AT_CHOSEN), Column(OVER_RATES)] if RATE in study.settings else found


def _column_name(settings):
    return ', '.join(map(value_text, settings.values()))


def _over_rates(study, rates, found):
    """Adds the two columns of a study over rates; a seed counts where all its rates were run."""
    names = [value_text(rate) for rate in study.settings[RATE]]
    for arm in study.arms:
        of_rates = [found.get((arm, name), {}) for name in names]
        whole = set(of_rates[0]).intersection(*of_rates)
        if whole:
            found[arm, OVER_RATES] = {seed: sum(of[seed] for of in of_rates) / len(names) for seed in sorted(whole)}
        rate = rates.get(arm)
        if rate is not None and (arm, value_text(rate)) in found:
            found[arm, AT_CHOSEN] = found[arm, value_text(rate)]


def _at(places, of):
    named = [place for place in places if place]
    return '' if not named or len(places) == of == 1 else f' at {_listed(named)}'


def _listed(words):
    return words[0] if len(words) == 1 else f'{", ".join(words[:-1])} and {words[-1]}'


def as_dict(summary: Summary) -> dict[str, Any]:
    """A summary for a JSON file."""
    study = summary.study
    listed = []
    for figure in summary.figures:
        for (arm, setting), values in summary.figures[figure].items():
            found = mean(values)
            deviation = None if math.isnan(found.deviation) else found.deviation
            listed.append(
                {'figure': figure, 'arm': arm, 'setting': setting, 'mean': found.mean, 'standard_deviation': deviation,
                 'seeds': list(values), 'all': list(values.values())}
            )  # fmt: skip
    differences = []
    for figure in study.figures:
        for column in summary.columns:
            for arm in list(study.arms)[1:]:
                one = summary.difference(figure, arm, column)
                if one is not None:
                    interval = None if math.isnan(one.low) else [one.low, one.high]
                    differences.append(
                        {'figure': figure, 'first': summary.first, 'second': arm, 'setting': column.name,
                         'mean': one.mean, 'interval': interval, 'seeds': one.count}
                    )  # fmt: skip
    others = list(study.arms)[1:]
    relations = {measure: summary.relation(measure) for measure in study.measures}
    return {
        'name': study.name,
        'title': study.title,
        'config': study.config,
        'options': dict(study.options),
        'arms': {arm: dict(options) for arm, options in study.arms.items()},
        'rates_tried': list(study.rates),
        'rates_chosen': dict(summary.rates) if study.rates else {},
        'figures': listed,
        'differences': differences,
        'relations': {name: one and dataclasses.asdict(one) for name, one in relations.items()},
        'sentences': {figure: [summary.sentence(figure, arm) for arm in others] for figure in study.figures},
    }
