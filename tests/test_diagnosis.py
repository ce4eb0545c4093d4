"""What is said of numbers that look wrong, and that nothing is said of those that do not."""

import pytest

from fixmatch.config import from_dict
from fixmatch.curves import points
from fixmatch.diagnosis import RULES, diagnose

CLASSES = ("cat", "dog", "o\nwl")
FAST = {"step": 1000, "steps": 10, "loss_x": 0.1, "loss_u": 0.2, "mask": 0.8, "impurity": 4.0, "top_class": 1,
        "top_class_share": 0.4, "data_wait": 0.01}
FIRST = FAST | {"step": 1, "steps": 1, "mask": 0.0}  # of a run that shows a line every 50 steps


def run(*, decay=0.99, bn=0.99, total=1000, mode="fixmatch", start=0):
    return from_dict({"train": {"total_steps": total}, "ema": {"decay": decay}, "model": {"bn_momentum": bn},
                      "ssl": {"mode": mode, "supervised_steps": start}}, "test")


def scored(step, ema=90.0, raw=90.0, ema_loss=0.3, raw_loss=0.3):
    return {"step": step, "ema": {"top1": ema, "loss": ema_loss}, "raw": {"top1": raw, "loss": raw_loss}}


GOOD = [scored(step) for step in (250, 500, 750, 1000)]


def said(train, evaluations, config) -> dict[str, str]:
    return {finding.name: finding.text for finding in diagnose(train, evaluations, config, CLASSES)}


def test_a_good_run_has_no_findings():
    assert said([FAST] * 5, GOOD, run()) == {}
    assert said([], GOOD, run()) == said([FAST], [], run()) == {}


@pytest.mark.parametrize(("rule", "line", "evaluations", "config", "parts"), [
    ("mask_is_zero", {"mask": 0.0}, GOOD, run(), ["ssl.threshold = 0.95", "teach nothing", "data.num_labeled"]),
    ("mask_is_zero", {"mask": 0.0, "step": 40}, [scored(40)], run(), ["usual at the start (step 40 of 1,000)"]),
    ("ema_far_behind", {"step": 300}, [scored(300, ema=20.0)], run(total=300, decay=0.999),
     ["= 1,000 steps", "for 300 steps ema.decay = 0.98 fits"]),
    ("ema_far_behind", {}, [scored(1000, ema=75.0)], run(), ["raw weights still rise", "ema.decay"]),
    ("raw_far_behind", {}, [scored(1000, raw=75.0)], run(), ["raw top-1 is 75.0 %, EMA 90.0 %", "optim.lr"]),
    ("raw_loss_far_above", {"step": 300}, [scored(300, raw=30.0, raw_loss=13.0)], run(bn=0.999, total=300),
     ["raw test loss is 13.0, training loss_x 0.10", "model.bn_momentum = 0.98 fits"]),
    ("pseudo_labels_of_one_class", {"top_class": 2, "top_class_share": 0.9}, GOOD, run(), ["90 %", "'o\\nwl'"]),
    ("pseudo_labels_are_wrong", {"impurity": 35.0}, GOOD, run(), ["35 %", "ssl.threshold"]),
    ("test_loss_rises", {}, [*GOOD, scored(1250, ema_loss=0.6), scored(1500, ema_loss=0.7)], run(),
     ["from 0.300 at step 250 to 0.700", "train.total_steps"]),
    ("data_is_slow", {"data_wait": 0.25}, GOOD, run(), ["25 %", "runtime.data_threads (now 1)"])])
def test_what_looks_wrong_is_said_with_the_key_to_change(rule, line, evaluations, config, parts):
    found = said([FAST | line] * 5, evaluations, config)
    assert found.keys() == {rule}
    assert "\n" not in found[rule]
    assert all(part in found[rule] for part in parts), found[rule]


def test_every_rule_is_tried():
    tried = test_what_looks_wrong_is_said_with_the_key_to_change.pytestmark[0].args[1]
    assert {case[0] for case in tried} == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(("line", "evaluations"), [
    ({"mask": 0.02}, GOOD), ({}, [scored(1000, ema=81.0)]), ({}, [scored(1000, raw=81.0)]),
    ({"step": 400}, [scored(400, raw_loss=2.1)]), ({"top_class_share": 0.7}, GOOD), ({"impurity": 15.0}, GOOD),
    ({"data_wait": 0.09}, GOOD), ({"impurity": None, "top_class": None, "top_class_share": None}, GOOD),
    ({}, [*GOOD, scored(1250, ema_loss=0.5), scored(1500, ema_loss=0.32)]),
    ({}, [scored(step, ema_loss=loss) for step, loss in enumerate((0.5, 0.5, 0.61, 0.61))])])
