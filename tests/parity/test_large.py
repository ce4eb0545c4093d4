"""What a self-check takes of networks too large to compare all of: tried on a small one that counts as large."""

import pytest

pytest.importorskip("torch")  # the mirror's side

from parity import case as case_module
from parity import plants, stages
from parity.plants import score

FOUND_IN = {  # plant -> the stage that names it
    "no-nesterov": "optimizer", "momentum-0.95": "optimizer", "weight-decay-on-bn": "optimizer",
    "gradients-not-cleared": "optimizer", "lr-off-by-one": "optimizer", "ema-buffers-averaged": "ema",
    "ema-before-step": "ema", "mask-after-mean": "loss", "separate-forwards": "operators",
    "bn-running-variance-biased": "operators", "conv-weight-gradient-1x1-zero": "operators",
    "memory-by-tensor": "run"}


@pytest.fixture
def every(monkeypatch):
    """The stages of the self-check of a large network, by name."""
    monkeypatch.setattr(case_module, "_LARGE", 0)
    table = stages.stages(thorough=False, threads=2)
    return {name: table[name] for name in stages.SELF_CHECK if name not in ("resume", "convert")}


def failed(case, every) -> list[stages.StageResult]:
    return [result for result in stages.run_chosen(every, case.small(), every, together=True, keep_going=False)
            if not result.passed]


@pytest.mark.parametrize("arch", ["wideresnet", "resnext"])
def test_right_code_passes(arch, every):
    case = case_module.small_case(arch, 3)
    assert case.large
    assert [(result.stage, result.first_divergence) for result in failed(case, every)] == []


@pytest.mark.parametrize("name", FOUND_IN)
def test_a_planted_bug_is_caught(name, every):
    with plants.planted(name):
        found = failed(score.case_of(plants.PLANTS[name]), every)
    assert stages.first_failure(found).stage == FOUND_IN[name]


@pytest.mark.parametrize("name", ["forward", "backward", "train"])
def test_all_of_it_is_compared_where_there_is_time(name, every):
    """Outside of a self-check a large network takes whole steps, and all images are shown."""
    case = case_module.small_case("wideresnet", 3)
    result = stages.run_stage(stages.stages()[name], case)
    assert result.passed, result.first_divergence
    tensors = {row.tensor for row in result.rows}
    assert name != "train" or "step 2 losses/loss" in tensors
