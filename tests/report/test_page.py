"""The page of a run: what it says, that nothing of it can run, and that no failure of it fails a training."""

import base64
import dataclasses
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from running import TINY

import fixmatch
from fixmatch import cli
from fixmatch.config import ConfigError, to_yaml
from fixmatch.report import compare, page, plots, predictions, record
from fixmatch.report.predictions import Judged, Predictions
from fixmatch.report.verdict import verdict

HOSTILE = ("<script>alert(1)</script>", "$\\frac{", "猫\n\x1b[31m", "\" onload=\"x")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps that made its report."""
    folder = tmp_path_factory.mktemp("report") / "seed-0"
    fixmatch.train(fixmatch.load_config("digits", [
        *TINY, "run.report=true", f"run.dir={folder}", "train.total_steps=6", "train.eval_every=2"]))
    return folder


class Tags(html.parser.HTMLParser):
    """Names of the elements, and every attribute that names a place."""

    def __init__(self, text: str):
        super().__init__()
        self.names, self.places, self.attributes = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.places += [value for name, value in attrs if name in ("src", "srcset", "href")]


def judged(labels, predicted, side=8) -> Judged:
    labels, predicted = np.array(labels), np.array(predicted)
    wrong = np.flatnonzero(labels != predicted)[:predictions.PICTURES]
    return Judged(labels, predicted, np.linspace(0.5, 1, len(labels), dtype=np.float32), wrong,
                  np.zeros((len(wrong), side, side, 3), np.uint8))


def copy_of(run, to, **changes):
    """A run like `run` in the folder `to`; changes are keys of its configuration, section__key=value."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("vdl", "checkpoints", ".lock"))
    config = fixmatch.load_config(to / "config.yaml", [f"{k.replace('__', '.')}={v}" for k, v in changes.items()])
    (to / "config.yaml").write_text(to_yaml(config))
    return to


def test_a_run_ends_with_a_page_that_needs_no_other_file(trained):
    text = (trained / "report.html").read_text()
    found = Tags(text)
    assert found.places
    assert all(place.startswith("data:image/") for place in found.places)
    assert not {"script", "link", "iframe", "object"} & set(found.names)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    split = json.loads((trained / "split.json").read_text())
    for part in ("EMA top-1 is", "pseudo-labels over the steps", "confusion matrix", "expected calibration error",
                 "ssl.threshold", "not checked: parity.enabled is false", split["sha256"]):
        assert part in text, part
    assert len(re.findall("<figcaption>", text)) > predictions.PICTURES  # wrong test images and wrong pseudo-labels
    for name in ("results.png", "confusion_matrix.png"):
        assert Image.open(io.BytesIO((trained / name).read_bytes())).size[0] > 600


def test_the_page_has_the_numbers_of_the_run(trained):
    run = record.read(trained)
    result = json.loads((trained / "result.json").read_text())
    test = run.predictions.test
    assert 100 * (test.label == test.predicted).mean() == pytest.approx(result["top1"]["ema"]["last"])
    assert run.final() == result["top1"]["ema"]["last"]
    assert len(run.predictions.unlabeled.label) == 1297  # all of the digits' unlabeled images
    said = " ".join(verdict(run))
    assert f"EMA top-1 is {run.final():.2f} % on 500 test images" in said
    assert f"Quote the averaged weights at the last step, {run.final():.2f} %" in said


def test_a_supervised_run_has_its_page_and_plots(tmp_path, capsys):
    """It has no plot of pseudo-labels, so one fewer than others."""
    run = tmp_path / "run"
    fixmatch.train(fixmatch.load_config("digits", [*TINY, "run.report=true", f"run.dir={run}", "train.total_steps=4",
                                                   "train.eval_every=2", "ssl.mode=none"]))
    said = capsys.readouterr().out
    assert f"See {run}/report.html" in said
    assert [int(count) for count in re.findall(r"(?:mean|median) of the last (\d+) ", said)] == [1, 2, 2]
    for name in ("report.html", "results.png", "confusion_matrix.png"):
        (run / name).unlink()
    assert cli.main(["report", str(run)]) == 0
    assert "pseudo-label" not in (run / "report.html").read_text().split("<h2>Settings")[0]
    for name in ("results.png", "confusion_matrix.png"):
        assert Image.open(io.BytesIO((run / name).read_bytes())).size[0] > 600


