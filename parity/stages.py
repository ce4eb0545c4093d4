"""The table of stages: what each one proves, in the order of diagnosis, and how one of them is run."""

import gc
import importlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import paddle

from fixmatch.data import DataError
from parity import augment, batches, goldens, operators, published, ranks, reference_figures, resume, subject
from parity.case import Case
from parity.compare import Row, Trace, compare, compare_tensor, raised
from parity.hints import hint_for

# What runs before training.
SELF_CHECK = ("reference", "config", "schedule", "augment", "data", "operators", "forward", "metric", "loss",
              "backward", "optimizer", "ema", "scaler", "run", "resume", "convert")
ON_THE_CPU = ("config", "schedule", "augment", "data", "ranks")  # wherever the run trains
END_TO_END = ("run", "resume", "convert", "ranks")
ABOUT_FILES = ("resume", "convert")  # and not about the network

# The stages that a self-check takes from one network and its steps, by the sections of that trace ("step 0 losses").
TOGETHER = {"forward": ("initial", "input", "eval activations"), "backward": ("activations", "losses", "gradients"),
            "optimizer": ("momentum", "weights"), "ema": ("buffers", "ema")}
_TWO_STEPS = {0: ("activations", "losses", "gradients", "momentum"), 1: ("momentum", "weights", "buffers", "ema")}
_ONE_STEP = {0: ("activations", "losses", "gradients", "momentum", "weights", "buffers", "ema")}
_STEP_SECTIONS = ("lr", "activations", "losses", "gradients", "momentum", "weights", "buffers", "ema")

NOTHING_PROVEN = (DataError, MemoryError)  # wrong by these: a damaged golden, or a machine too small

Side = list[tuple[str, goldens.Digest]] | Row  # what a large network computed, or the failed row of what it raised


class Stage(NamedTuple):
    """One thing to prove.

    A stage that `compared` has made keeps the two traces it compares, so that the reference's can be recorded once and
    replayed, by the mutation score and by the goldens. A stage that judges in another way has `rows` alone; its float32
    is the precision of the run, which is another one with mixed precision.
    """

    name: str
    mode: str  # train, eval, or - where there is no network
    dtype: str  # in which production computes
    rows: Callable[[Case], Iterator[Row]]  # in the order of diagnosis: the first row that fails names the fault
    ours: Callable[[Case], Trace] | None = None
    reference: Callable[[Case], Trace] | None = None
    needs_torch: bool = True  # to compute what production is held to


def compared(name: str, mode: str, ours: Callable[[Case], Trace], reference: Callable[[Case], Trace]) -> Stage:
    """A stage whose rows are the tensors of two float64 traces."""
    return Stage(name, mode, "float64", lambda case: compare(ours(case), reference(case)), ours, reference)


