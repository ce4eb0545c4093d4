"""Numbers that only a GPU can show: mixed precision, resume, copies, parity. None was at hand when this was written.

`make test-gpu` runs it.
"""

import json

import numpy as np
import paddle
import pytest
from running import TINY, After

import fixmatch
from fixmatch import checkpoint, run
from fixmatch.normalize import to_device
from fixmatch.scaler import LossScaler
from parity import cli

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a GPU build may have warnings of its own


@pytest.fixture(autouse=True)
def _on_the_gpu():
    before = paddle.device.get_device()
    paddle.device.set_device("gpu")
    yield
    paddle.device.set_device(before)


def config_of(folder, *overrides: str) -> fixmatch.Config:
    return fixmatch.load_config("digits", [*TINY, f"run.dir={folder}", "runtime.device=gpu", "train.total_steps=8",
                                           "train.eval_every=8", "runtime.deterministic=true", *overrides])


def losses_of(folder) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            if line["kind"] == "train"]


@pytest.mark.parametrize(("amp", "most_apart"), [("float16", 0.02), ("bfloat16", 0.2)])
def test_three_steps_of_mixed_precision_are_near_those_in_float32(tmp_path, amp, most_apart):
    for name in ("off", amp):
        fixmatch.train(config_of(tmp_path / name, f"train.amp={name}", "train.total_steps=3"))
    mixed, full = (losses_of(tmp_path / name) for name in (amp, "off"))
    assert mixed != full, "autocast changed nothing"
    assert mixed[0] == pytest.approx(full[0], abs=most_apart)
    saved = checkpoint.load(tmp_path / amp / "checkpoints/latest")
    assert {str(array.dtype) for array in saved.part("model").values()} == {"float32"}
    assert (saved.manifest.scaler == {}) == (amp == "bfloat16")


@pytest.mark.parametrize("amp", ["off", "float16", "bfloat16"])
def test_a_deterministic_run_resumes_bit_for_bit(tmp_path, amp):
    fixmatch.train(config_of(tmp_path / "whole", f"train.amp={amp}"))
    with pytest.raises(run.Interrupted):
        fixmatch.train(config_of(tmp_path / "stopped", f"train.amp={amp}"), recorder=After(5))
    fixmatch.train(config_of(tmp_path / "stopped", f"train.amp={amp}"), resume=True)
    ours, expected = (checkpoint.load(tmp_path / name / "checkpoints/latest") for name in ("stopped", "whole"))
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    assert ours.manifest.scaler == expected.manifest.scaler
    assert all(np.array_equal(ours.arrays[name], array) for name, array in expected.arrays.items())


def test_the_scaler_skips_and_keeps_its_state_on_the_device():
    scaler = LossScaler()
    for factor, after in ((np.inf, (2.0**15, 0, 1)), (3.0, (2.0**15, 1, 1))):
        weight = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
        scaler.scaled((weight * paddle.to_tensor([factor, 3.0])).sum()).backward()
        assert bool(scaler.unscale([weight])) == (factor == np.inf)
        assert tuple(scaler.state().values()) == after
    assert weight.grad.tolist() == [3.0, 3.0]
    other = LossScaler()
    other.load_state(json.loads(json.dumps(scaler.state())))
    assert other.state() == scaler.state()


def test_copies_through_pinned_memory_are_whole_while_the_gpu_is_behind():
    busy, found = paddle.ones([4096, 4096]), []
    for i in range(40):
        for _ in range(4):
            busy = busy @ busy * 1e-4  # keeps the GPU busy, so that the copies queue up
        found.append(to_device(np.full((64, 32, 32, 3), i, np.uint8)))
    copied = [tensor.numpy() for tensor in found]
    assert [(a.min(), a.max()) for a in copied] == [(i, i) for i in range(40)]


@pytest.mark.parametrize("settings", [(), ("train.amp=float16",), ("train.amp=bfloat16",)])
def test_parity_passes_on_the_gpu(tmp_path, settings):
    file = tmp_path / "parity.json"
    overrides = ["-o", *settings] if settings else []
    code = cli.main(["--stage", "all", "--device", "gpu", "--json", str(file), *overrides])
    found = json.loads(file.read_text())
    assert code == 0, found["verdict"]
    assert {s["stage"]: s["device"] for s in found["stages"]}["operators"].startswith("gpu")


@pytest.mark.parametrize("plant", ["bn-momentum-inverted", "no-nesterov", "threshold-exclusive"])
def test_a_planted_bug_is_caught_on_the_gpu(plant):
    assert cli.main(["--stage", "all", "--device", "gpu", "--plant", plant]) == 1
