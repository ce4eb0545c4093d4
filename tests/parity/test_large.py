"""What a self-check takes of networks too large to compare all of: tried on one that counts as large."""

import dataclasses

import pytest
from running import first_of

pytest.importorskip("torch")  # the mirror's side

from fixmatch import kernels
from fixmatch.kernels import onednn
from fixmatch.models import wideresnet
from parity import case as case_module
from parity import plants, prove, stages
from parity.hints import hint_for
from parity.plants import score

FOUND_IN = {  # plant -> the stage that names it
    "weight-decay-on-bn": "optimizer", "ema-buffers-averaged": "ema", "conv-weight-gradient-1x1-zero": "operators",
    "memory-by-tensor": "run", "no-nesterov": "optimizer", "momentum-0.95": "optimizer",
    "gradients-not-cleared": "optimizer", "lr-off-by-one": "optimizer", "ema-before-step": "ema",
    "mask-after-mean": "loss", "separate-forwards": "operators", "bn-running-variance-biased": "operators"}


@pytest.fixture
def every(monkeypatch):
    """The stages of the self-check of a large network, by name. All but the smallest networks are large."""
    smallest = max(case_module.small_case(arch, 0).num_weights for arch in case_module.SMALL)
    monkeypatch.setattr(case_module, "_LARGE", smallest)
    table = stages.stages(thorough=False, threads=2)
    return {name: table[name] for name in stages.SELF_CHECK if name not in ("resume", "convert")}


def large(case: case_module.Case) -> case_module.Case:
    """The case with a network that is wider."""
    model = dataclasses.replace(case.config.model, width=2 * case.config.model.width)
    return dataclasses.replace(case, config=dataclasses.replace(case.config, model=model))


def failed(case, every) -> list[stages.StageResult]:
    results = stages.run_chosen(every, case.small(), every, {"run": 2}, keep_going=False)
    return [result for result in results if not result.passed]


@pytest.mark.parametrize("arch", first_of(["wideresnet", "resnext"], 1))
def test_right_code_passes(arch, every):
    case = large(case_module.small_case(arch, 3))
    assert case.large
    assert not case.on_a_small_network().large
    assert [(result.stage, result.first_divergence) for result in failed(case, every)] == []


@pytest.mark.parametrize("name", first_of(FOUND_IN, 1))
def test_a_planted_bug_is_caught(name, every):
    with plants.planted(name):
        found = failed(large(score.case_of(plants.PLANTS[name])), every)
    assert stages.first_failure(found).stage == FOUND_IN[name]


@pytest.mark.skipif(not kernels.status()[0], reason=kernels.status()[1])
def test_what_layers_of_one_shape_share_is_seen(every, monkeypatch):
    """The small network that runs in the place of a large one has layers of one shape, too."""
    right, held = onednn.Reorder.__call__, {}

    def into_one_buffer(self, tensor):
        converted = right(self, tensor)
        if converted is tensor:
            return tensor
        kept = held.setdefault(id(self), converted)
        kept.copy_(converted, False)
        return kept

    monkeypatch.setattr(onednn.Reorder, "__call__", into_one_buffer)
    found = failed(large(case_module.small_case("wideresnet", 3)), every)
    assert [(result.stage, "gradients" in result.first_divergence.tensor) for result in found] == [("run", True)]


def test_the_large_network_itself_is_compared(every):
    """And not the small one alone: which layers it has is a matter of the large one."""
    case = large(case_module.small_case("wideresnet", 3))
    rows = list(stages.rows_together(case.small()))
    assert all(row.passed for row in rows)
    widest = f"{case.config.model.width * 64}x{case.config.model.width * 64}x3x3"
    seen = {row.tensor.split("/")[0] for row in rows if widest in row.tensor}
    assert {"step 0 gradients", "step 0 weights", "step 0 ema"} <= seen


def test_how_the_large_network_is_evaluated_is_compared(every, monkeypatch):
    right = wideresnet.WideResNet.forward

    def wrong_where_wide(self, x):
        wide = self.fc.weight.shape[0] > 128  # which the small network is not
        return right(self, x) * (1.01 if wide and not self.training else 1.0)

    monkeypatch.setattr(wideresnet.WideResNet, "forward", wrong_where_wide)
    rows = [row for row in stages.rows_together(large(case_module.small_case("wideresnet", 3)).small())
            if not row.passed]
    assert [row.tensor.split()[1] for row in rows] == ["activations/logits"]
    assert "returns" in hint_for("forward", rows[0])


@pytest.mark.parametrize("name", ["forward", "backward", "train", "run"])
def test_all_of_it_is_compared_where_there_is_time(name, every):
    """Outside of a self-check a large network takes whole steps, all images are shown, and the run is its own."""
    case = large(case_module.small_case("wideresnet", 3))
    result = stages.run_stage(stages.stages()[name], case)
    assert result.passed, result.first_divergence
    tensors = {row.tensor for row in result.rows}
    assert name != "train" or "step 2 losses/loss" in tensors


def test_all_stages_of_a_large_network(every):
    """What is about the network is tried on it, and the others on a small one."""
    case = large(case_module.small_case("wideresnet", 3))
    table = stages.stages(thorough=False)
    report = prove.all_stages(case, {name: table[name] for name in ("backward", "resume")})
    assert [(result.stage, result.passed) for result in report.results] == [
        ("backward", True), ("resume", True), ("backward", True)]  # the rounding lane comes last
    backward, _, lane = report.results
    assert any("256x256x3x3" in row.tensor for row in backward.rows)
    assert lane.dtype == "float32"
