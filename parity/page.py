"""A Report as one HTML page without any file beside it: verdict, stage table, and a log plot of every tensor."""

import html
import math

from parity.compare import gate_of
from parity.report import Report, dump, versions_line
from parity.stages import StageResult

# The plot in its own units: the curves lie between LEFT and WIDTH - RIGHT, and between TOP and BOTTOM.
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 1100, 60, 20, 20, 320, 384
_LOWEST, _HIGHEST = -18, 1  # exponents of ten on the vertical axis


def html_page(report: Report) -> str:
    """The whole page; tensor names and hints are escaped."""
    failure = report.first_failure()
    return _PAGE.format(
        verdict=html.escape(report.verdict()), tone="ok" if report.passed else "bad",
        about=html.escape(f"{report.subject}; against {report.against}; {versions_line()}"),
        rows="".join(map(_table_row, filter(lambda r: r.rows, report.results))),
        detail="" if failure is None or failure.first_divergence is None else _first_divergence(failure),
        plot=_plot(report.results))


def _table_row(result: StageResult) -> str:
    return (f"<tr class={'ok' if result.passed else 'bad'}><td>{result.stage}<td>{result.device}<td>{result.dtype}"
            f"<td>{result.mode}<td>{'pass' if result.passed else 'FAIL'}<td>{len(result.rows)}"
            f"<td>{result.worst.relative:.1e}<td>{html.escape(result.worst.tensor)}<td>{result.seconds:.2f}<td>{html.escape(result.note)}")


def _first_divergence(failure: StageResult) -> str:
    row = failure.first_divergence
    elements = html.escape("\n".join(dump(row)))
    return (f"<h2>First divergence</h2><p>{html.escape(row.tensor)}: {html.escape(failure.hint)}</p>"
            f"<pre>{elements}</pre>")


def _plot(results: list[StageResult]) -> str:
    """The relative error of every tensor in the order of comparison, on a log scale, as an SVG."""
    judged = [(r, row) for r in results if not _is_lane(r) for row in r.rows]
    noise = {row.tensor: row.absolute for r in filter(_is_lane, results) for row in r.rows}
    if not judged:
        return ""
    dx = (_WIDTH - _LEFT - _RIGHT) / len(judged)
    parts = [*_grid(), *_stage_labels([result.stage for result, _ in judged], dx)]
    for i, (result, row) in enumerate(judged):
        x = _LEFT + i * dx
        if result.dtype == "float64":
            parts.append(f'<path d="M{x:.1f} {_y(gate_of(row.tensor)):.1f}h{max(dx, 0.5):.1f}" class="gate"/>')
        if row.tensor in noise and result.stage == "train":
            parts.append(_point(x, noise[row.tensor], "noise", f"{row.tensor} float32"))
        parts.append(_point(x, row.relative, "good" if row.passed else "fail", row.tensor))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _is_lane(result: StageResult) -> bool:
    """Whether these rows are the rounding lane's, whose figures are ratios."""
    return (result.stage, result.dtype) == ("backward", "float32")


def _y(value: float) -> float:
    exponent = math.log10(value) if value > 0 else _LOWEST
    share = (_HIGHEST - min(max(exponent, _LOWEST), _HIGHEST)) / (_HIGHEST - _LOWEST)
    return _TOP + (_BOTTOM - _TOP) * share


def _grid() -> list[str]:
    return [f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_y(10.0**e):.1f}" y2="{_y(10.0**e):.1f}" class="grid"/>'
            f'<text x="{_LEFT - 8}" y="{_y(10.0**e) + 4:.1f}" text-anchor="end">1e{e}</text>'
            for e in range(_LOWEST, _HIGHEST + 1, 3)]


def _stage_labels(stage_of_tensor: list[str], dx: float) -> list[str]:
    """A line where each stage begins, and its name, on four lines in turn since some stages are narrow."""
    starts = [i for i, stage in enumerate(stage_of_tensor) if i == 0 or stage != stage_of_tensor[i - 1]]
    parts = []
    for turn, i in enumerate(starts):
        x, foot = _LEFT + i * dx, _BOTTOM + 16 + 14 * (turn % 4)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{foot}" class="stage"/>'
                     f'<text x="{x + 3:.1f}" y="{foot}">{stage_of_tensor[i]}</text>')
    return parts


def _point(x: float, value: float, kind: str, what: str) -> str:
    return (f'<circle cx="{x:.1f}" cy="{_y(value):.1f}" r="2" class="{kind}">'
            f"<title>{html.escape(what)} {value:.1e}</title></circle>")


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Parity</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1140px; padding: 0 1rem; color: #1b1f24 }}
h1 {{ font-size: 1.15rem; padding: .6rem .9rem; border-radius: 6px }}
h1.ok {{ background: #dff5e3 }} h1.bad {{ background: #fde2e0 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; overflow-wrap: anywhere; padding: .25rem .6rem; border-bottom: 1px solid #d8dee4 }}
tr.bad td {{ background: #fde2e0 }} pre {{ background: #f6f8fa; padding: .8rem; overflow: auto }}
svg {{ width: 100%; font-size: 11px }} .grid {{ stroke: #e4e8ec }} .stage {{ stroke: #9aa4ae; stroke-dasharray: 2 3 }}
.gate {{ stroke: #c62828; stroke-width: 1.5; fill: none }} .good {{ fill: #1565c0 }} .fail {{ fill: #c62828 }}
.noise {{ fill: #f0a020 }}
</style>
<h1 class="{tone}">{verdict}</h1><p>{about}</p>
<table><tr><th>stage<th>device<th>dtype<th>mode<th>verdict<th>tensors<th>worst<th>its tensor<th>seconds<th>note</tr>
{rows}</table>
<h2>Relative error of every tensor</h2>
<p>Blue: measured; red dots are over their gate. Red line: the gate of tensors in float64; each tensor of a stage in
float32 has a gate of its own. Orange: float32 noise of the reference itself, where it was measured.</p>
{plot}{detail}</html>
"""
