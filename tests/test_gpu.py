"""What only a GPU can show; `make test-gpu` runs it, and says what was skipped where there is none."""

import json
import subprocess
import sys

import pytest
from running import ROOT, TINY, digits, tool_environment

from fixmatch import cli


@pytest.mark.gpu
def test_the_machine_is_described_and_trains_three_steps(tmp_path):
    assert cli.main(["check", "-o", *TINY, "parity.enabled=true", f"run.dir={tmp_path}/run", "runtime.device=gpu",
                     "--json", str(tmp_path / "check.json")]) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["device"]["device"].startswith("gpu:")
    assert "CUDA" in found["versions"]["paddle build"]
    assert found["memory"]["gpu_total_gb"] * 1024 > found["steps"]["peak_memory_mb"] > 0


@pytest.mark.gpu
def test_a_run_trains_on_the_gpu_and_can_be_evaluated(tmp_path, capsys):
    settings = digits("runtime.device=gpu", "train.total_steps=20", f"run.dir={tmp_path}/run", "parity.enabled=true")
    assert cli.main(["train", *map(str, settings)]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["device"][:3]) == (20, "gpu")
    assert "first steps: PARITY PASS" in capsys.readouterr().out
    assert cli.main(["eval", f"{tmp_path}/run"]) == 0


def test_without_a_gpu_each_is_skipped_by_name():
    """With CUDA's devices hidden, and so on a machine that has one, too."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", __file__],
                          cwd=ROOT, text=True, capture_output=True, check=False,
                          env=tool_environment() | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout
    assert "2 skipped" in done.stdout
    assert "needs a GPU" in done.stdout
