"""The rounding lane: float32 as it is trained, CPU kernels included, measured against the same step in float64."""

import dataclasses
import time

import numpy as np

from fixmatch.runtime import arithmetic
from parity import subject
from parity.case import Case
from parity.compare import ROUNDOFF, Row
from parity.stages import StageResult

# On err(ours, float32) / err(Torch, float32), each against Torch in float64: of the median tensor, and of every one.
# Clean worst ratios of four networks are 2.9 to 3.6.
GATE, GATE_OF_EACH = 3.0, 30.0

_SECTIONS = ("activations", "losses", "gradients")


def rounding_lane(case: Case, seeds: list[int]) -> StageResult:
    """One training step on each of these seeds.

    A row's `relative` is the ratio of our largest error to Torch's float32 one, the median over seeds. Single ratios
    vary, since pre-activations near 0 change sign, so the gate on each is wide, and that on the median of all narrow.
    Where a GPU computes in TF32, Torch's errors on the CPU count as so many times larger.
    """
    started = time.perf_counter()
    result = StageResult("backward", "float32", "train")
    floor = ROUNDOFF["float32"]  # below it both are as good as exact
    coarser = ROUNDOFF[arithmetic(amp=None)] / ROUNDOFF["float32"]
    for tensor, pairs in _errors(case, seeds).items():
        ratio = float(np.median([max(a, floor) / max(coarser * b, floor) for a, b in pairs]))
        result.rows.append(Row(tensor, float(np.median([b for _, b in pairs])), ratio, ratio <= GATE_OF_EACH))
    median = float(np.median([row.relative for row in result.rows]))
    result.note = (f"ratio of float32 errors to Torch's: median {median:.2f} (gate {GATE:g}), each below "
                   f"{GATE_OF_EACH:g}, {len(seeds)} seeds")
    if not (median <= GATE and all(row.passed for row in result.rows)):
        result.first_divergence = result.worst._replace(passed=False)
        result.hint = "float32 operators that round worse than Torch's"
    result.seconds = time.perf_counter() - started
    return result


def _errors(case: Case, seeds: list[int]) -> dict[str, list[tuple[float, float]]]:
    """For every float tensor, a seed each: our largest float32 error and Torch's, relative to the largest element."""
    from parity import reference  # loads Torch, which is not installed everywhere

    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        rounded = dataclasses.replace(case, seed=seed, float32_weights=True)
        first_step = {0: _SECTIONS}
        traces = (subject.train(rounded, "float32", first_step), reference.train(rounded, "float32", first_step),
                  reference.train(rounded, "float64", first_step))
        for (section, ours), (_, theirs), (_, truth) in zip(*traces, strict=True):
            # a tensor that is 0 but for rounding, such as a gradient before the final Mish, is judged by its neighbours
            smallest = 1e-6 * max(float(np.abs(a).max()) for a in truth.values() if a.dtype.kind == "f" and a.size)
            for name, exact in truth.items():
                if exact.dtype.kind == "f":
                    scale = max(float(np.abs(exact).max()), smallest)
                    errors.setdefault(f"{section}/{name}", []).append(
                        (float(np.abs(ours[name] - exact).max()) / scale,
                         float(np.abs(theirs[name] - exact).max()) / scale))
    return errors
