"""Planted bugs are caught where they belong, and the mutation score says so."""

import json

import pytest
from running import first_of

from parity import plants, stages
from parity.plants import score

# One of each kind, those of different stages first; all of them: tools/parity.py --mutation-score.
SAMPLE = ("bn-momentum-inverted", "threshold-exclusive", "weight-decay-by-param-name", "warmup-in-epochs",
          "ema-buffers-averaged", "cutout-exclusive", "detach-missing", "bn-running-variance-biased",
          "activate-before-residual-everywhere", "init-fan-in", "last-batch-dropped", "lambda-u-dropped",
          "cross-entropy-saturates", "no-grad-weak-branch", "interleave-undone-wrongly", "lr-off-by-one",
          "ema-before-step", "magnitude-up-to-10", "wrong-std", "bn-momentum-inverted-and-ema-buffers-averaged")


@pytest.mark.parametrize("name", first_of(SAMPLE, 4))
def test_a_planted_bug_is_caught_in_its_stage(name):
    outcome = score.outcome_of(name)
    assert outcome.caught_in == plants.PLANTS[name].stage, outcome.row
    assert outcome.caught_by_self_check or plants.PLANTS[name].stage not in stages.SELF_CHECK
    assert outcome.hint.startswith("likely "), outcome.hint
    stage = stages.stages(thorough=False)[outcome.caught_in]
    clean = stages.run_stage(stage, score.case_of(plants.PLANTS[name]))
    assert clean.passed, "the plant was not taken out again"


@pytest.mark.parametrize(("name", "tensor"), [
    ("first-20-evaluations", "summary/mean_last_20"),
    ("split-with-replacement", "split/distinct labeled images under each seed"),
    ("split-of-the-first-images", "split/images labeled equally often"),
    ("translate-y-by-width", "operations 21x32/TranslateY"),
    ("log-rate-a-step-late", "logged step 2/lr"),
    ("resume-best-never-beaten", "best/step"),
])
def test_what_a_blind_trial_missed_is_caught(name, tensor):
    """By the stage that it mended, which says where."""
    stage = stages.stages(thorough=False)[plants.PLANTS[name].stage]
    with plants.planted(name):
        result = stages.run_stage(stage, score.case_of(plants.PLANTS[name]).small(), keep_going=False)
    assert result.first_divergence.tensor == tensor
    assert result.hint.startswith("likely ")


def test_every_named_bug_has_a_plant_with_a_known_stage():
    assert len(plants.PLANTS) >= 150
    assert {p.stage for p in plants.PLANTS.values()} <= set(stages.stages())


def test_a_plant_knows_its_class():
    assert plants.PLANTS["bn-momentum-inverted"].kind == "model"
    assert plants.PLANTS["masked-mean"].kind == "loss"
    assert len({(plant.kind, plant.what) for plant in plants.PLANTS.values()}) == len(plants.PLANTS)


@pytest.mark.long
def test_the_score_counts_by_class_and_tells_what_the_self_check_sees(tmp_path, capsys):
    file = tmp_path / "score.json"
    names = ["masked-mean", "warmup-in-epochs", "ranks-gradients-summed"]
    assert score.print_score(file, names, clean_seeds=0, processes=2) == 1  # the self-check misses too many of these
    found = json.loads(file.read_text())
    of_three = {"plants": 3, "caught": 3, "localised": 3, "caught_by_self_check": 2}
    assert {key: found[key] for key in of_three} == of_three
    assert (found["false_alarms"], found["clean_runs"]) == ([], 0)
    one_seen = {"plants": 1, "caught": 1, "localised": 1, "caught_by_self_check": 1}
    one_unseen = {**one_seen, "caught_by_self_check": 0}
    assert found["by_class"] == {"loss": one_seen, "optimizer": one_seen, "ranks": one_unseen}
    assert [o["caught_in"] for o in found["outcomes"]] == ["loss", "schedule", "ranks"]
    assert "MUTATION SCORE 3/3 caught" in capsys.readouterr().out


def test_the_score_fails_on_a_bug_that_is_missed_or_found_elsewhere(monkeypatch, tmp_path):
    """A plant without an effect, and one whose expected stage comes after the one that catches it."""
    file, every = tmp_path / "score.json", stages.stages()
    monkeypatch.setattr(stages, "stages", lambda **_: {name: every[name] for name in ("schedule", "loss")})
    monkeypatch.setitem(plants.PLANTS, "no-effect", plants.Plant("no-effect", "loss", "", lambda patch: None, "loss"))
    monkeypatch.setitem(plants.PLANTS, "late", plants.PLANTS["warmup-in-epochs"]._replace(name="late", stage="train"))
    assert score.print_score(file, ["no-effect", "late"], clean_seeds=0, processes=0) == 1
    found = json.loads(file.read_text())
    assert (found["caught"], found["localised"], found["caught_by_self_check"]) == (1, 0, 1)


def test_a_stage_that_looks_at_one_thing_names_the_fault():
    """The reference's own figures see nearly all faults, and a run from end to end too."""
    def failed(*names):
        return [stages.StageResult(name, "float64", "train") for name in names]

    assert stages.first_failure(failed("reference", "optimizer", "run")).stage == "optimizer"
    assert stages.first_failure(failed("reference", "run")).stage == "reference"
    assert stages.first_failure(failed("run", "resume")).stage == "run"
    assert stages.first_failure([]) is None


def test_a_stage_that_fails_on_clean_code_is_a_false_alarm(monkeypatch):
    every = stages.stages()
    monkeypatch.setattr(stages, "stages", lambda **_: {name: every[name] for name in ("augment", "loss", "train")})
    with plants.planted("supervised-sum"):
        alarms = score.false_alarms("resnext", 0)
    assert "resnext seed 0 stage loss" in alarms
    assert not any("augment" in alarm for alarm in alarms)