@pytest.mark.parametrize("count", range(1, 6))
def test_any_number_of_plots_is_laid_out(count):
    drawn = []
    image = Image.open(io.BytesIO(plots.png([drawn.append] * count)))
    assert drawn[0].figure.axes == drawn  # and no empty one beside them
    columns, rows = min(count, 2), (1, 1, 2, 2, 3)[count - 1]
    assert image.size == (160 * columns * plots.SIZE[0], 160 * rows * plots.SIZE[1])


def test_nothing_is_written_where_a_plot_fails(trained, tmp_path, monkeypatch):
    run = copy_of(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    monkeypatch.setattr(plots, "png", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write_report([run])
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def pictures_of(text: str) -> list[tuple[str, float]]:
    """Every plot of a page on a light ground, as SVG, with the width in CSS pixels that a phone of 390 gives it."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"[^>]*?(?:min-width: (\d+)px"|)>', text)
    return [(base64.b64decode(svg).decode(), float(least or 390 - 2 * 16)) for svg, least in found]


@pytest.mark.parametrize("classes", [10, 30])
def test_the_text_of_plots_can_be_read_on_a_phone(trained, tmp_path, classes):
    run = copy_of(trained, tmp_path / "run")
    stages = [{"stage": "data", "dtype": "float64", "verdict": "pass", "worst": {"rel": 1e-13}}]
    (run / "parity.json").write_text(json.dumps({
        "verdict": "PARITY PASS", "passed": True, "stages": stages, "gate": 1e-11,
        "first_steps_with_unlabeled_images": {"verdict": "PARITY PASS", "passed": True, "stages": stages}}))
    if classes > 10:
        test = judged([0, 1], [1, 1])
        predictions.save(Predictions(tuple(f"number {k}" for k in range(classes)), test, None), run)
    found = pictures_of(page.render([record.read(run)], []))
    assert len(found) == 7
    for svg, width in found:
        scale = width / float(re.search('viewBox="0 0 ([^ ]+) ', svg)[1])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: [^;\"]*?([0-9.]+)px", svg)]
        assert sizes
        assert scale * min(sizes) > 9.99


def test_a_plot_has_other_colours_in_the_dark_and_is_else_the_same():
    def draw(ax):
        plots.confusion(np.eye(2, dtype=int), ("#1b1f24", "b"))(ax)
        ax.plot([0, 1], color=plots.RED, label="a")
        ax.legend()

    light, dark = plots.svg(draw)
    colours = [set(re.findall("(?:fill|stroke): (#[0-9a-f]{6})", svg)) for svg in (light, dark)]
    assert colours[0] - colours[1] == set(plots._IN_THE_DARK)
    assert colours[1] - colours[0] == set(plots._IN_THE_DARK.values())
    assert plots.RED in colours[0] & colours[1]
    assert ">#1b1f24<" in dark  # the name of a class
    blank = [re.sub("#[0-9a-f]{6}", "", svg) for svg in (light, dark)]
    assert blank[0] == blank[1]


def test_no_legend_hides_a_curve(trained):
    run, lines = record.read(trained), []
    for draw in (plots.accuracy(run, 50.0), plots.losses(run), plots.pseudo_labels(run), plots.speed(run),
                 plots.together([("a", run), ("b", run)], [50.0])):
        axes = []
        plots.svg(lambda ax, draw=draw, axes=axes: axes.append(ax) or draw(ax))
        assert axes[0].get_legend().get_window_extent().y0 >= axes[0].bbox.y1
        lines += axes[0].get_legend().get_lines()
    assert len(lines) == 3 + 3 + 2 + 2 + 2  # nothing was confident, so nothing is impure


def test_large_numbers_are_written_alike_on_both_axes(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    lines = [{"kind": "train", "step": step, "steps": 1, "images_per_second": 5000.0, "data_wait": 0.0}
             for step in (1, 4000)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    svg, _ = plots.svg(plots.speed(record.read(run)))
    assert svg.count(">4,000<") == 2  # a step, and images a second
    assert "4000" not in re.sub(r"<(path|use|clipPath)[^>]*>", "", svg)


def test_a_picture_is_shown_once_unless_its_copies_have_two_classes(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    test = judged([0, 0, 0, 1], [2, 2, 2, 2])
    test.pictures[2] += 1
    predictions.save(Predictions(("cat", "dog", "owl"), test, None), run)
    text = page.render([record.read(run)], [])
    assert "4 of 4 are wrong" in text
    assert re.findall("<b>(cat|dog)</b></figcaption>", text) == ["cat", "cat", "dog"]


def test_a_calibration_error_of_few_images_is_called_rough(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    for count, said in ((199, True), (200, False)):
        predictions.save(Predictions(("cat", "dog"), judged([0] * count, [0] * count), None), run)
        assert ("Of so few images that is rough" in page.render([record.read(run)], [])) is said


FAILS = {"verdict": "PARITY FAIL step 67 losses/mask: likely another loss", "passed": False}
PASSES = {"verdict": "PARITY PASS 7/7 tensors", "passed": True}


@pytest.mark.parametrize(("parity", "what"), [
    (FAILS, ["The self-check failed: step 67"]),
    (PASSES | {"first_steps": FAILS}, ["The check of the first steps failed: step 67"]),
    (PASSES | {"first_steps": PASSES, "first_steps_with_unlabeled_images": FAILS},
     ["The check of the first steps with unlabeled images failed: step 67"]),
    (FAILS | {"first_steps": FAILS}, ["The self-check failed", "The check of the first steps failed"])])
def test_a_failed_proof_is_said_before_any_number(trained, tmp_path, parity, what):
    """In a run that went on all the same, in one that is still training and in one that was stopped."""
    run = copy_of(trained, tmp_path / "run", parity__on_failure="warn")
    (run / "parity.json").write_text(json.dumps(parity))
    said = verdict(record.read(run))
    assert [sentence.startswith(part) for sentence, part in zip(said, what, strict=False)] == [True] * len(what)
    assert said[len(what)] == ("So this training is not proven to be what the reference computes: quote none of its "
                               "numbers.")
    assert not any("Quote the averaged weights" in sentence for sentence in said)
    assert 'class="verdict failed"' in page.render([record.read(run)], [])
    (run / "result.json").unlink()
    assert verdict(record.read(run))[len(what) + 1] == "The run has not ended: step 6 of 6."
    stopped = copy_of(run, tmp_path / "stopped", parity__on_failure="abort", train__total_steps=190)
    assert verdict(record.read(stopped))[len(what) + 1] == ("The failed check stopped the run: the last on record is "
                                                            "step 6 of 190.")
    (stopped / "metrics.jsonl").unlink()
    assert verdict(record.read(stopped))[-1] == "Nothing was evaluated yet."


def test_a_right_proof_is_not_doubted(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    for parity in (PASSES | {"first_steps": PASSES}, {"verdict": "not checked", "passed": None}):
        (run / "parity.json").write_text(json.dumps(parity))
        assert verdict(record.read(run))[0].startswith("It ")
        assert "verdict failed" not in page.render([record.read(run)], [])


@pytest.mark.parametrize("count", [1, 5, 19, 20, 21])
def test_the_median_is_of_the_evaluations_that_there_are(trained, tmp_path, count):
    """Of fewer than papers take it is not offered as theirs."""
    run = copy_of(trained, tmp_path / "run")
    lines = [{"kind": "eval", "step": step, **{w: {"top1": float(step), "loss": 0.5} for w in ("raw", "ema")}}
             for step in range(1, count + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = record.read(run)
    assert ("the median of the last 20 evaluations" in " ".join(verdict(found))) is (count >= 20)
    assert "median" in verdict(found)[-1] or count < 20
    group = compare.groups([found])[0]
    assert (group.median.mean, group.evaluated) == {1: (1, 1), 5: (3, 5), 19: (10, 19), 20: (10.5, 20),
                                                    21: (11.5, 20)}[count]
    other = copy_of(run, tmp_path / "other", optim__lr=0.5)
    text = page.render([found, record.read(other)], [])
    assert text.count(f"<small>of {count}</small>") == 2 * (count < 20)


def test_a_run_that_trains_on_labels_alone_so_far_is_not_judged_by_its_mask(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run", ssl__supervised_steps=6)
    (run / "result.json").unlink()
    said = verdict(record.read(run))
    assert "It trained on the labels alone so far, as ssl.supervised_steps says." in said
    assert not any("pseudo-label" in sentence for sentence in said)


def test_curves_of_unlabeled_images_begin_after_a_supervised_start(trained, tmp_path):
    last = record.read(trained).train[-1]["step"]
    begins = {}
    for start in (0, 2, last):
        run = record.read(copy_of(trained, tmp_path / str(start), ssl__supervised_steps=start))
        for name in ("loss_x", "loss_u", "mask"):
            begins[start, name] = plots._curve(run, name)[0].tolist()
        assert page.render([run], [])
    assert begins[0, "mask"] == begins[0, "loss_u"] == begins[0, "loss_x"] == begins[2, "loss_x"]
    assert begins[2, "mask"] == begins[2, "loss_u"] == [step for step in begins[0, "mask"] if step > 2]
    assert begins[last, "mask"] == []


def test_what_cannot_change_a_result_makes_no_other_configuration(trained, tmp_path):
    plain = record.read(copy_of(trained, tmp_path / "plain"))
    same = [("run__seed", 9), ("run__name", "other"), ("run__log_every", 7), ("data__root", "elsewhere"),
            ("data__download", "false"), ("train__eval_batch_size", 33), ("checkpoints__keep", 5),
            ("runtime__data_threads", 3), ("parity__timeout", 9)]
    other = [("train__total_steps", 7), ("train__eval_every", 3), ("optim__lr", 0.5), ("data__num_labeled", 50)]
    for key, value in same + other:
        run = record.read(copy_of(trained, tmp_path / key, **{key: value}))
        assert len(compare.groups([plain, run])) == (1 if (key, value) in same else 2), key
    own = [record.read(copy_of(trained, tmp_path / root, data__name="folder", data__root=root))
           for root in ("cats", "dogs")]
    assert len(compare.groups(own)) == 2  # own images are what data.root says


def test_several_runs_are_named_as_a_reader_knows_them(trained, tmp_path):
    def read(name, **changes):
        return record.read(copy_of(trained, tmp_path / name, **changes))

    def names(*runs):
        return [group.label for group in compare.groups(runs)]

    one, two = read("seed-1", run__seed=1), read("seed-2", run__seed=2)
    slow, wide = read("slow", optim__lr=0.001), read("wide", model__width=2, model__depth=16, ema__decay=0.9)
    assert names(slow, wide) == ["slow", "wide"]
    assert names(one, two) == ["seed-1 and 1 more"]
    assert names(one, two, slow) == ["optim.lr=0.03", "slow"]
    assert names(one, two, slow, wide) == ["seed-1 and 1 more", "slow", "wide"]  # four settings are no name
    assert names(slow, read("again/slow", optim__lr=0.5)) == [str(tmp_path / "slow"), str(tmp_path / "again/slow")]
    assert compare.differing([[one, two], [slow], [wide]]) == ["model.depth", "model.width", "optim.lr", "ema.decay"]
    text = page.render([one, two, slow, wide], [])
    table = text[text.index("Settings in which they differ"):text.index('<details class="run">')]
    assert re.findall("<code>(.*?)</code>", table) == ["model.depth", "model.width", "optim.lr", "ema.decay"]
    assert re.findall('<td data-of="slow">(.*?)</td>', table) == ["10", "1", "0.001", "0.99"]
    assert text.count("<table") == text.count('<div class="scroll"><table')  # no table is cut


def test_guessing_is_not_learning(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    test = judged([0] * 50 + [1] * 50, [0] * 100)
    predictions.save(Predictions(("cat", "dog"), test, test), run)
    for top1, said in ((50.0, "It did not learn: EMA top-1 is 50.00 % on 100 test images"), (62.0, "It learned: EMA")):
        line = {"kind": "eval", "step": 6, **{which: {"top1": top1, "loss": 0.5} for which in ("raw", "ema")}}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        found = verdict(record.read(run), compare.Baseline(55.5, ("runs/none",)))
        assert found[0].startswith(said)
        assert "always naming 'cat' would score 50.0 %" in found[0]
        assert found[1] == (f"That is {abs(top1 - 55.5):.2f} points {'above' if top1 > 55.5 else 'below'} the "
                            "supervised baseline on the same labels (55.50 %, runs/none).")


def test_visualdl_shows_what_one_asks_first_and_no_configuration_texts(trained):
    from visualdl import LogReader

    tags = LogReader(file_path=str(next((trained / "vdl").glob("vdlrecords*")))).get_tags()
    overview = [tag for tag in tags["scalar"] if tag.startswith("1_overview/")]
    assert tags["scalar"][0] == overview[0] == "1_overview/ema_top1"
    assert set(overview) == {f"1_overview/{name}" for name in ("ema_top1", "pseudo_label_accuracy", "mask", "data_wait",
                                                               "images_per_second")}
    assert tags["scalar"].index("2_evaluation/ema_top1") < tags["scalar"].index("2_evaluation/raw_top1")
    assert "text" not in tags


def test_the_same_seed_keeps_the_same_predictions(trained, tmp_path):
    before = (trained / predictions.FILE).read_bytes()
    predictions.save(predictions.load(trained), tmp_path)
    assert (tmp_path / predictions.FILE).read_bytes() == before


def test_class_names_are_text_and_nothing_else(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    test = judged([0, 1, 2, 3, 0], [1, 2, 3, 0, 0])
    predictions.save(Predictions(HOSTILE, test, test), run)
    text = page.write_report([run]).read_text()
    found = Tags(text)
    assert "script" not in found.names
    assert "onload" not in found.attributes
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.long
def test_300_classes_stay_readable(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    labels = np.arange(600) % 300
    predicted = np.where(labels % 3 == 0, (labels + 1) % 300, labels)
    predictions.save(Predictions(tuple(f"class number {k}" for k in range(300)), judged(labels, predicted), None), run)
    text = page.write_report([run]).read_text()
    assert len(text) < 1_500_000
    assert "260 better ones are left out" in text
    assert text.count(">class number") == 2 * 40  # the worst ones, each with what it is taken for


def test_seeds_are_one_row_and_the_baseline_is_the_line_to_beat(trained, tmp_path, monkeypatch):
    runs = [copy_of(trained, tmp_path / f"seed-{seed}", run__seed=seed) for seed in (1, 2)]
    runs.append(copy_of(trained, tmp_path / "none", ssl__mode="none"))
    for run, top1 in zip(runs, (90.0, 94.0, 80.0), strict=True):
        line = {"kind": "eval", "step": 6, **{w: {"top1": top1, "loss": 0.5} for w in ("raw", "ema")}}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = compare.groups([record.read(run) for run in runs])
    assert [(group.label, group.ema.n) for group in found] == [("ssl.mode=fixmatch", 2), ("none", 1)]
    assert found[0].ema == pytest.approx((92.0, 8**0.5, 2))
    assert found[0].gain == pytest.approx((12.0, 8**0.5, 2))
    assert found[1].gain is None
    weak = copy_of(trained, tmp_path / "weak", ssl__mode="none", optim__lr=0.001)  # a baseline that is easy to beat
    line = {"kind": "eval", "step": 6, **{w: {"top1": 20.0, "loss": 0.5} for w in ("raw", "ema")}}
    (weak / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    every = [record.read(run) for run in (*runs, weak)]
    assert compare.baseline_of(every[0], every) == compare.Baseline(80.0, (str(runs[2]),))
    assert compare.baseline_of(every[2], every) is None
    text = page.write_report(runs).read_text()
    assert "million images trained on" in base64.b64decode(re.search("svg\\+xml;base64,([^\"]+)", text)[1]).decode()
    assert "92.00 ± 2.83" in text
    assert "12.00 ± 2.83" in text
    (tmp_path / "results.png").write_bytes(b"of someone else")
    monkeypatch.setattr(compare, "labels", lambda grouped: [f"{i} {'key=value, ' * 30}" for i in (1, 2)])
    page.write_report(runs)  # a plot without room for its labels would be a warning, and so an error
    assert (tmp_path / "report.html").exists()
    assert Image.open(io.BytesIO((tmp_path / "report-results.png").read_bytes())).size[0] > 600
    assert (tmp_path / "results.png").read_bytes() == b"of someone else"
    changed = json.loads((runs[2] / "split.json").read_text()) | {"sha256": "other labels"}
    (runs[2] / "split.json").write_text(json.dumps(changed))
    assert compare.groups([record.read(run) for run in runs])[0].gain is None


def test_a_supervised_run_beside_another_is_its_baseline_if_it_has_the_same_labels(trained, tmp_path, capsys):
    """The log of a run and its page say what the unlabeled images were worth."""
    def train(name, *overrides):
        fixmatch.train(fixmatch.load_config("digits", [*TINY, "train.total_steps=6", f"run.dir={tmp_path / name}",
                                                        *overrides]))
        return capsys.readouterr().out
    assert "baseline" not in train("none", "ssl.mode=none")
    assert "baseline" not in train("other-labels", "data.split_seed=5")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/result.json").write_text("{")
    said = train("run", "run.report=true")
    none, run = (record.read(tmp_path / name).final() for name in ("none", "run"))
    sentence = (f"That is {abs(run - none):.2f} points {'above' if run >= none else 'below'} the supervised baseline "
                f"on the same labels ({none:.2f} %, {tmp_path / 'none'}).")
    assert sentence in said
    assert sentence in " ".join((tmp_path / "run/report.html").read_text().split())


def test_a_run_that_has_not_ended_has_a_page(trained, tmp_path, capsys):
    run = copy_of(trained, tmp_path / "run")
    for name in ("result.json", predictions.FILE, "parity.json", "preview.png"):
        (run / name).unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 7, "lo')
    assert cli.main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    text = (tmp_path / "page.html").read_text()
    assert "The run has not ended: step 6 of 6. EMA top-1 on the test images is" in text
    assert "had a confident pseudo-label so far" in text
    assert "The data was" in text
    assert "at the end" not in text.split("<h2>Settings")[0]
    assert "Quote" not in text
    assert (tmp_path / "page-results.png").exists()
    assert not (tmp_path / "results.png").exists()
    (run / "metrics.jsonl").unlink()
    assert "Nothing was evaluated yet" in page.render([record.read(run)], [])


@pytest.mark.parametrize(("name", "content"), [
    ("config.yaml", None), ("config.yaml", "nothing: 1"), ("result.json", "{"), ("split.json", "[]"),
    (predictions.FILE, "PK"), (predictions.FILE, b"")])
def test_what_is_no_run_folder_is_refused_in_one_line(trained, tmp_path, capsys, name, content):
    run = copy_of(trained, tmp_path / "run")
    path = run / name
    path.unlink() if content is None else path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert cli.main(["report", str(run)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert str(path.parent) in message
    assert len(message.splitlines()) == 1


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    good = judged([0, 1, 1], [0, 0, 1])
    for change in ({"label": np.array([0, 1, 2])}, {"predicted": np.array([0, 0])}, {"wrong": np.array([7])},
                   {"pictures": np.zeros((1, 8, 8, 3))}, {"label": np.array(["a", "b", "c"])}):
        predictions.save(Predictions(("a", "b"), dataclasses.replace(good, **change), None), tmp_path)
        with pytest.raises(ValueError, match=r"predictions\.npz"):
            predictions.load(tmp_path)


def test_runs_of_several_folders_need_a_name_for_the_page(trained, tmp_path):
    with pytest.raises(ConfigError, match="-o FILE"):
        page.write_report([trained, copy_of(trained, tmp_path / "run")])


def test_a_failing_report_fails_no_training(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(page, "write_report", broken)
    result = fixmatch.train(fixmatch.load_config("digits", [
        *TINY, "run.report=true", f"run.dir={tmp_path}/run", "train.total_steps=1", "ssl.mode=none"]))
    assert result.steps == 1
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "no report was made" in line and "No space left" in line]
    assert said[-1].startswith(f"See {tmp_path}/run/result.json")
    assert predictions.load(tmp_path / "run").unlabeled is None  # a supervised run has no pseudo-labels
