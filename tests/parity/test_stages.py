"""The stages pass on the code as it is, fail on a bug written into the source, and never pass unchecked."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
from running import ROOT, first_of

from fixmatch import evaluation, losses, optimizer
from fixmatch.config import SSLConfig, TrainConfig
from fixmatch.models import wideresnet
from parity import goldens, prove, stages
from parity.case import small_case
from parity.compare import Row


@pytest.mark.parametrize("arch", first_of(["wideresnet", "resnext"], 1))
def test_all_stages_pass(arch, prove, tmp_path, capsys):
    html = tmp_path / "report.html"
    code, found = prove("--stage", "all", "--arch", arch, "--html", str(html))
    assert code == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == found["verdict"]
    assert first.startswith("PARITY PASS ")
    assert {s["stage"] for s in found["stages"]} == set(stages.stages())
    for stage in found["stages"]:
        assert stage["verdict"] == "pass"
        assert stage["first_divergence"] is None
        assert stage["tensors"] > 0
        if stage["dtype"] == "float64":
            assert stage["worst"]["rel"] <= 1e-11
    page = html.read_text()
    assert first in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained


def test_float64_is_compared_in_earnest():
    """An error of 1e-9 in one element of one tensor is far above what the two frameworks differ by."""
    case, stage = small_case("wideresnet", 3), stages.stages()["forward"]
    recorded = [(section, dict(tensors)) for section, tensors in stage.reference(case)]
    assert stages.run_stage(stage, case, recorded).passed
    logits = recorded[2][1]["fc"]
    logits[1, 2] += 1e-9 * np.abs(logits).max()
    result = stages.run_stage(stage, case, recorded)
    assert result.first_divergence.tensor == "eval activations/fc"


def test_a_loss_that_leaves_out_images_of_a_batch_as_large_as_the_runs_is_seen(monkeypatch):
    right = losses.fixmatch_loss
    monkeypatch.setattr(losses, "fixmatch_loss",
                        lambda x, targets, *others: right(x[:32], targets[:32], *others))  # of 64
    result = stages.run_stage(stages.stages()["loss"], small_case("wideresnet", 3))
    assert {row.tensor.split("/")[0] for row in result.rows if not row.passed} == {"loss run", "loss run gradients"}


def test_what_a_network_returns_is_compared_and_not_its_layers_alone(monkeypatch):
    right = wideresnet.WideResNet.forward
    monkeypatch.setattr(wideresnet.WideResNet, "forward",
                        lambda self, x: right(self, x) * (1.0 if self.training else 1.01))
    result = stages.run_stage(stages.stages()["forward"], small_case("wideresnet", 3))
    assert [row.tensor for row in result.rows if not row.passed] == ["eval activations/logits"]


def test_what_a_stage_raises_after_a_row_fails_it():
    def rows(case):
        yield Row("a", 0.0, 0.0, True)
        raise KeyError("b")

    result = stages.run_stage(stages.Stage("loss", "-", "float64", rows), small_case("wideresnet", 3))
    assert not result.passed
    assert "KeyError" in result.first_divergence.why


def test_a_self_check_that_lost_a_stage_has_not_passed(monkeypatch):
    monkeypatch.setattr(prove, "_share", lambda part, case, every, *_: (
        stages.StageResult(name, "float64", "-", [Row("a", 0.0, 0.0, True)])
        for name in stages.SELF_CHECK if name not in ("resume", "metric")))
    report = prove.self_check(small_case("wideresnet", 3), stages.stages(thorough=False), torch=True)
    assert not report.passed
    assert report.verdict() == "PARITY FAIL metric: nothing was compared"


# Bugs put in by hand, not through the plants: what someone could really write.
BY_HAND = {
    "optimizer": ("fixmatch/optimizer.py", 'NO_DECAY = ("bias", "bn")', 'NO_DECAY = ("bias",)', "optimizer"),
    "layers": ("fixmatch/models/layers.py", "fresh * count / max(count - 1, 1)", "fresh", "forward"),
    "trainer": ("fixmatch/step.py", "    state.scheduler.step()\n    state.ema.update()",
                "    state.ema.update()\n    state.ema.update()\n    state.scheduler.step()", "train"),
}


@pytest.mark.parametrize("name", first_of(BY_HAND, 1))
def test_a_bug_written_into_the_source_is_caught(name, tmp_path):
    file, right, wrong, stage = BY_HAND[name]
    for folder in ("fixmatch", "parity", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder)  # with what was compiled
    source = tmp_path / file
    assert right in source.read_text()
    source.write_text(source.read_text().replace(right, wrong))
    command = [sys.executable, tmp_path / "tools/parity.py", "--stage", stage]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("PARITY FAIL ")


@pytest.mark.parametrize(("field", "change"), [
    ("confusion", lambda scores: np.transpose(scores.confusion).tolist()),
    ("per_class", lambda scores: scores.per_class[1:] + scores.per_class[:1])])
def test_what_is_said_of_single_classes_is_compared(field, change, monkeypatch):
    pytest.importorskip("torch")
    right = evaluation.score

    def wrong(*args):
        scores = right(*args)
        return dataclasses.replace(scores, **{field: change(scores)})

    monkeypatch.setattr(evaluation, "score", wrong)
    result = stages.run_stage(stages.stages()["metric"], small_case("wideresnet", 0))
    assert [row.tensor for row in result.rows if not row.passed] == [f"metric/{field}"]


@pytest.mark.parametrize(("right_steps", "stage", "tensor"), [
    (1, "optimizer", "step 1 momentum/"), (2, "reference", "wideresnet-10-1-warmup/step2/momentum/")])
def test_momentum_that_goes_wrong_later_is_seen(right_steps, stage, tensor, monkeypatch):
    pytest.importorskip("torch")
    right, steps = optimizer.TwoGroupSGD.step, []

    def wrong(self, *args):
        right(self, *args)
        steps.append(1)
        for momentum in self.state().values() if len(steps) > right_steps else ():
            momentum.scale_(1.001)

    monkeypatch.setattr(optimizer.TwoGroupSGD, "step", wrong)
    result, = stages.run_chosen([stage], small_case("wideresnet", 0).small(), stages.stages(thorough=False), {})
    assert result.first_divergence.tensor.startswith(tensor)


def test_what_is_updated_together_does_not_matter(monkeypatch):
    """Of a large network few tensors are, of a small one all: the rows are the same but for rounding."""
    pytest.importorskip("torch")
    from parity import updates  # loads Torch

    case, run = small_case("wideresnet", 0).small(), stages.stages(thorough=False)["run"]
    together = stages.run_stage(run, case)
    monkeypatch.setattr(updates, "_AT_ONCE", 1)
    one_by_one = stages.run_stage(run, case)
    assert [row.tensor for row in one_by_one.rows] == [row.tensor for row in together.rows]
    assert sum(row.tensor.startswith("step 1 weights/") for row in together.rows) > 20
    assert together.passed
    assert one_by_one.passed
    for one, other in zip(one_by_one.rows, together.rows, strict=True):
        assert one.relative == pytest.approx(other.relative, rel=1e-3, abs=1e-9)


def test_a_supervised_run_passes_from_end_to_end():
    """It logs and trains less than FixMatch, which is no fault."""
    case = small_case("wideresnet", 0).small()
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, ssl=SSLConfig(mode="none")))
    for name in ("run", "resume"):
        result = stages.run_stage(stages.stages(thorough=False)[name], case)
        assert result.passed, result.first_divergence


def test_stages_stand_in_the_order_of_diagnosis():
    """In the order of the design, whichever of them there are."""
    order = ["reference", "config", "schedule", "augment", "data", "operators", "forward", "metric", "loss", "backward",
             "optimizer", "ema", "scaler", "train", "run", "resume", "convert", "ranks"]
    names = list(stages.stages())
    assert names == [name for name in order if name in names]
    assert set(stages.SELF_CHECK) <= set(names)


def test_a_stage_of_rows_is_run_up_to_its_first_failure():
    """A stage need not compare traces: it may judge by itself, in any dtype."""
    def rows(case):
        for i in range(3):
            yield Row(f"section/{case}{i}", 0.1, 0.1 * i, passed=i != 1)

    stage = stages.Stage("forward", "eval", "float32", rows)
    whole, short = (stages.run_stage(stage, "x", keep_going=keep_going) for keep_going in (True, False))
    assert [len(whole.rows), len(short.rows)] == [3, 2]
    assert whole.first_divergence.tensor == short.first_divergence.tensor == "section/x1"
    assert (whole.dtype, whole.mode, whole.passed) == ("float32", "eval", False)
    assert whole.worst.tensor == "section/x2"


def test_a_recorded_trace_replaces_the_reference():
    one = [("section", {"a": np.ones(2)})]
    stage = stages.compared("forward", "eval", lambda case: one, lambda case: one)
    assert stages.run_stage(stage, None).passed
    assert not stages.run_stage(stage, None, [("section", {"a": np.zeros(2)})]).passed


def test_nothing_compared_is_no_pass():
    empty = stages.compared("empty", "-", lambda case: [], lambda case: [])
    assert not stages.run_stage(empty, None).passed


@pytest.mark.parametrize("name", ["wideresnet-10-2", "wideresnet-28-2", "resnext-29-8x64"])
def test_the_two_processes_of_a_self_check_share_its_stages(name):
    case = goldens.CASES[name]
    first, second, every = (stages.of_self_check(part, case) for part in ("first", "second", "all"))
    assert sorted(first + second) == sorted([*every, "operators"])  # which both have
    assert first[-1] == second[-1] == "operators"
    assert set(every) <= set(stages.SELF_CHECK)
    left_out = {"scaler"} | (set(stages.ABOUT_FILES) if case.large else set())
    assert set(stages.SELF_CHECK) - set(every) == left_out
    scaled = dataclasses.replace(case, config=dataclasses.replace(case.config, train=TrainConfig(amp="float16")))
    assert "scaler" in stages.of_self_check("all", scaled)
