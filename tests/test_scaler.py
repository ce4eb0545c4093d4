"""The loss scale of float16 training: its arithmetic, a step that it skips, and a run that is stopped and goes on.

The scaler that trains on a GPU runs here on the CPU, under a training in float32.
"""

import contextlib
import json

import numpy as np
import paddle
import pytest
from running import TINY, After

import fixmatch
from fixmatch import checkpoint, run, scaler
from fixmatch import step as algorithm
from fixmatch.checkpoint import CheckpointError
from fixmatch.config import Config, ModelConfig
from fixmatch.metrics import NonFinite
from fixmatch.scaler import LossScaler


def leaf(values):
    return paddle.to_tensor(np.asarray(values, np.float32), stop_gradient=False)


def test_the_scale_by_hand():
    """Halved at each overflow, not below 1; doubled after 2000 good steps, not beyond 2**24."""
    for before, gradient, after in (
            ((65536.0, 7, 0), np.inf, (32768.0, 0, 1)),
            ((65536.0, 7, 2), np.nan, (32768.0, 0, 3)),
            ((1.0, 7, 0), np.inf, (1.0, 0, 1)),
            ((4.0, 7, 5), 8.0, (4.0, 8, 5)),
            ((4.0, 1999, 5), 8.0, (8.0, 0, 5)),
            ((2.0**24, 1999, 0), 8.0, (2.0**24, 0, 0))):
        one, two, idle = leaf([1.0, 2.0]), leaf([3.0]), leaf([1.0])
        under_test = LossScaler()
        under_test.load_state(dict(zip(("scale", "good_steps", "skipped"), before, strict=True)))
        under_test.scaled((one * paddle.to_tensor([gradient, 3.0])).sum() + two.sum()).backward()
        assert bool(under_test.unscale([one, two, idle])) == (not np.isfinite(gradient))
        assert tuple(under_test.state().values()) == after
        if np.isfinite(gradient):
            assert (one.grad.tolist(), two.grad.tolist(), idle.grad) == ([8.0, 3.0], [1.0], None)


def test_a_state_goes_through_json_exactly_and_no_other_is_read():
    first, second = LossScaler(), LossScaler()
    first.load_state({"scale": 2.0**23, "good_steps": 1234, "skipped": 2**30 + 1})
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == first.state() == {"scale": 2.0**23, "good_steps": 1234, "skipped": 2**30 + 1}
    for damaged in ({}, {"scale": 1.0}, {"scale": "1", "good_steps": 1, "skipped": 1},
                    {"scale": None, "good_steps": 1, "skipped": 1}):
        with pytest.raises(ValueError, match="not the state of a loss scaler"):
            second.load_state(damaged)


def build(scaled: bool) -> algorithm.TrainState:
    state = algorithm.build_state(Config(model=ModelConfig(depth=10, width=1)), 10, (0.5,) * 3, (0.2,) * 3)
    state.scaler = LossScaler() if scaled else None
    return state


def arrays(tensors: dict) -> dict:
    return {name: t.numpy().copy() for name, t in tensors.items()}


def surrogate(state, seed: int, **spoiled):
    """A loss whose gradients are random numbers, but for the parameters of these names (with _ for .)."""
    rng = np.random.default_rng(seed)
    return sum((p * leaf(rng.standard_normal(p.shape) * spoiled.get(name.replace(".", "_"), 1.0)).detach()).sum()
               for name, p in state.model.named_parameters())


@pytest.mark.parametrize("spoiled", ["fc_bias", "conv1_weight"])  # of the group that is not decayed, and that is
@pytest.mark.parametrize("loaded", [False, True])
def test_an_overflow_skips_both_optimizers_and_nothing_else(spoiled, loaded):
    state = build(scaled=True)
    if loaded:  # momentum that Paddle takes in at the next step only
        momentum = {n: paddle.full_like(p, 0.25) for n, p in state.optimizer.parameters.items()}
        state.optimizer.load_state(momentum)
    for p in state.ema.average.parameters():
        p.set_value(p + 1.0)  # so that an update of the average shows
    weights, average = arrays(state.optimizer.parameters), arrays(dict(state.ema.average.named_parameters()))
    lr = state.scheduler.get_lr()
    algorithm.update(state, surrogate(state, 0, **{spoiled: np.inf}))
    assert state.scaler.state() == {"scale": 2.0**15, "good_steps": 0, "skipped": 1}
    for name, array in arrays(state.optimizer.parameters).items():
        assert np.array_equal(array, weights[name]), name
    for name, velocity in state.optimizer.state().items():
        assert np.array_equal(velocity.numpy(), np.full(velocity.shape, 0.25 if loaded else 0.0, np.float32)), name
    assert state.scheduler.get_lr() < lr
    for name, array in arrays(dict(state.ema.average.named_parameters())).items():
        np.testing.assert_allclose(array, 0.999 * average[name] + 0.001 * weights[name], rtol=1e-5, atol=1e-6)