def stages(steps: int = 3, thorough: bool = True, threads: int | None = None,
           turns: Callable[[int], Iterable[int]] = range) -> dict[str, Stage]:
    """All stages by name, in the order of diagnosis.

    Args:
        steps: free-running steps of `train`.
        thorough: False for what fits the time of a self-check, whose stages in ABOUT_FILES take a small WideResNet. A
            large network then takes two free steps at most, and a small one before it all.
        threads: of the operators that train; None: as many as a run that is started here would use.
        turns: as of `operators.rows`.
    """
    def about_files(case: Case) -> Case:
        return case if thorough else case.on_a_small_network("wideresnet")

    def free_steps(case: Case) -> tuple:
        count = steps if thorough or not case.large else min(steps, 2)
        return (dict.fromkeys(range(count), _STEP_SECTIONS),)

    train = compared("train", "train", *_both_sides("train", free_steps))
    table = [
        Stage("reference", "train+eval", "float64", lambda case: reference_figures.rows(case, thorough),
              needs_torch=False),
        Stage("config", "-", "-", published.rows, needs_torch=False),
        compared("schedule", "-", *_both_sides("learning_rate", _schedule_probe)),
        compared("augment", "-", augment.ours, augment.reference)._replace(needs_torch=False),
        Stage("data", "-", "uint8", lambda case: batches.rows(case, thorough), needs_torch=False),
        Stage("operators", "train+eval", "float32", lambda case: operators.rows(case, thorough, threads, turns),
              needs_torch=False),
        compared("forward", "eval+train", *_both_sides("forward")),
        compared("metric", "eval", *_both_sides("metric", _metric_probe)),
        compared("loss", "-", *_both_sides("loss")),
        compared("backward", "train", *_both_sides("train", lambda case: ({0: ("losses", "gradients")},))),
        compared("optimizer", "train", *_both_sides("optimizer_alone", lambda case: (3,))),
        compared("ema", "train", *_both_sides("average", lambda case: (3,))),
        compared("scaler", "train", *map(_on_the_smallest_network, _both_sides("scaler_alone"))),
        train if thorough else train._replace(rows=lambda case: _small_first(train.rows, case)),
        Stage("run", "train+eval", "float32", lambda case: _with_torch("dry_run", case, thorough)),
        Stage("resume", "train", "float32", lambda case: resume.rows(about_files(case)), needs_torch=False),
        Stage("convert", "eval", "float32", lambda case: _with_torch("convert_stage", about_files(case))),
        Stage("ranks", "train", "float64", ranks.rows, needs_torch=False),
    ]
    return {stage.name: stage for stage in table}


def _with_torch(module: str, *arguments) -> Iterator[Row]:
    """The rows of a stage whose module loads Torch, which is not installed everywhere."""
    return importlib.import_module(f"parity.{module}").rows(*arguments)


def _small_first(rows: Callable[[Case], Iterator[Row]], case: Case) -> Iterator[Row]:
    if case.large:
        yield from rows(case.on_a_small_network().small())
    yield from rows(case)


def _both_sides(function: str, arguments: Callable[[Case], tuple] = lambda case: ()) -> tuple[Callable, Callable]:
    """The function of this name in parity/subject.py and in parity/reference.py, both in float64.

    Args:
        arguments: what to call it with on a case, beside the case and the dtype.
    """
    def ours(case: Case) -> Trace:
        return getattr(subject, function)(case, "float64", *arguments(case))

    def theirs(case: Case) -> Trace:
        from parity import reference  # loads Torch, which is not installed everywhere

        return getattr(reference, function)(case, "float64", *arguments(case))

    return ours, theirs


def _on_the_smallest_network(side: Callable[[Case], Trace]) -> Callable[[Case], Trace]:
    """This side of a stage that does not depend on the network."""
    return lambda case: side(case.on_a_small_network("wideresnet"))


def _schedule_probe(case: Case) -> tuple:
    """(steps, warm-up) of the run itself and of two short schedules, and percents of them to look at."""
    settings = [(case.config.train.total_steps, case.config.optim.warmup_steps), (1000, 0), (100, 10)]
    return settings, [1, 10, 25, 50, 75, 99, 100]


def _metric_probe(case: Case) -> tuple:
    """Logits with ties, one row all equal, for 77 images in batches of 36: the last one is partial; 25 evaluations."""
    rng, count = np.random.default_rng([case.seed, 2]), 77
    table = rng.standard_normal((count, case.num_classes)).round()
    table[3] = 0.0
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3)).copy()
    return table, rng.integers(0, case.num_classes, count), images, 36, rng.uniform(0, 100, 25).tolist()


@dataclass
class StageResult:
    """The rows of one stage on one case. A stage that compared nothing has not passed."""

    stage: str
    dtype: str
    mode: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    first_divergence: Row | None = None
    hint: str = ""
    note: str = ""
    device: str = field(default_factory=paddle.device.get_device)  # that Paddle computed on

    @property
    def passed(self) -> bool:
        return bool(self.rows) and self.first_divergence is None

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda r: r.relative)


