"""Runs side by side: the seeds of one configuration together, and the supervised baseline that they are to beat."""

import contextlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fixmatch.config import KEYS, ConfigError, load_config
from fixmatch.report import record
from fixmatch.report.figures import Spread, spread
from fixmatch.report.record import Record
from fixmatch.settings import value_of

_FEW = 3  # settings make a name; more are left to a table


@dataclass(frozen=True)
class Group:
    """Evaluated runs of one configuration, which differ in their seed at most."""

    label: str  # what sets it apart from the other groups
    runs: tuple[Record, ...]
    ema: Spread  # top-1 of the averaged weights at the last step, percent
    raw: Spread
    median: Spread  # of the last `evaluated` evaluations, averaged weights
    evaluated: int  # 20, or fewer where a run has not so many
    gain: Spread | None  # points above the baseline on the same labels, of the runs that have one
    finished: int  # runs that have ended


@dataclass(frozen=True)
class Baseline:
    """Supervised runs of one configuration on the labels of another run, which are the line for it to beat."""

    top1: float  # the mean of their averaged weights at the last step, percent
    runs: tuple[str, ...]  # their folders

    def gain(self, run: Record) -> str:
        """A sentence that says what the unlabeled images were worth to `run`."""
        points = run.final() - self.top1
        whose = self.runs[0] if len(self.runs) == 1 else f"the mean of {len(self.runs)} runs"
        return (f"That is {abs(points):.2f} points {'above' if points >= 0 else 'below'} the supervised baseline on "
                f"the same labels ({self.top1:.2f} %, {whose}).")


def baseline_of(run: Record, runs: Sequence[Record]) -> Baseline | None:
    """The best configuration among the evaluated supervised runs that have the labels of `run`; None without any.

    The mean of all of them would be easier to beat the worse some of them are.
    """
    if run.supervised or _labels(run) is None:
        return None
    by_recipe: dict[tuple, list[Record]] = {}
    for other in runs:
        if other.supervised and other.final() is not None and _labels(other) == _labels(run):
            by_recipe.setdefault(other.recipe, []).append(other)
    found = [Baseline(spread([other.final() for other in members]).mean, tuple(other.name for other in members))
             for members in by_recipe.values()]
    return max(found, key=lambda baseline: baseline.top1, default=None)


def beside(run: Record) -> list[Record]:
    """The supervised runs that have ended, in the folder that `run` lies in. Damaged ones are passed over."""
    found = []
    for result in sorted(run.folder.resolve().parent.glob("*/result.json")):
        folder = run.folder.parent / result.parent.name
        with contextlib.suppress(ConfigError, OSError):
            if load_config(folder / "config.yaml").ssl.mode == "none":  # the others are not read whole for nothing
                found.append(record.read(folder))
    return found


def _labels(run: Record) -> tuple | None:
    """Which images are labeled, and of which data set; None where the run kept no record of it."""
    split = run.split or {}
    return (split.get("dataset"), split["sha256"]) if "sha256" in split else None


def groups(runs: Sequence[Record]) -> list[Group]:
    """The evaluated runs by configuration, in the order given."""
    by_recipe: dict[tuple, list[Record]] = {}
    for run in runs:
        if run.final() is not None:
            by_recipe.setdefault(run.recipe, []).append(run)
    names = labels(list(by_recipe.values()))
    return [_group(name, members, runs) for name, members in zip(names, by_recipe.values(), strict=True)]


def labels(grouped: Sequence[Sequence[Record]]) -> list[str]:
    """A name for each group: the folder of its only run, else the few settings that set it apart, else its folders."""
    members = [run for group in grouped for run in group]
    short = {run.folder: run.folder.resolve().name for run in members}
    names = short if len(set(short.values())) == len(short) else {run.folder: run.name for run in members}
    apart = differing(grouped)
    found = []
    for first, *others in grouped:
        if others and 0 < len(apart) <= _FEW:
            found.append(", ".join(f"{name}={as_written(value_of(first.config, name))}" for name in apart))
        else:
            found.append(names[first.folder] + (f" and {len(others)} more" if others else ""))
    return found


def differing(grouped: Sequence[Sequence[Record]]) -> list[str]:
    """The settings that can change a result and are not the same in all groups."""
    recipes = [dict(group[0].recipe) for group in grouped]
    return [name for name in KEYS if len({recipe.get(name) for recipe in recipes}) > 1]


def as_written(value) -> str:
    """A setting's value as a configuration file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _group(label: str, members: list[Record], runs: Sequence[Record]) -> Group:
    gains = [run.final() - base.top1 for run in members if (base := baseline_of(run, runs))]
    last = [[line["ema"]["top1"] for line in run.evaluations[-20:]] for run in members]
    return Group(label, tuple(members), spread([run.final() for run in members]),
                 spread([run.final("raw") for run in members]), spread([statistics.median(top1) for top1 in last]),
                 min(map(len, last)), spread(gains) if gains else None, sum(run.result is not None for run in members))
