"""fixmatch check: what it says of a machine, where something is missing or fails, and on a GPU."""

import json
import types

import paddle
import pytest
from running import TINY, digits

from fixmatch import check, cli

SECTIONS = ["versions", "device", "memory", "kernels", "threads", "disk", "self-check", "steps"]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """(exit code, what was written as JSON, the folder) of a check without the self-check, which has tests enough."""
    place = tmp_path_factory.mktemp("check")
    settings = [*TINY, f"run.dir={place}/runs/tiny", "train.total_steps=720"]
    code = cli.main(["check", "-c", "digits", "-o", *settings, "--json", str(place / "check.json")])
    return code, json.loads((place / "check.json").read_text(encoding="utf-8")), place


def test_it_finds_out_everything_and_leaves_nothing(checked):
    code, found, place = checked
    assert code == 0
    assert list(found) == SECTIONS
    assert found["versions"]["paddle build"].endswith(", CPU")
    assert found["memory"]["total_gb"] >= found["memory"]["available_gb"] > 0
    assert found["disk"]["folder"] == str(place)  # the nearest folder that there is
    assert found["disk"]["write_mb_per_second"] > 0
    assert found["self-check"]["passed"] is None
    assert [path.name for path in place.iterdir()] == ["check.json"]


def test_the_estimate_is_that_of_the_recipes_own_steps(checked):
    steps = checked[1]["steps"]
    assert steps["total_steps"] == 720
    assert steps["images_per_second"] == pytest.approx(4 * (1 + 2 * 2) / steps["seconds_per_step"], rel=0.05)
    assert steps["estimated_hours"] == pytest.approx(720 * steps["seconds_per_step"] / 3600, rel=0.05, abs=1e-3)
    assert 50 < steps["peak_memory_mb"] < 20_000


def section_of(monkeypatch, *replaced):
    """Checks with sections that cost nothing in place of `replaced`, a section's name and its function each."""
    for name in ("_versions", "_device", "_memory", "_kernels", "_threads", "_disk", "_self_check", "_steps"):
        monkeypatch.setattr(check, name, dict(replaced).get(name, lambda config, device: ({}, "fine")))


def test_a_section_that_fails_is_said_and_the_others_follow(monkeypatch, capsys):
    def fail(config, device):
        raise OSError("no\nspace")
    section_of(monkeypatch, ("_disk", fail))
    assert cli.main(["check", *map(str, digits())]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == SECTIONS
    assert lines[5] == "disk        failed: OSError: no space"
    section_of(monkeypatch, ("_self_check", lambda config, device: ({"passed": False}, "PARITY FAIL x")))
    assert cli.main(["check", *map(str, digits())]) == 3


def test_a_device_that_is_not_here_is_one_line(capsys):
    assert cli.main(["check", *map(str, digits("runtime.device=gpu"))]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_gpu_is_described(monkeypatch):
    """By what Paddle tells of it; no GPU is needed to see that it is asked for the right things."""
    gpu = types.SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=40 * 2**30)
    monkeypatch.setattr(paddle.device.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(paddle.version, "cudnn", lambda: "9.5.1")
    facts, line = check._device(None, "gpu:0")
    assert line == "gpu:0 of 2: NVIDIA A100, compute capability 8.0, cuDNN 9.5.1"
    assert facts["compute_capability"] == "8.0"
    assert check._memory(None, "gpu:0")[0]["gpu_total_gb"] == 40.0
