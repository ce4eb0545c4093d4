"""The mutation score: which of the planted bugs the stages catch, where, and what the self-check alone catches."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fixmatch.config import from_dict, to_dict
from fixmatch.files import write_atomic
from fixmatch.runtime import physical_cores
from parity import stages
from parity.case import Case, small_case
from parity.compare import Row
from parity.plants import PLANTS, planted
from parity.plants.plant import Plant

BAR, SELF_CHECK_BAR = 0.98, 0.9  # share of the plants that has to be caught and localised; that the self-check catches
_CLEAN_SEEDS = 20  # of the unplanted code on each of the two networks
_THREADS = 2  # of the operators that train: some faults show only with more than one


class Outcome(NamedTuple):
    """What became of one plant."""

    plant: str
    caught_in: str  # the stage that names it, or "" if the bug went through
    caught_by_self_check: bool  # whether the stages of the self-check suffice
    row: Row | None  # the first divergence
    hint: str

    @property
    def localised(self) -> bool:
        return self.caught_in == PLANTS[self.plant].stage

    @property
    def size(self) -> str:
        return "" if self.row is None else self.row.why or f"{self.row.relative:.1e}"

    def json(self) -> dict:
        return {"plant": self.plant, "class": PLANTS[self.plant].kind, "expected": PLANTS[self.plant].stage,
                "caught_in": self.caught_in, "caught_by_self_check": self.caught_by_self_check,
                "tensor": self.row.tensor if self.row else "", "size": self.size, "hint": self.hint}


def print_score(json_file: pathlib.Path | None, names: Iterable[str] = tuple(PLANTS),
                clean_seeds: int = _CLEAN_SEEDS, processes: int | None = None) -> int:
    """Tries the plants on small networks, then the unplanted code over seeds.

    Args:
        json_file: where to write the figures.
        names: of the plants.
        clean_seeds: of each of the two networks.
        processes: that share the work; None is one on each core, and 0 is this process alone.

    Returns:
        The exit code: 0 if at least BAR of the plants was caught, and localised, and SELF_CHECK_BAR by the self-check,
        without a false alarm.
    """
    started, outcomes, alarms = time.perf_counter(), [], []
    print(f"{'plant':<46} {'caught in':<10} {'expected':<10} first divergence")
    clean = [(arch, seed) for arch in ("wideresnet", "resnext") for seed in range(clean_seeds)]
    with _mapping(physical_cores() if processes is None else processes) as mapped:
        for outcome in mapped(outcome_of, names):
            outcomes.append(outcome)
            print(_line(outcome), flush=True)
        for found in mapped(false_alarms, *zip(*clean, strict=True)) if clean else ():
            alarms += found
    found = {**count(outcomes), "false_alarms": alarms, "clean_runs": len(clean), "by_class": by_class(outcomes),
             "outcomes": [outcome.json() for outcome in outcomes]}
    print(_summary(found, time.perf_counter() - started))
    if json_file:
        write_atomic(json_file, json.dumps(found, indent=1) + "\n")
    enough = min(found["caught"], found["localised"]) >= BAR * found["plants"]
    return 0 if enough and found["caught_by_self_check"] >= SELF_CHECK_BAR * found["plants"] and not alarms else 1


@contextlib.contextmanager
def _mapping(processes: int) -> Iterator[Callable]:
    """A `map` whose calls are shared by so many processes; none: the built-in one."""
    if not processes:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # a process that has run Paddle's threads cannot be forked
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield pool.map


def outcome_of(name: str) -> Outcome:
    """Runs the stages under the plant of this name, each until a row fails: as the self-check does, then thoroughly."""
    plant = PLANTS[name]
    case = case_of(plant)
    failed = _failed(name, case, thorough=False)
    by_self_check = any(result.stage in stages.of_self_check("all", case) for result in failed)
    first = stages.first_failure(failed or _failed(name, case, thorough=True))
    if first is None:
        return Outcome(name, "", False, None, "")
    row = first.first_divergence._replace(ours=None, reference=None)
    return Outcome(name, first.stage, by_self_check, row, first.hint)


def case_of(plant: Plant) -> Case:
    """The small network, with the setting of runtime.cpu_kernels, on which the plant shows; images may be mirrored."""
    case = small_case(plant.arch, 0)
    runtime = dataclasses.replace(case.config.runtime, cpu_kernels=plant.cpu_kernels)
    augment = dataclasses.replace(case.config.augment, flip=True)
    config = dataclasses.replace(case.config, runtime=runtime, augment=augment)
    return dataclasses.replace(case, config=from_dict(to_dict(config), plant.name, plant.settings))


def _failed(name: str, case: Case, thorough: bool) -> list[stages.StageResult]:
    """The stages that fail, in order, until it is known which names the fault and whether the self-check sees it."""
    every, failed = stages.stages(thorough=thorough, threads=_THREADS), []
    before_training = set(stages.of_self_check("all", case))
    case = case if thorough else case.small()
    results = ((stages.run_stage(stage, case, keep_going=False) for stage in every.values()) if thorough
               else stages.run_chosen(every, case, every, {}, keep_going=False))
    with planted(name):
        for result in results:
            if not result.passed:
                failed.append(result)
            names = {result.stage for result in failed}
            named = names - {"reference"} or (names and result.stage in stages.END_TO_END)
            if named and names & before_training:
                break
    return failed


def false_alarms(arch: str, seed: int) -> list[str]:
    """The stages that fail on the unplanted code."""
    case = small_case(arch, seed)
    return [f"{arch} seed {seed} stage {name}" for name, stage in stages.stages(threads=_THREADS).items()
            if not stages.run_stage(stage, case, keep_going=False).passed]


def count(outcomes: list[Outcome]) -> dict[str, int]:
    return {"plants": len(outcomes), "caught": sum(bool(o.caught_in) for o in outcomes),
            "localised": sum(o.localised for o in outcomes),
            "caught_by_self_check": sum(o.caught_by_self_check for o in outcomes)}


def by_class(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """The same counts for each part of the trainer."""
    kinds = dict.fromkeys(PLANTS[outcome.plant].kind for outcome in outcomes)
    return {kind: count([o for o in outcomes if PLANTS[o.plant].kind == kind]) for kind in kinds}


def _line(outcome: Outcome) -> str:
    mark = "" if outcome.localised else "   <- " + ("another stage" if outcome.caught_in else "MISSED")
    return (f"{outcome.plant:<46} {outcome.caught_in or '-':<10} {PLANTS[outcome.plant].stage:<10} "
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