def test_just_below_the_limits_nothing_is_said(line, evaluations):
    assert said([FAST | line] * 5, evaluations, run()) == {}


def test_the_wait_for_the_first_batch_is_not_slow_data():
    assert said([FAST | {"data_wait": 0.9}, FAST, FAST], GOOD, run()) == {}


def test_a_supervised_run_has_no_mask_to_be_zero():
    line = {"step": 1000, "steps": 10, "loss": 0.1, "loss_x": 0.1, "data_wait": 0.01}
    assert said([line] * 5, GOOD, run(mode="none")) == {}


def test_nothing_is_expected_of_pseudo_labels_in_a_supervised_start():
    lines = [FAST | {"step": step, "mask": 0.0} for step in (600, 700, 800)]
    assert said(lines, GOOD, run(start=800)) == said(lines[:1], GOOD, run(start=600)) == {}
    assert said([lines[0] | {"steps": 100}], GOOD, run(start=599)) == {}  # of which 99 steps were the start's
    assert "usual at the start" in said(lines[1:], GOOD[:3], run(start=690, total=4000))["mask_is_zero"]
    assert "teach nothing" in said(lines, GOOD, run(start=600))["mask_is_zero"]


@pytest.mark.parametrize(("config", "worse", "rule", "part"), [
    (run(total=40, decay=0.999), {"ema": 20.0}, "ema_far_behind", "step 20 is too soon for it"),
    (run(total=40, bn=0.999), {"raw": 30.0, "raw_loss": 13.0}, "raw_loss_far_above", "step 20 is too soon for them")])
def test_the_step_that_is_named_is_that_of_the_evaluation(config, worse, rule, part):
    """At step 20 of 40 the only line may be that of step 1."""
    found = said([FIRST], [scored(20, **worse)], config)
    assert found.keys() == {rule}
    assert part in found[rule]


def test_a_mask_is_judged_by_the_steps_that_it_is_of():
    assert said([FIRST], [scored(20)], run(total=40)) == {}
    assert said([FIRST, FAST | {"step": 10, "steps": 8, "mask": 0.0}], [scored(20)], run(total=40)) == {}  # 9 steps
    ten = [FIRST, FAST | {"step": 10, "steps": 9, "mask": 0.0}]
    assert "usual at the start (step 20 of 1,000)" in said(ten, [scored(20)], run())["mask_is_zero"]
    assert "usual at the start (step 10 of 1,000)" in said(ten, [scored(5)], run())["mask_is_zero"]  # it trained on
    assert "teach nothing" in said(ten, [scored(20)], run(total=40))["mask_is_zero"]
    assert said([FIRST, FAST | {"step": 100, "steps": 99, "mask": 0.0102}], GOOD, run()) == {}  # 1.01 % of 100 steps
    assert "mask is 0.010" in said([FIRST, FAST | {"step": 100, "steps": 99, "mask": 0.0100}], GOOD, run()
                                   )["mask_is_zero"]  # 0.99 % of 100 steps


def test_one_step_says_nothing_of_pseudo_labels():
    line = FAST | {"steps": 1, "top_class_share": 1.0, "impurity": 90.0}
    assert said([line], GOOD, run()) == {}
    assert said([line | {"steps": 10}], GOOD, run()).keys() == {"pseudo_labels_of_one_class",
                                                                "pseudo_labels_are_wrong"}


# --- what VisualDL draws


def test_the_first_group_of_curves_answers_what_one_asks_first():
    scores = {"top1": 90.0, "top5": 99.0, "loss": None, "per_class": [1.0], "confusion": [[1]]}
    found = points({"kind": "eval", "step": 5, "ema": scores, "raw": scores}, 10)
    assert found == {"1_overview/ema_top1": 90.0, "2_evaluation/ema_top1": 90.0, "2_evaluation/ema_top5": 99.0,
                     "2_evaluation/raw_top1": 90.0, "2_evaluation/raw_top5": 99.0}
    assert not any("top5" in tag for tag in points({"kind": "eval", "step": 5, "ema": scores, "raw": scores}, 5))
    line = {"kind": "train", "step": 5, "loss": 1.0, "mask": 0.5, "pseudo_label_accuracy": 80.0, "impurity": None,
            "data_wait": 0.0, "images_per_second": 9.0}
    assert points(line, 10).keys() == {"1_overview/mask", "1_overview/pseudo_label_accuracy", "1_overview/data_wait",
                                       "1_overview/images_per_second", "3_training/loss"}
