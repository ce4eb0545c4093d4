"""What is set for a GPU, tried with a stand-in for one."""

import os

import paddle
import pytest

from fixmatch import runtime


@pytest.fixture
def gpu(monkeypatch):
    """Paddle says that it has a GPU; the device and the flags that are chosen are noted, and not set."""
    chosen = {"device": "gpu:0", "flags": {}}
    monkeypatch.setattr(paddle.device, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(paddle.device, "set_device", lambda name: chosen.update(device=name))
    monkeypatch.setattr(paddle.device, "get_device", lambda: chosen["device"])
    monkeypatch.setattr(paddle, "set_flags", chosen["flags"].update)
    monkeypatch.setattr(os, "environ", {})
    return chosen


@pytest.mark.parametrize(("device", "deterministic", "expected"), [
    ("auto", True, ("gpu", True)), ("gpu", True, ("gpu", True)), ("auto", False, ("gpu", False)),
    ("cpu", True, ("cpu", False))])
def test_deterministic_flags_are_set_on_a_gpu_and_only_if_asked_for(gpu, device, deterministic, expected):
    name = runtime.select_device(device, deterministic)
    assert (name, bool(gpu["flags"])) == expected
    assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8") == expected[1]
    if expected[1]:
        assert gpu["flags"]["FLAGS_cudnn_deterministic"]
        assert gpu["flags"]["FLAGS_embedding_deterministic"] == 1
        assert not gpu["flags"]["FLAGS_cudnn_exhaustive_search"]


def test_a_gpu_without_the_dtype_is_refused_where_paddle_would_only_warn(gpu, monkeypatch):
    monkeypatch.setattr(paddle.amp, "is_float16_supported", lambda: True)
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda: False)
    assert [runtime.mixed_precision(setting) for setting in ("off", "float16")] == [None, "float16"]
    with pytest.raises(ValueError, match=r"train\.amp: bfloat16: this GPU cannot compute in it; use off or float16"):
        runtime.mixed_precision("bfloat16")
    gpu["device"] = "cpu"
    assert runtime.mixed_precision("bfloat16") is None  # a CPU trains in float32