def test_without_an_overflow_a_scaled_step_is_the_plain_one_bit_for_bit():
    """Scales are powers of two, so that dividing by them is exact; also in the steps after one that was skipped."""
    plain, scaled = build(scaled=False), build(scaled=True)
    algorithm.update(scaled, surrogate(scaled, 9, conv1_weight=np.nan))
    for state in (plain, scaled):
        state.scheduler.step(0)
        for seed in range(2):
            algorithm.update(state, surrogate(state, seed))
    for tensors in (lambda state: state.optimizer.parameters, lambda state: state.optimizer.state()):
        ours, expected = arrays(tensors(scaled)), arrays(tensors(plain))
        assert ours.keys() == expected.keys()
        assert all(np.array_equal(ours[name], expected[name]) for name in expected)


# --- a whole run


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A training under float16's scaler, but in float32; gradients overflow where the scale is above 2**20."""
    def scaled(self, loss):
        return loss * self._scale * paddle.where(self._scale > 2.0**20, leaf([np.inf]), leaf([1.0]))

    monkeypatch.setattr(algorithm, "mixed_precision", lambda setting: "float16")
    monkeypatch.setattr(algorithm, "autocast", lambda amp: contextlib.nullcontext())
    monkeypatch.setattr(scaler, "INITIAL", 2.0**22)
    monkeypatch.setattr(scaler, "GROWS_AFTER", 2)
    monkeypatch.setattr(LossScaler, "scaled", scaled)


def config_of(folder, *overrides: str) -> Config:
    return fixmatch.load_config("digits", [*TINY, f"run.dir={folder}", "train.total_steps=8", "train.eval_every=8",
                                           *overrides])


def lines_of(folder) -> list[dict]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            if line["kind"] == "train"]


def test_a_run_counts_its_skipped_steps_and_resumes_bit_for_bit(tmp_path, as_on_a_gpu):
    fixmatch.train(config_of(tmp_path / "whole"))
    whole = lines_of(tmp_path / "whole")
    assert [line["skipped_steps"] for line in whole] == [1, 2, 2, 2, 3, 3, 3, 4]
    assert [np.log2(line["loss_scale"]) for line in whole] == [21, 20, 20, 21, 20, 20, 21, 20]
    assert "scale 1.04858e+06, 4 steps skipped" in (tmp_path / "whole/train.log").read_text()

    with pytest.raises(run.Interrupted):
        fixmatch.train(config_of(tmp_path / "stopped"), recorder=After(5))
    fixmatch.train(config_of(tmp_path / "stopped"), resume=True)
    for name in ("loss", "loss_scale", "skipped_steps"):
        assert [line[name] for line in lines_of(tmp_path / "stopped")] == [line[name] for line in whole], name
    ours, expected = (checkpoint.load(tmp_path / name / "checkpoints/latest") for name in ("stopped", "whole"))
    assert ours.manifest.scaler == expected.manifest.scaler
    assert all(np.array_equal(ours.arrays[name], array) for name, array in expected.arrays.items())

    path = tmp_path / "stopped/checkpoints/latest/checkpoint.json"
    path.write_text(json.dumps(checkpoint.sealed(json.loads(path.read_text()) | {"scaler": {"scale": "large"}})))
    with pytest.raises(CheckpointError, match="scaler"):
        fixmatch.train(config_of(tmp_path / "stopped"), resume=True)


def test_a_loss_that_is_no_number_stops_the_run_all_the_same(tmp_path, as_on_a_gpu):
    with pytest.raises(NonFinite, match="loss"):
        fixmatch.train(config_of(tmp_path / "run", "optim.lr=1e30"))
