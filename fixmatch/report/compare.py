"""Runs side by side: the seeds of one configuration together, and the supervised baseline that they are to beat."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fixmatch.config import Config
from fixmatch.report.figures import Spread, spread
from fixmatch.report.record import Record
from fixmatch.settings import value_of


@dataclass(frozen=True)
class Group:
    """Evaluated runs of one configuration, which differ in their seed at most."""

    label: str  # what sets it apart from the other groups
    runs: tuple[Record, ...]
    ema: Spread  # top-1 of the averaged weights at the last step, percent
    raw: Spread
    median: Spread  # of the last 20 evaluations, averaged weights
    gain: Spread | None  # points above the baseline on the same labels, of the runs that have one
    finished: int  # runs that have ended


def baseline_of(run: Record, runs: Sequence[Record]) -> float | None:
    """EMA top-1, percent: the mean of the supervised runs among `runs` that have the labels of `run`."""
    split = (run.split or {}).get("sha256")
    found = [other.final() for other in runs if other.supervised and other is not run and other.final() is not None
             and split is not None and (other.split or {}).get("sha256") == split]
    return spread(found).mean if found else None


def groups(runs: Sequence[Record]) -> list[Group]:
    """The evaluated runs by configuration, in the order given."""
    by_recipe: dict[tuple, list[Record]] = {}
    for run in runs:
        if run.final() is not None:
            by_recipe.setdefault(run.recipe, []).append(run)
    names = labels([members[0].config for members in by_recipe.values()], list(by_recipe))
    return [_group(name, members, runs) for name, members in zip(names, by_recipe.values(), strict=True)]


def labels(configs: Sequence[Config], recipes: Sequence[tuple]) -> list[str]:
    """What sets configurations apart: the values of the keys in which they differ, else the run's name."""
    differing = [name for number, (name, _) in enumerate(recipes[0]) if len({r[number][1] for r in recipes}) > 1
                 ] if recipes else []
    return [", ".join(f"{name}={value_of(config, name)}" for name in differing) or config.run.name
            for config in configs]


def _group(label: str, members: list[Record], runs: Sequence[Record]) -> Group:
    gains = [run.final() - base for run in members if not run.supervised
             and (base := baseline_of(run, runs)) is not None]
    medians = [statistics.median(line["ema"]["top1"] for line in run.evaluations[-20:]) for run in members]
    return Group(label, tuple(members), spread([run.final() for run in members]),
                 spread([run.final("raw") for run in members]),
                 spread(medians), spread(gains) if gains else None, sum(run.result is not None for run in members))
