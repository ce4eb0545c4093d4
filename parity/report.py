"""What a parity run says: the verdict line, a table, the first failure, JSON, and one self-contained HTML page."""

import dataclasses
import html
import importlib.metadata
import math
import os
import platform

import numpy as np

from parity.compare import GATE, LATER_GATE, gate_of
from parity.stages import StageResult

# Differences from the reference that are known, harmless and accepted. There is none.
DECLARED_DEVIATIONS: tuple[str, ...] = ()


@dataclasses.dataclass
class Report:
    """A finished run. `against` says what the reference was: Torch, or results recorded from it."""

    results: list[StageResult]
    seconds: float
    against: str
    subject: str  # which network and settings

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)

    def first_failure(self) -> StageResult | None:
        return next((r for r in self.results if not r.passed), None)

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
        later = f", {LATER_GATE:.0e} after 3 steps" if any(gate_of(row.tensor) > GATE for row in rows) else ""
        worst = f"worst {max(r.relative for r in rows):.1e} (gate {GATE:.0e}{later}), " if rows else ""
        return (f"PARITY PASS {total}/{total} tensors, {worst}{count} declared deviation{'s' * (count != 1)}, "
                f"{self.seconds:.1f} s")

    def text(self) -> str:
        """Verdict, table, first failure."""
        lines = [self.verdict(), f"{self.subject}; against {self.against}; {versions_line()}", "",
                 f"{'stage':<10} {'dtype':<8} {'mode':<11} {'verdict':<8} {'tensors':>7}  {'worst':>8}  {'seconds':>7}"]
        for r in self.results:
            worst = f"{r.worst.relative:8.1e}" if r.rows else "       -"
            verdict = "pass" if r.passed else "FAIL"
            lines.append(f"{r.stage:<10} {r.dtype:<8} {r.mode:<11} {verdict:<8} {len(r.rows):>7}  {worst}  "
                         f"{r.seconds:>7.2f}  {r.note}".rstrip())
        failure = self.first_failure()
        if failure is not None and failure.first_divergence is not None:
            row = failure.first_divergence
            failed = sum(not r.passed for r in failure.rows)
            lines += ["", f"first divergence in stage {failure.stage}: {row.tensor}"
                      + (f" ({failed} of {len(failure.rows)} tensors of the stage diverge)" if failed > 1 else ""),
                      f"  {failure.hint}", *_dump(row)]
        return "\n".join(lines)

    def json(self) -> dict:
        return {"verdict": self.verdict(), "passed": self.passed, "seconds": round(self.seconds, 3),
                "against": self.against, "subject": self.subject, "versions": versions(), "gate": GATE,
                "declared_deviations": list(DECLARED_DEVIATIONS), "stages": [_stage_json(r) for r in self.results]}

    def html(self) -> str:
        """One page without any file beside it: verdict, stage table, and a log plot of every tensor."""
        rows = "".join(
            f"<tr class={'ok' if r.passed else 'bad'}><td>{r.stage}<td>{r.dtype}<td>{r.mode}"
            f"<td>{'pass' if r.passed else 'FAIL'}<td>{len(r.rows)}<td>{r.worst.relative:.1e}"
            f"<td>{html.escape(r.worst.tensor)}<td>{r.seconds:.2f}<td>{html.escape(r.note)}"
            for r in self.results if r.rows)
        failure = self.first_failure()
        detail = ""
        if failure is not None and failure.first_divergence is not None:
            dump = "\n".join(_dump(failure.first_divergence))
            detail = (f"<h2>First divergence</h2><p>{html.escape(failure.first_divergence.tensor)}: "
                      f"{html.escape(failure.hint)}</p><pre>{html.escape(dump)}</pre>")
        return _PAGE.format(
            verdict=html.escape(self.verdict()), tone="ok" if self.passed else "bad",
            about=html.escape(f"{self.subject}; against {self.against}; {versions_line()}"),
            rows=rows, detail=detail, plot=_plot(self.results))


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "threads": os.environ.get("OMP_NUM_THREADS", "")}
    for package in ("paddlepaddle", "torch", "numpy", "pillow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def versions_line() -> str:
    return ", ".join(f"{name} {value}" for name, value in versions().items() if value)


def _stage_json(result: StageResult) -> dict:
    row, worst = result.first_divergence, result.worst if result.rows else None
    return {"stage": result.stage, "dtype": result.dtype, "mode": result.mode,
            "verdict": "pass" if result.passed else "fail", "tensors": len(result.rows),
            "worst": None if worst is None else {
                "tensor": worst.tensor, "abs": _finite(worst.absolute), "rel": _finite(worst.relative)},
            "first_divergence": None if row is None else {
                "tensor": row.tensor, "abs": _finite(row.absolute), "rel": _finite(row.relative), "why": row.why,
                "hint": result.hint},
            "note": result.note, "seconds": round(result.seconds, 3)}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"  # JSON has no infinity


def _dump(row, most: int = 5) -> list[str]:
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


def _plot(results: list[StageResult]) -> str:
    """Relative error of every tensor in the order of comparison, on a log scale: an SVG."""
    exact = [(r.stage, row) for r in results if r.dtype == "float64" for row in r.rows]
    noise = {row.tensor: row.absolute for r in results if r.dtype == "float32" for row in r.rows}
    if not exact:
        return ""
    width, bottom, left, low, high = 1100, 320, 60, -18, 1
    dx = (width - left - 20) / max(len(exact), 1)

    def y(value: float) -> float:
        exponent = math.log10(value) if value > 0 else low
        return 20 + (bottom - 20) * (high - min(max(exponent, low), high)) / (high - low)

    parts = [f'<line x1="{left}" x2="{width - 20}" y1="{y(10.0**e):.1f}" y2="{y(10.0**e):.1f}" class="grid"/>'
             f'<text x="{left - 8}" y="{y(10.0**e) + 4:.1f}" text-anchor="end">1e{e}</text>'
             for e in range(low, high + 1, 3)]
    gates = " ".join(f"{left + i * dx:.1f},{y(gate_of(row.tensor)):.1f}" for i, (_, row) in enumerate(exact))
    parts.append(f'<polyline points="{left},{y(GATE):.1f} {gates}" class="gate"/>')
    seen, label_row = None, 0
    for i, (stage, row) in enumerate(exact):
        x = left + i * dx
        if stage != seen:  # labels on four lines in turn, since some stages are narrow
            foot = bottom + 16 + 14 * (label_row % 4)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{foot}" class="stage"/>'
                         f'<text x="{x + 3:.1f}" y="{foot}">{stage}</text>')
            seen, label_row = stage, label_row + 1
        title = f"<title>{html.escape(row.tensor)} {row.relative:.1e}</title>"
        if row.tensor in noise:
            parts.append(f'<circle cx="{x:.1f}" cy="{y(noise[row.tensor]):.1f}" r="2" class="noise">'
                         f"<title>{html.escape(row.tensor)} float32 {noise[row.tensor]:.1e}</title></circle>")
        parts.append(f'<circle cx="{x:.1f}" cy="{y(row.relative):.1f}" r="2" '
                     f'class="{"good" if row.passed else "fail"}">{title}</circle>')
    return f'<svg viewBox="0 0 {width} {bottom + 64}" role="img">{"".join(parts)}</svg>'


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Parity</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1140px; padding: 0 1rem; color: #1b1f24 }}
h1 {{ font-size: 1.15rem; padding: .6rem .9rem; border-radius: 6px }}
h1.ok {{ background: #dff5e3 }} h1.bad {{ background: #fde2e0 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #d8dee4 }}
tr.bad td {{ background: #fde2e0 }} pre {{ background: #f6f8fa; padding: .8rem; overflow: auto }}
svg {{ width: 100%; font-size: 11px }} .grid {{ stroke: #e4e8ec }} .stage {{ stroke: #9aa4ae; stroke-dasharray: 2 3 }}
.gate {{ stroke: #c62828; stroke-width: 1.5; fill: none }} .good {{ fill: #1565c0 }} .fail {{ fill: #c62828 }}
.noise {{ fill: #f0a020 }}
</style>
<h1 class="{tone}">{verdict}</h1><p>{about}</p>
<table><tr><th>stage<th>dtype<th>mode<th>verdict<th>tensors<th>worst<th>its tensor<th>seconds<th>note</tr>{rows}</table>
<h2>Relative error of every tensor</h2>
<p>Blue: measured in float64. Red line: the gate; red dots are over it. Orange: float32 noise of the reference itself,
where it was measured. In float32 the worst figure of a stage is a ratio to that noise.</p>
{plot}{detail}</html>
"""
