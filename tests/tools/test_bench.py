"""The benchmark runs and names its figures; how large they are is for tools/bench.py to say, not for a test."""

import json

import pytest


@pytest.mark.long
def test_the_data_benchmark(run_tool, tmp_path):
    ran = run_tool("bench", "data", "--seconds", 0, "--json", "found.json", cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())["data"]
    assert found["pairs_per_second_per_core"] > found["pillow_pairs_per_second_per_core"] > 0
    assert found["ratio_to_pillow"] > 1
    assert set(found["threads"]) == {"1", "2", "4"}


def test_the_step_benchmark(run_tool, tmp_path):
    ran = run_tool("bench", "step", "--depth", 10, "--arch", "wideresnet", "--threads", 1, "--batch-size", 1,
                   "--rounds", 1, "--rivals", "ours", "torch", "--json", "found.json", cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())["step"]
    assert found["images_per_second"] > 0
    assert found["ratio_to_torch"] > 0
    assert 0 < found["overhead_percent"] < 100
