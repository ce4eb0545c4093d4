"""What a parity run says: the verdict line, a table, the first failure, and the same as JSON."""

import dataclasses
import math
import os

import numpy as np

from fixmatch import version
from parity.compare import float64_gate, gate_of
from parity.stages import StageResult, first_failure

# Differences from the reference that are known, harmless and accepted. There is none.
DECLARED_DEVIATIONS: tuple[str, ...] = ()


@dataclasses.dataclass
class Report:
    """A finished run. `against` says what the reference was: Torch, or results recorded from it."""

    results: list[StageResult]
    seconds: float
    against: str
    subject: str  # which network and settings
    aside: str = ""  # what was left out here, for the verdict line

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)

    def first_failure(self) -> StageResult | None:
        """The stage that names the fault."""
        return first_failure([r for r in self.results if not r.passed])

    def verdict(self) -> str:
        """The first line."""
        exact = [r for r in self.results if r.dtype == "float64"]
        failure = self.first_failure()
        if failure is not None:
            row = failure.first_divergence
            if row is None:
                return f"PARITY FAIL {failure.stage}: nothing was compared"
            size = row.why or f"{row.relative:.1e}"
            return f"PARITY FAIL {row.tensor} {size}: {failure.hint}"
        rows = [row for result in exact for row in result.rows]
        total = sum(len(r.rows) for r in self.results)
        count = len(DECLARED_DEVIATIONS)
        widest = max((gate_of(row.tensor) for row in rows), default=0.0)
        later = f", {widest:.0e} after 3 steps" if widest > float64_gate() else ""
        worst = f"worst {max(r.relative for r in rows):.1e} (gate {float64_gate():.0e}{later}), " if rows else ""
        return (f"PARITY PASS {total}/{total} tensors, {worst}{count} declared deviation{'s' * (count != 1)}, "
                f"{self.seconds:.1f} s{self.aside}")

    def text(self) -> str:
        """Verdict, table, first failure."""
        lines = [self.verdict(), f"{self.subject}; against {self.against}; {versions_line()}", "",
                 f"{'stage':<10} {'device':<6} {'dtype':<8} {'mode':<11} {'verdict':<8} {'tensors':>7}  {'worst':>8}  "
                 f"{'seconds':>7}"]
        for r in self.results:
            worst = f"{r.worst.relative:8.1e}" if r.rows else "       -"
            verdict = "pass" if r.passed else "FAIL"
            lines.append(f"{r.stage:<10} {r.device:<6} {r.dtype:<8} {r.mode:<11} {verdict:<8} {len(r.rows):>7}  "
                         f"{worst}  {r.seconds:>7.2f}  {r.note}".rstrip())
        failure = self.first_failure()
        if failure is not None and failure.first_divergence is not None:
            row = failure.first_divergence
            failed = sum(not r.passed for r in failure.rows)
            lines += ["", f"first divergence in stage {failure.stage}: {row.tensor}"
                      + (f" ({failed} of {len(failure.rows)} tensors of the stage diverge)" if failed > 1 else ""),
                      f"  {failure.hint}", *dump(row)]
        return "\n".join(lines)

    def json(self) -> dict:
        """All of it but the single tensors, ready for json.dumps."""
        return {"verdict": self.verdict(), "passed": self.passed, "seconds": round(self.seconds, 3),
                "against": self.against, "subject": self.subject, "versions": versions(), "gate": float64_gate(),
                "declared_deviations": list(DECLARED_DEVIATIONS), "stages": [_stage_json(r) for r in self.results]}


def versions() -> dict[str, str | None]:
    """Of Python and the packages that compute, None for one that is not installed; and the number of threads."""
    return version.versions() | {"threads": os.environ.get("OMP_NUM_THREADS", "")}


def versions_line() -> str:
    return ", ".join(f"{name} {value}" for name, value in versions().items() if value)


def _stage_json(result: StageResult) -> dict:
    row, worst = result.first_divergence, result.worst if result.rows else None
    return {"stage": result.stage, "device": result.device, "dtype": result.dtype, "mode": result.mode,
            "verdict": "pass" if result.passed else "fail", "tensors": len(result.rows),
            "worst": None if worst is None else {
                "tensor": worst.tensor, "abs": _finite(worst.absolute), "rel": _finite(worst.relative)},
            "first_divergence": None if row is None else {
                "tensor": row.tensor, "abs": _finite(row.absolute), "rel": _finite(row.relative), "why": row.why,
                "hint": result.hint},
            "note": result.note, "seconds": round(result.seconds, 3)}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"  # JSON has no infinity


def dump(row, most: int = 5) -> list[str]:
    """The elements that differ most."""
    if row.why:
        return [f"  {row.why}"]
    if row.ours is None or row.reference is None:
        return []
    ours, reference = np.atleast_1d(row.ours), np.atleast_1d(row.reference)
    order = np.argsort(-np.abs(ours - reference), axis=None, kind="stable")[:most]
    lines = [f"  {'index':<24} {'ours':>24} {'reference':>24}"]
    for flat in order:
        index = tuple(int(i) for i in np.unravel_index(flat, ours.shape))
        lines.append(f"  {list(index)!s:<24} {ours[index]:>24.17g} {reference[index]:>24.17g}")
    return lines
