"""The stages: what each one proves, which trace it takes from either side, and how a run of them is put together."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from parity import augment, subject
from parity.case import Case
from parity.compare import Row, Trace, compare, compare_tensor
from parity.hints import hint_for

STEP_SECTIONS = ("lr", "activations", "losses", "gradients", "momentum", "weights", "buffers", "ema")


class Stage(NamedTuple):
    """One thing to prove. `ours` and `reference` make the traces that have to agree."""

    name: str
    mode: str  # train, eval, or - where there is no network
    ours: Callable[[Case], Trace]
    reference: Callable[[Case], Trace]


@dataclass
class StageResult:
    stage: str
    dtype: str
    mode: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    first_divergence: Row | None = None
    hint: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.rows) and self.first_divergence is None

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda r: r.relative)


def _mirror(function: str, *args) -> Callable[[Case], Trace]:
    """A reference trace, with Torch imported only when it is asked for."""
    def trace(case: Case) -> Trace:
        from parity import reference

        return getattr(reference, function)(case, "float64", *args)
    return trace


def _pair(name: str, mode: str, function: str, *args) -> Stage:
    return Stage(name, mode, lambda case: getattr(subject, function)(case, "float64", *args), _mirror(function, *args))


def _metric_probe(case: Case) -> tuple:
    """Logits with ties, one row all equal, for 17 images in batches of 5: the last one is partial."""
    rng = np.random.default_rng([case.seed, 2])
    table = rng.standard_normal((17, case.num_classes)).round()
    table[3] = 0.0
    images = np.broadcast_to(np.arange(17, dtype=np.uint8)[:, None, None, None], (17, 8, 8, 3)).copy()
    return table, rng.integers(0, case.num_classes, 17), images, 5


def _metric_stage() -> Stage:
    return Stage("metric", "eval", lambda case: subject.metric(case, "float64", *_metric_probe(case)),
                 lambda case: _mirror("metric", *_metric_probe(case))(case))


def _schedule_stage() -> Stage:
    """The run's own schedule, and a short one with a warm-up."""
    points = [1, 10, 25, 50, 75, 99, 100]  # percent of the run

    def settings(case):
        return [(case.config.train.total_steps, case.config.optim.warmup_steps), (1000, 0), (100, 10)]

    return Stage("schedule", "-", lambda case: subject.learning_rate(case, "float64", settings(case), points),
                 lambda case: _mirror("learning_rate", settings(case), points)(case))


def stages(steps: int = 3) -> dict[str, Stage]:
    """All stages by name, in the order of diagnosis; `steps` is the number of free-running steps of `train`."""
    every = [
        _schedule_stage(),
        Stage("augment", "-", augment.ours, augment.reference),
        _pair("forward", "eval+train", "forward"),
        _metric_stage(),
        _pair("loss", "-", "loss"),
        _pair("backward", "train", "train", 1, ("losses", "gradients")),
        _pair("optimizer", "train", "optimizer_alone", 3),
        _pair("ema", "train", "average", 3),
        _pair("train", "train", "train", steps, STEP_SECTIONS),
    ]
    return {stage.name: stage for stage in every}


SELF_CHECK = ("forward", "loss", "backward", "optimizer", "ema")


def run_stage(stage: Stage, case: Case, reference: Trace | None = None, keep_going: bool = True) -> StageResult:
    """Runs one stage. `reference` replaces the trace of the Torch side; without `keep_going` it ends where it fails."""
    started = time.perf_counter()
    result = StageResult(stage.name, "float64", stage.mode)
    pairs = compare(stage.ours(case), stage.reference(case) if reference is None else reference)
    for row in _judged(pairs):
        result.rows.append(row)
        if not row.passed and result.first_divergence is None:
            result.first_divergence, result.hint = row, hint_for(stage.name, row)
            if not keep_going:
                break
    result.seconds = time.perf_counter() - started
    return result


LANE_GATE = 3.0  # median of err(ours, float32) / err(torch, float32), each against Torch in float64


def rounding_lane(case: Case, seeds: list[int]) -> StageResult:
    """Float32 on the production path, CPU kernels included: one training step against the float64 truth.

    A row's `relative` is the ratio of our largest error to Torch's float32 one, the median over seeds. Single ratios
    vary, since pre-activations near 0 change sign, so the verdict is on the median of all rows.
    """
    from parity import reference

    started = time.perf_counter()
    result = StageResult("backward", "float32", "train")
    sections = ("activations", "losses", "gradients")
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        rounded = dataclasses.replace(case, seed=seed, float32_weights=True)
        traces = (subject.train(rounded, "float32", 1, sections), reference.train(rounded, "float32", 1, sections),
                  reference.train(rounded, "float64", 1, sections))
        for (section, ours), (_, theirs), (_, truth) in zip(*traces, strict=True):
            for name, exact in truth.items():
                if exact.dtype.kind == "f":
                    scale = float(np.abs(exact).max()) or 1.0
                    errors.setdefault(f"{section}/{name}", []).append(
                        (float(np.abs(ours[name] - exact).max()) / scale,
                         float(np.abs(theirs[name] - exact).max()) / scale))
    floor = float(np.finfo(np.float32).eps) / 2  # below it both are as good as exact
    for tensor, pairs in errors.items():
        ratio = float(np.median([max(a, floor) / max(b, floor) for a, b in pairs]))
        result.rows.append(Row(tensor, float(np.median([b for _, b in pairs])), ratio, True))
    median = float(np.median([row.relative for row in result.rows]))
    result.note = f"median ratio of float32 errors to Torch's {median:.2f} (gate {LANE_GATE:g}), {len(seeds)} seeds"
    if not median <= LANE_GATE:
        result.first_divergence = result.worst._replace(passed=False)
        result.hint = "float32 operators that round worse than Torch's"
    result.seconds = time.perf_counter() - started
    return result


def _judged(rows: Iterator[Row]) -> Iterator[Row]:
    """Fresh weights are random on both sides: what must agree is their distribution."""
    for row in rows:
        yield _same_distribution(row) if row.tensor.startswith("initial/") else row


def _same_distribution(row: Row) -> Row:
    """Mean and standard deviation of two independent samples, each within 6 standard errors; constants exactly."""
    if row.passed or row.ours is None or row.reference is None or row.why:
        return row
    ours, reference = row.ours, row.reference
    spread, count = float(reference.std()), reference.size
    if spread == 0 or ours.std() == 0:
        return row
    z_mean = abs(ours.mean() - reference.mean()) / (spread * np.sqrt(2 / count))
    z_spread = abs(ours.std() - spread) / (spread * np.sqrt(1 / count))
    if max(z_mean, z_spread) < 6:
        return Row(row.tensor, 0.0, 0.0, True)
    return row._replace(why=f"initial standard deviation {ours.std():.4g}, the reference has {spread:.4g}")


def isolate(result: StageResult, case: Case) -> None:
    """Notes on a failed forward stage which layers are at fault themselves and which only inherit a fault.

    Every layer that diverged is run again on the reference's input to it.
    """
    diverged = {r.name() for r in result.rows if not r.passed and r.tensor.startswith("train activations/")}
    if not diverged:
        return
    from parity import reference

    at_fault = [name for name, (given, expected) in reference.layers_alone(case).items() if name in diverged
                and not compare_tensor(name, subject.layer_alone(case, name, given), expected).passed]
    result.note = (f"fed with the reference's input, {len(at_fault)} of the {len(diverged)} diverging layers diverge "
                   f"by themselves{': ' + ', '.join(at_fault[:6]) if at_fault else ''}; the others inherit it")
