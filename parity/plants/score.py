"""The mutation score: which of the planted bugs the stages catch, where, and what the self-check alone catches."""

import json
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fixmatch.files import write_atomic
from parity import stages
from parity.case import Case, small_case
from parity.compare import Row
from parity.plants import PLANTS, planted
from parity.plants.plant import Plant

BAR = 0.98  # share of the plants that has to be caught, and localised
_CLEAN_SEEDS = 20  # of the unplanted code on each of the two networks


class Outcome(NamedTuple):
    """What became of one plant."""

    plant: Plant
    caught_in: str  # the first stage that failed, or "" if the bug went through
    caught_by_self_check: bool  # whether the stages of the self-check suffice
    row: Row | None  # the first divergence
    hint: str

    @property
    def localised(self) -> bool:
        return self.caught_in == self.plant.stage

    @property
    def size(self) -> str:
        return "" if self.row is None else self.row.why or f"{self.row.relative:.1e}"

    def json(self) -> dict:
        return {"plant": self.plant.name, "class": self.plant.kind, "expected": self.plant.stage,
                "caught_in": self.caught_in, "caught_by_self_check": self.caught_by_self_check,
                "tensor": self.row.tensor if self.row else "", "size": self.size, "hint": self.hint}


def print_score(json_file: pathlib.Path | None, names: Iterable[str] = tuple(PLANTS),
                clean_seeds: int = _CLEAN_SEEDS) -> int:
    """Tries the plants on a small WideResNet, then the unplanted code over seeds on both networks.

    Returns:
        The exit code: 0 if at least BAR of the plants was caught, and localised, without a false alarm.
    """
    started, outcomes = time.perf_counter(), []
    print(f"{'plant':<46} {'caught in':<10} {'expected':<10} first divergence")
    for outcome in outcomes_of(names, small_case("wideresnet", 0)):
        outcomes.append(outcome)
        print(_line(outcome), flush=True)
    found = {**count(outcomes), "false_alarms": false_alarms(clean_seeds), "clean_runs": 2 * clean_seeds,
             "by_class": by_class(outcomes), "outcomes": [outcome.json() for outcome in outcomes]}
    print(_summary(found, time.perf_counter() - started))
    if json_file:
        write_atomic(json_file, json.dumps(found, indent=1) + "\n")
    enough = min(found["caught"], found["localised"]) >= BAR * found["plants"]
    return 0 if enough and not found["false_alarms"] else 1


def outcomes_of(names: Iterable[str], case: Case) -> Iterator[Outcome]:
    """Runs the stages under every plant of these names; the reference's traces are taken once, without a plant."""
    every = stages.stages()
    recorded = {name: [*stage.reference(case)] if stage.reference else None for name, stage in every.items()}
    for name in names:
        with planted(name):
            yield _outcome(PLANTS[name], case, every, recorded)


def _outcome(plant: Plant, case: Case, every: dict[str, stages.Stage], recorded: dict) -> Outcome:
    """The stages in the order of diagnosis, up to the first that fails; after it those of the self-check alone."""
    first = None
    for name, stage in every.items():
        if first is not None and name not in stages.SELF_CHECK:
            continue
        result = stages.run_stage(stage, case, recorded[name], keep_going=False)
        if not result.passed:
            first = first or result
            if name in stages.SELF_CHECK:
                return Outcome(plant, first.stage, True, first.first_divergence, first.hint)
    if first is None:
        return Outcome(plant, "", False, None, "")
    return Outcome(plant, first.stage, False, first.first_divergence, first.hint)


def false_alarms(seeds: int) -> list[str]:
    """The stages that fail on the unplanted code."""
    return [f"{arch} seed {seed} stage {name}" for arch in ("wideresnet", "resnext") for seed in range(seeds)
            for name, stage in stages.stages().items()
            if not stages.run_stage(stage, small_case(arch, seed), keep_going=False).passed]


def count(outcomes: list[Outcome]) -> dict[str, int]:
    return {"plants": len(outcomes), "caught": sum(bool(o.caught_in) for o in outcomes),
            "localised": sum(o.localised for o in outcomes),
            "caught_by_self_check": sum(o.caught_by_self_check for o in outcomes)}


def by_class(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """The same counts for each part of the trainer."""
    kinds = dict.fromkeys(outcome.plant.kind for outcome in outcomes)
    return {kind: count([o for o in outcomes if o.plant.kind == kind]) for kind in kinds}


def _line(outcome: Outcome) -> str:
    mark = "" if outcome.localised else "   <- " + ("another stage" if outcome.caught_in else "MISSED")
    return (f"{outcome.plant.name:<46} {outcome.caught_in or '-':<10} {outcome.plant.stage:<10} "
            f"{outcome.row.tensor if outcome.row else ''} {outcome.size}{mark}")


def _summary(found: dict, seconds: float) -> str:
    lines = [f"{'class':<12} {'plants':>6} {'caught':>6} {'localised':>9} {'self-check':>10}"]
    for kind, of_kind in found["by_class"].items():
        lines.append(f"{kind:<12} {of_kind['plants']:>6} {of_kind['caught']:>6} {of_kind['localised']:>9} "
                     f"{of_kind['caught_by_self_check']:>10}")
    total = found["plants"]
    shares = [f"{found[key]}/{total} {word} ({100 * found[key] / total:.1f} %)" for key, word in (
        ("caught", "caught"), ("localised", "localised"), ("caught_by_self_check", "caught by the self-check alone"))]
    lines.append(f"MUTATION SCORE {', '.join(shares)}, {len(found['false_alarms'])} false alarms in "
                 f"{found['clean_runs']} clean runs, {seconds:.0f} s")
    return "\n".join([*lines, *(f"false alarm: {alarm}" for alarm in found["false_alarms"])])
