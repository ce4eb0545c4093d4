"""A proof: the chosen stages run on a case, against Torch or against what was recorded from it, into one Report."""

import time

from parity import goldens, stages
from parity.case import CLASSIC_SEEDS, Case
from parity.lane import rounding_lane
from parity.report import Report


class NotRecorded(ValueError):
    """A stage that was asked for without Torch and that no golden holds."""


def with_torch(case: Case, chosen: list[str], seeds: list[int], steps: int, lane: bool) -> Report:
    """Runs the chosen stages on every seed against the mirror.

    Args:
        steps: free-running steps of the stage `train`.
        lane: whether the rounding lane follows a passed stage `backward`.
    """
    import torch  # which is not installed everywhere

    started = time.perf_counter()
    every, results = stages.stages(steps), []
    for seed in seeds:
        for name in chosen:
            result = stages.run_stage(every[name], case.with_seed(seed))
            if name == "forward" and not result.passed:
                stages.isolate(result, case.with_seed(seed))
            results.append(result)
    if lane and "backward" in chosen and all(result.passed for result in results):
        results.append(rounding_lane(case, seeds if len(seeds) >= 5 else list(CLASSIC_SEEDS)))
    return Report(results, time.perf_counter() - started, f"torch {torch.__version__}", _describe(case))


def with_goldens(case: Case, chosen: list[str]) -> Report:
    """Runs the chosen stages on the recorded network nearest to the case's. Raises NotRecorded and GoldenError."""
    started = time.perf_counter()
    recorded = (*stages.SELF_CHECK, "augment")
    missing = [name for name in chosen if name not in recorded]
    if missing:
        raise NotRecorded(f"stage {', '.join(missing)}: needs Torch: pip install 'fixmatch-paddle[parity]'; "
                          f"without it: {', '.join(recorded)}")
    name, exact = goldens.nearest(case.config.model)
    results = [_with_golden(stages.stages()[stage], name) for stage in chosen]
    shape = f"{name} with the reference's hyper-parameters" + (
        "" if exact else f", the nearest recorded to {case.config.model}")
    return Report(results, time.perf_counter() - started,
                  "results recorded from torch, since torch is not installed (fresh weights are not compared)", shape)


def _with_golden(stage: stages.Stage, name: str) -> stages.StageResult:
    if stage.name == "augment":  # its reference is Pillow, which is always there
        return stages.run_stage(stage, goldens.CASES[name])
    digested = stage._replace(ours=lambda case: goldens.digest(stage.ours(case)))
    return stages.run_stage(digested, goldens.CASES[name], goldens.read(name, stage.name))


def _describe(case: Case) -> str:
    model = case.config.model
    groups = f" cardinality {model.cardinality}" if model.arch == "resnext" else ""
    pictures = "real images" if case.loader else "images from a numpy seed"
    return f"{model.arch} depth {model.depth} width {model.width}{groups}, {case.num_classes} classes, {pictures}"
