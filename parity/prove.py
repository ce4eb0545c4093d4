"""A proof: the chosen stages run on a case, against Torch or against what was recorded from it, into one Report."""

import gc
import importlib.metadata
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import psutil

from fixmatch.config import ConfigError
from fixmatch.runtime import device_name, without_garbage_collection
from fixmatch.usage import OPTIONAL
from parity import goldens, stages
from parity.case import CLASSIC_SEEDS, Case
from parity.compare import Row, compare
from parity.lane import rounding_lane
from parity.report import Report
from parity.stages import Stage, StageResult, isolate, run_chosen, run_stage

_SECOND_OF_ALL = ("operators", "run", "convert", "ranks")  # take about as long as all other stages
_RECORDED = (*stages.TOGETHER, "loss")


class NotRecorded(ConfigError):
    """A stage that was asked for without Torch and that no golden holds."""


def with_torch(case: Case, chosen: list[str], seeds: list[int], every: dict[str, Stage], lane: bool) -> Report:
    """Runs the chosen stages on every seed against the mirror.

    Args:
        every: the table of stages to choose from.
        lane: whether the rounding lane follows a passed stage `backward`.
    """
    started, results = time.perf_counter(), []
    if any(every[name].needs_torch for name in chosen):
        _load_torch()
    for seed in seeds:
        results += _one_by_one(case.with_seed(seed), chosen, every)
    if lane and "backward" in chosen and all(result.passed for result in results):
        results.append(rounding_lane(case, seeds if len(seeds) >= 5 else list(CLASSIC_SEEDS)))
    return _report(case, results, time.perf_counter() - started)


def self_check(case: Case, every: dict[str, Stage], torch: bool, second: Iterator | None = None) -> Report:
    """Runs the stages of the self-check, on half the images, and what it can on one network.

    Args:
        torch: whether it is installed.
        second: what `share_of_second` yields in a second process; None: this one does everything.
    """
    started = psutil.Process().create_time() if second else time.time()  # imports take as long as some stages
    parts, large_side = (("first", "second"), lambda case: next(second)) if second else (
        ("all",), stages.production_side)
    if torch:
        _load_torch()
    results = [*_share(parts[0], case, every, torch, large_side)]
    # production's side is left where a network before the large one raised
    results += [found for found in second or () if isinstance(found, StageResult)]
    if torch:  # what a process has not delivered has compared nothing, and so has not passed
        wanted = Counter(name for part in parts for name in stages.of_self_check(part, case))
        lost = wanted - Counter(result.stage for result in results)
        results = [result for result in results if result.stage not in lost]
        results += [StageResult(name, every[name].dtype, every[name].mode) for name in lost]
    results = stages.merged(results)
    results.sort(key=lambda result: stages.SELF_CHECK.index(result.stage))
    seconds = time.time() - started
    return _report(case, results, seconds) if torch else _report_on_goldens(
        case, results, stages.of_self_check("all", case), seconds)


def _load_torch() -> None:
    """At once, so that no search for garbage has to look through it; without its compiler.

    Torch notes where in its source it registers operators. For that `inspect` would look for the module of each place,
    and resolve the path of every module that is loaded; it finds the place without.
    """
    with without_garbage_collection(), mock.patch.object(inspect, "getmodule", return_value=None):
        for module in ("parity.mirror", "parity.reference"):  # the first says what of Torch is not loaded
            importlib.import_module(module)
    gc.freeze()


def share_of_second(case: Case, every: dict[str, Stage], torch: bool) -> Iterator[stages.Side | StageResult]:
    """The share of the second of two processes of a self-check; before it, of a large network, production's side."""
    if torch and case.large:
        yield stages.production_side(case.small())
        gc.collect()  # the network, which knows itself in a circle
    yield from _share("second", case, every, torch)


def _share(part: str, case: Case, every: dict[str, Stage], torch: bool,
           large_side: Callable[[Case], stages.Side] = stages.production_side) -> Iterator[StageResult]:
    """The operators, which both processes share, come last. Of a large network the stages of one network wait for the
    second process: they come first where the mirror has its side of them to compute meanwhile, else just before those.
    """
    recorded = goldens.recorded(case.small()) is not None
    chosen = sorted(stages.of_self_check(part, case), key=lambda name: (
        name == "operators", (name in stages.TOGETHER) == recorded))
    if not torch:
        return _on_goldens(case, chosen, every)
    small = {"run": 2} if stages.too_large_to_rehearse(case, device_name()) else {}  # layers of one shape, too
    return run_chosen(chosen, case.small(), every, small, large_side=large_side)