def first_failure(failed: list[StageResult]) -> StageResult | None:
    """Of stages that failed, in order, the one that names the fault.

    A stage that looks at one thing names it. Where none of those fails, stage `reference` comes before the runs from
    end to end: both sides of those then agree, and are wrong.
    """
    return min(failed, key=_rank, default=None)


def _rank(result: StageResult) -> int:
    """Of two stages that failed, the one of the lower rank names the fault."""
    return 1 if result.stage == "reference" else 2 if result.stage in END_TO_END else 0


def of_self_check(part: str, case: Case) -> list[str]:
    """The stages that a self-check has time for: "all", or the share of the "first" or "second" of two processes.

    For those about files it has none if the network is large, and what trains without a loss scale needs no `scaler`.
    The second process has stages without Torch, which takes seconds to load; of a large network, production's side of
    the stages in TOGETHER, and no others. Both have the operators, of which each takes some, and which come last.
    """
    second = () if case.large else ("reference", "config", "augment", "data", "resume")
    names = [name for name in SELF_CHECK if not (case.large and name in ABOUT_FILES)
             and (name != "scaler" or case.config.train.amp == "float16")]
    if part == "all":
        return names
    return [*(n for n in names if n != "operators" and (n in second) == (part == "second")), "operators"]


def merged(results: Iterable[StageResult]) -> list[StageResult]:
    """One result of each stage: of one that two processes share the rows of both, those of the later result first,
    since the second process begins with the network's first operators.
    """
    whole: dict[str, StageResult] = {}
    for result in results:
        other = whole.get(result.stage)
        if other is None:
            whole[result.stage] = result
            continue
        both = StageResult(result.stage, result.dtype, result.mode, seconds=result.seconds + other.seconds)
        for row in (*result.rows, *other.rows):
            _note(both, row)
        whole[result.stage] = both
    return list(whole.values())


def production_side(case: Case) -> Side:
    """Production's side of a large network in `rows_together`: its digest, or the failed row of what it raised."""
    try:
        return list(goldens.digest(whole(case)))
    except NOTHING_PROVEN:
        raise
    except Exception as error:
        return raised("stage/raised nothing", error)


def run_chosen(chosen: Iterable[str], case: Case, every: dict[str, Stage], on_a_small_network: Mapping[str, int],
               keep_going: bool = True, large_side: Callable[[Case], Side] = production_side) -> Iterator[StageResult]:
    """The results of the chosen stages, in their order; those of TOGETHER are taken from one network.

    Args:
        on_a_small_network: stages that take one in the place of a large network, and of how many blocks a stage.
        large_side: as of `rows_together`.
    """
    shared: dict[str, StageResult] = {}
    for name in chosen:
        if name in TOGETHER:
            if not shared:
                shared = run_together(rows_together(case, large_side))
                recorded = case.large and goldens.recorded(case)
            shared[name].note = "against recorded results" if recorded else ""
            yield shared[name]
        else:
            of_stage = case
            if case.large and name in on_a_small_network:
                of_stage = case.on_a_small_network(blocks=on_a_small_network[name]).small()
            yield run_stage(every[name], of_stage, keep_going=keep_going)


def run_together(rows: Iterator[Row]) -> dict[str, StageResult]:
    """The stages of TOGETHER, of whose rows these are all."""
    started = time.perf_counter()
    stage_of = {section: name for name, sections in TOGETHER.items() for section in sections}
    step = re.compile(r"step \d+ ")
    results = {name: StageResult(name, "float64", "train") for name in TOGETHER}
    for row in _guarded(rows):
        section = step.sub("", row.tensor.partition("/")[0])
        _note(results[stage_of.get(section, "forward")], row)
    for result in results.values():
        result.seconds = (time.perf_counter() - started) / len(results)
    return results


