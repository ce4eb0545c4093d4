"""The page: what a run folder holds, put into templates/report.html, which escapes every text."""

import base64
import io
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
from PIL import Image

from fixmatch.config import KEYS, ConfigError
from fixmatch.files import write_atomic
from fixmatch.report import compare, plots, record
from fixmatch.report.compare import Baseline
from fixmatch.report.figures import calibration, class_rows, confusion_matrix
from fixmatch.report.predictions import Judged
from fixmatch.report.record import Record
from fixmatch.report.verdict import verdict
from fixmatch.settings import value_of

_WORST = 40  # so many classes a table shows, the worst ones
_ROUGH = 200  # test images; of fewer a calibration error is mostly chance
_SHORT = {"first steps": "start", "first steps with unlabeled images": "unlabeled"}  # for the axis of a plot
_SIDE = 96  # pixels that an image of a gallery is enlarged to, at least


@dataclass(frozen=True)
class Plot:
    """Of one drawing, for both grounds, as data URIs."""

    light: str
    dark: str
    alt: str
    scrolls: int | None  # CSS pixels that it needs to be read, if that is more than a phone has


@dataclass(frozen=True)
class Picture:
    uri: str
    truth: str
    said: str
    confidence: float  # 0..1


def write_report(folders: Sequence[pathlib.Path], out: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the page of one or several run folders, and beside it its plots as PNG; returns where the page is.

    The page of one run compares it with the supervised runs that lie beside it.

    Args:
        out: the page's file; None: report.html in the only run's folder, else in the folder that all runs lie in. The
            PNGs are results.png and confusion_matrix.png in the only run's folder, else they begin with the page's
            name, so that they replace no run's.

    Raises:
        ConfigError: not a run folder, or one with damaged files.
    """
    runs = [record.read(folder) for folder in dict.fromkeys(folders)]
    own = runs[0].folder / "report.html" if len(runs) == 1 else None
    if out is None and own is None:
        parents = {run.folder.resolve().parent for run in runs}
        if len(parents) > 1:
            raise ConfigError("the runs lie in several folders: name the page's file with -o FILE")
        out = parents.pop() / "report.html"
    out = out or own
    baselines = runs if len(runs) > 1 else compare.beside(runs[0])
    files = {out.name: render(runs, baselines)}  # all are made before any is written
    files |= {f"{'' if out == own else f'{out.stem}-'}{name}": picture for name, picture in _pngs(runs, baselines)}
    for name, content in files.items():
        write_atomic(out.parent / name, content)
    return out


def render(runs: Sequence[Record], baselines: Sequence[Record]) -> str:
    """The page as HTML.

    Args:
        baselines: runs among which the supervised ones are looked for that `runs` are to beat.
    """
    found = compare.groups(runs)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
                                     autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    context = {"runs": [_run(run, compare.baseline_of(run, baselines)) for run in runs], "groups": found, "plot": None,
               "differing": _differing(found)}
    if len(runs) > 1 and found:
        draw, size = _together(found)
        context["plot"] = _plot(draw, "EMA accuracy of all runs", size)
    return environment.get_template("report.html").render(context)


def _together(groups: Sequence[compare.Group]) -> tuple[plots.Draw, tuple[float, float]]:
    """One plot of all evaluated runs, and its size."""
    lines = [(group.label, run) for group in groups for run in group.runs]
    levels = [group.ema.mean for group in groups if group.runs[0].supervised]
    return plots.together(lines, levels), plots.size_of_together([group.label for group in groups])


def _differing(groups: Sequence[compare.Group]) -> list[tuple[str, list]]:
    """Settings that are not the same in all groups, and the value of each in each."""
    names = compare.differing([group.runs for group in groups])
    return [(name, [compare.as_written(value_of(group.runs[0].config, name)) for group in groups]) for name in names]


def _pngs(runs: Sequence[Record], baselines: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
    """results.png and for one run confusion_matrix.png, for slides and for who opens no page."""
    run = runs[0]
    if len(runs) > 1:
        if groups := compare.groups(runs):
            draw, size = _together(groups)
            yield "results.png", plots.png([draw], size)
    elif run.evaluations:
        curves = _curves(run, compare.baseline_of(run, baselines))
        yield "results.png", plots.png([draw for draw, _ in curves])
        if run.predictions:
            yield "confusion_matrix.png", plots.png([plots.confusion(*_confusion(run))], (7.5, 7))


# --- what the template is given of a run


def _run(run: Record, baseline: Baseline | None) -> dict:
    preview = run.folder / "preview.png"
    return {
        "name": run.name, "record": run, "verdict": verdict(run, baseline), "findings": run.findings,
        "curves": [_plot(draw, alt) for draw, alt in _curves(run, baseline)], "predictions": _predictions(run),
        "preview": _uri(preview.read_bytes(), "png") if preview.exists() else None, "parity": _parity(run),
        "settings": _settings(run), "split": _split(run), "facts": _facts(run)}


def _curves(run: Record, baseline: Baseline | None) -> list[tuple[plots.Draw, str]]:
    found = []
    if run.evaluations:
        found.append((plots.accuracy(run, baseline and baseline.top1), "test accuracy over the steps"))
    if run.train:
        found.append((plots.losses(run), "losses over the steps"))
        if not run.supervised:
            found.append((plots.pseudo_labels(run), "pseudo-labels over the steps"))
        found.append((plots.speed(run), "speed over the steps"))
    return found


def _confusion(run: Record) -> tuple[np.ndarray, Sequence[str]]:
    found = run.predictions
    return confusion_matrix(found.test.label, found.test.predicted, len(found.classes)), found.classes


def _predictions(run: Record) -> dict | None:
    found = run.predictions
    if found is None:
        return None
    matrix, classes = _confusion(run)
    rows, calibrated = class_rows(matrix, classes), _calibration(found.test)
    return {"confusion": _plot(plots.confusion(matrix, classes), "confusion matrix", plots.size_of_confusion(classes)),
            "rows": rows[:_WORST], "hidden": len(rows) - len(rows[:_WORST]), "ece": 100 * calibrated.ece,
            "rough": len(found.test.label) < _ROUGH,
            "reliability": _plot(plots.reliability(calibrated), "reliability diagram"), "images": len(found.test.label),
            "wrong": _gallery(found.test, classes), "errors": _errors(found.test),
            "pseudo": _gallery(found.unlabeled, classes) if found.unlabeled else None,
            "pseudo_errors": _errors(found.unlabeled) if found.unlabeled else 0,
            "sample": len(found.unlabeled.label) if found.unlabeled else 0,
            "learned": _confident(found.unlabeled, run.config.ssl.threshold) if found.unlabeled else None}


def _calibration(judged: Judged):
    return calibration(judged.confidence, judged.predicted == judged.label)


def _errors(judged: Judged) -> int:
    return int((judged.predicted != judged.label).sum())


def _confident(judged: Judged, threshold: float) -> tuple[int, int]:
    """How many pseudo-labels reach the threshold, and how many of these are wrong."""
    counts = judged.confidence >= threshold
    return int(counts.sum()), int((counts & (judged.predicted != judged.label)).sum())


def _gallery(judged: Judged, classes: Sequence[str]) -> list[Picture]:
    """Copies of a picture that are of one class are shown once; of two classes, one of which is wrong, all are."""
    found = {}
    for i, image in zip(judged.wrong, judged.pictures, strict=True):
        found.setdefault((image.tobytes(), judged.label[i]), Picture(
            _picture(image), classes[judged.label[i]], classes[judged.predicted[i]], float(judged.confidence[i])))
    return list(found.values())


def _parity(run: Record) -> dict | None:
    if run.parity is None:
        return None
    first = {what: found for what, found in run.checks.items() if what != "self-check"}
    stages = [*run.parity.get("stages", ()), *({**stage, "stage": f"{_SHORT[name]}: {stage['stage']}"}
                                               for name, found in first.items() for stage in found.get("stages", ()))]
    plot = _plot(plots.parity(stages, run.parity.get("gate", 1e-11)), "worst relative error of each stage",
                 (plots.SIZE[0], 0.9 + 0.24 * len(stages))) if stages else None
    return {"verdict": run.parity["verdict"], "plot": plot,
            "first": [(name, found["verdict"]) for name, found in first.items()]}


def _settings(run: Record) -> list[dict]:
    """Those that differ from their defaults first; name and folder stand above the page."""
    rows = [{"name": name, "value": compare.as_written(value_of(run.config, name)),
             "default": compare.as_written(entry.default),
             "meaning": entry.metadata["meaning"], "changed": value_of(run.config, name) != entry.default}
            for name, entry in KEYS.items() if name not in ("run.name", "run.dir")]
    return sorted(rows, key=lambda row: not row["changed"])


def _split(run: Record) -> dict | None:
    split = run.split
    return split and {"dataset": split.get("dataset"), "sha256": split.get("sha256"), "images": split.get("num_images"),
                      "labeled": len(split.get("labeled", ())), "unlabeled": len(split.get("unlabeled", ()))}


def _facts(run: Record) -> list[tuple[str, object]]:
    if run.result is None:
        return []
    result = run.result
    facts = [("steps", f"{result['steps']:,}"), ("seconds", result["seconds"]),
             ("images a second", result["images_per_second"]), ("device", result.get("device")),
             ("platform", result.get("platform")), ("commit", result.get("commit")),
             ("processes", result.get("world_size")), *result.get("versions", {}).items()]
    return [(name, value) for name, value in facts if value is not None]


# --- pictures in the page


def _plot(draw: plots.Draw, alt: str, size: tuple[float, float] = plots.SIZE) -> Plot:
    scrolls = round(80 * size[0]) if size[0] > plots.SIZE[0] else None  # of 96 pixels an inch, at which it is drawn
    return Plot(*(_uri(svg.encode(), "svg+xml") for svg in plots.svg(draw, size)), alt, scrolls)


def _picture(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI, enlarged without smoothing."""
    scale = -(-_SIDE // max(image.shape[:2]))
    blob = io.BytesIO()
    Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1)).save(blob, format="PNG")
    return _uri(blob.getvalue(), "png")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