def all_stages(case: Case, every: dict[str, Stage], second: Iterator | None = None) -> Report:
    """Runs all stages and the rounding lane.

    Args:
        second: what `second_of_all` yields in a second process; None: this one does everything.
    """
    started = time.perf_counter()
    _load_torch()
    mine = [name for name in every if second is None or name not in _SECOND_OF_ALL]
    results = [*_of_all(case, mine, every), *(second or ())]
    results.sort(key=lambda result: list(every).index(result.stage))
    if all(result.passed for result in results):
        results.append(rounding_lane(case.on_a_small_network() if case.large else case, list(CLASSIC_SEEDS)))
    return _report(case, results, time.perf_counter() - started)


def second_of_all(case: Case, every: dict[str, Stage]) -> Iterator[StageResult]:
    """The share of the second of two processes in `all_stages`."""
    _load_torch()
    return _of_all(case, [name for name in every if name in _SECOND_OF_ALL], every)


def _of_all(case: Case, chosen: Iterable[str], every: dict[str, Stage]) -> Iterator[StageResult]:
    """Of a large network, which would take minutes, as the self-check does; what is not about the network takes a small
    one."""
    if case.large:
        return run_chosen(chosen, case.small(), every, {"resume": 1, "ranks": 1})
    return _one_by_one(case, chosen, every)


def _one_by_one(case: Case, chosen: Iterable[str], every: dict[str, Stage]) -> Iterator[StageResult]:
    for name in chosen:
        result = run_stage(every[name], case)
        if name == "forward" and not result.passed:
            isolate(result, case)
        yield result


def _report(case: Case, results: list[StageResult], seconds: float) -> Report:
    torch = importlib.metadata.version("torch")  # which not every process of a self-check loads
    return Report(results, seconds, f"torch {torch}", _describe(case))


def with_goldens(case: Case, chosen: list[str], every: dict[str, Stage]) -> Report:
    """Runs the chosen stages as far as they need no Torch; those that compare with it on the nearest recorded network.

    Raises:
        NotRecorded: a single stage was asked for that needs Torch.
        GoldenError: what was recorded is missing or damaged.
    """
    started = time.perf_counter()
    results = list(_on_goldens(case, chosen, every))
    if not results:
        raise NotRecorded(f"stage {', '.join(chosen)}: needs Torch: pip install {OPTIONAL['torch']}; without it: "
                          f"{', '.join(n for n in every if n in _RECORDED or not every[n].needs_torch)}")
    return _report_on_goldens(case, results, chosen, time.perf_counter() - started)


def _on_goldens(case: Case, chosen: list[str], every: dict[str, Stage]) -> Iterator[StageResult]:
    """The results of the chosen stages that need no Torch or that a golden holds."""
    golden, _ = goldens.nearest(case.config.model)
    possible = [name for name in chosen if name in _RECORDED or not every[name].needs_torch]
    together = stages.run_together(_rows_together(golden)) if set(stages.TOGETHER) & set(possible) else {}
    for name in possible:
        yield (together[name] if name in together else _with_golden(every[name], golden) if name == "loss"
               else run_stage(every[name], case))


def _report_on_goldens(case: Case, results: list[StageResult], chosen: list[str], seconds: float) -> Report:
    golden, exact = goldens.nearest(case.config.model)
    shape = f"{golden} with the reference's hyper-parameters" + (
        "" if exact else f", the nearest recorded to {case.config.model}")
    done = {result.stage for result in results}
    left_out = [name for name in chosen if name not in done]
    not_run = f"; not run without it: {', '.join(left_out)}" if left_out else ""
    against = "results recorded from torch, since torch is not installed (fresh weights are not compared)"
    aside = "; without Torch recorded results stand in for it"
    return Report(results, seconds, against + not_run, shape, aside)


def _rows_together(golden: str) -> Iterator[Row]:
    """As `stages.rows_together`, with recorded results in the place of the reference."""
    case = goldens.CASES[golden]
    if case.large:
        yield from _rows_together(goldens.smallest(case.config.model.arch))
    yield from compare(goldens.digest(stages.whole(case)), goldens.read(golden, goldens.WHOLE))


def _with_golden(stage: Stage, name: str) -> StageResult:
    digested = stage._replace(ours=lambda case: goldens.digest(stage.ours(case)))
    return run_stage(digested, goldens.CASES[name], goldens.read(name, stage.name))


def _describe(case: Case) -> str:
    model = case.config.model
    groups = f" cardinality {model.cardinality}" if model.arch == "resnext" else ""
    pictures = "real images" if case.loader else "images from a numpy seed"
    return f"{model.arch} depth {model.depth} width {model.width}{groups}, {case.num_classes} classes, {pictures}"