def rows_together(case: Case, large_side: Callable[[Case], Side] = production_side) -> Iterator[Row]:
    """One network is built on each side, evaluated, and trained for two steps.

    A large network takes one step; fresh weights are looked at on a small one before, and what comes with the second
    step on a small WideResNet. Digests of the two sides are compared, which are not in memory together; the reference's
    are those of a golden where this case is recorded, as the published networks are.

    Args:
        large_side: what gives production's side of a large network; another process may have computed it.
    """
    if not case.large:
        yield from compare(whole(case), whole_reference(case))
        return
    yield from compare(*(side(case.on_a_small_network()) for side in _both_sides("fresh")))
    yield from rows_together(case.on_a_small_network("wideresnet").small())
    name = goldens.recorded(case)
    theirs = goldens.read(name, goldens.WHOLE) if name else list(goldens.digest(whole_reference(case)))
    gc.collect()  # networks know themselves in a circle
    ours = large_side(case)
    yield from [ours] if isinstance(ours, Row) else compare(ours, theirs)


def whole(case: Case) -> Trace:
    """Production's side of one network in `rows_together`."""
    return subject.whole(*_extent(case))


def whole_reference(case: Case) -> Trace:
    """The reference's side of one network in `rows_together`."""
    from parity import reference  # loads Torch, which is not installed everywhere

    return reference.whole(*_extent(case))


def _extent(case: Case) -> tuple[Case, str, dict[int, tuple[str, ...]], type]:
    """The case to take, its dtype, what is wanted of its steps, and in what tensors are collected."""
    if case.large:
        return case.with_few_images(), "float64", _ONE_STEP, goldens.Digest
    return case, "float64", _TWO_STEPS, dict


def too_large_to_rehearse(case: Case, device: str) -> bool:
    """Whether stage `run` takes the network itself beside a training instead of before it.

    On a GPU it does not: there it takes little time, and beside a training there may be no memory left for it.
    """
    return case.large and not device.startswith("gpu")


def run_stage(stage: Stage, case: Case, reference: Trace | None = None, keep_going: bool = True) -> StageResult:
    """Runs one stage.

    Args:
        reference: a trace that replaces the one of the Torch side, for a stage made by `compared`.
        keep_going: whether the rows after the first that fails are wanted.
    """
    started = time.perf_counter()
    result = StageResult(stage.name, stage.dtype, stage.mode)
    if stage.name in ON_THE_CPU:
        result.device = "cpu"
    for row in _guarded(stage.rows(case) if reference is None else compare(stage.ours(case), reference)):
        _note(result, row)
        if not (row.passed or keep_going):
            break
    result.seconds = time.perf_counter() - started
    return result


def _note(result: StageResult, row: Row) -> None:
    result.rows.append(row)
    if not row.passed and result.first_divergence is None:
        result.first_divergence, result.hint = row, hint_for(result.stage, row)


def _guarded(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows of a stage; production code that raises is one more, and fails."""
    try:
        yield from rows
    except NOTHING_PROVEN:
        raise
    except Exception as error:
        yield raised("stage/raised nothing", error)


def isolate(result: StageResult, case: Case) -> None:
    """Notes on a failed forward stage which layers are at fault themselves and which only inherit a fault.

    Every layer that diverged is run again on the reference's input to it.
    """
    diverged = {r.name() for r in result.rows if not r.passed and r.tensor.startswith("train activations/")}
    if not diverged:
        return
    from parity import reference  # loads Torch, which is not installed everywhere

    at_fault = [name for name, (given, expected) in reference.layers_alone(case).items() if name in diverged
                and not compare_tensor(name, subject.layer_alone(case, name, given), expected).passed]
    result.note = (f"fed with the reference's input, {len(at_fault)} of the {len(diverged)} diverging layers diverge "
                   f"by themselves{': ' + ', '.join(at_fault[:6]) if at_fault else ''}; the others inherit it")
