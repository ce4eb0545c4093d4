"""The check before training: run once, remembered, and never taken for a pass when it crashes or hangs."""

import dataclasses
import json
import subprocess
import sys

import pytest
from running import ROOT, TINY, tool_environment

from fixmatch import cli, process, selfcheck
from fixmatch.config import Config, ModelConfig, OptimConfig, ParityConfig, load_config


@pytest.fixture
def config(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Config(model=ModelConfig(depth=10, width=1))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Puts a program in the place of the package `parity`."""
    def put(program: str):
        (tmp_path / "root" / "parity").mkdir(parents=True)
        (tmp_path / "root" / "parity" / "__init__.py").touch()  # else a later folder on PYTHONPATH would be preferred
        (tmp_path / "root" / "parity" / "__main__.py").write_text(program)
        monkeypatch.setattr(selfcheck, "_ROOT", tmp_path / "root")
        monkeypatch.setattr(process, "can_fork", lambda: False)  # a copy would have the package itself
    return put


def check(config) -> dict:
    running = selfcheck.SelfCheck(config)
    try:
        return running.result()
    finally:
        running.close()


def test_it_passes_and_is_remembered_until_a_setting_changes(config):
    first = check(config)
    assert first["passed"] is True
    assert first["cached"] is False
    assert first["verdict"].startswith("PARITY PASS ")
    again = check(config)
    assert again["cached"] is True
    assert again["verdict"] == first["verdict"]
    other = dataclasses.replace(config, optim=OptimConfig(weight_decay=1e-3))
    assert selfcheck._fingerprint(other) != selfcheck._fingerprint(config)
    assert {stage["stage"] for stage in first["stages"]} >= {"reference", "operators", "forward", "loss", "backward",
                                                               "optimizer", "ema", "run"}


@pytest.mark.parametrize("setting", [
    "augment.strong=ctaugment", "data.num_labeled=250", "ema.decay=0.9", "model.width=3", "optim.lr=0.1",
    "runtime.cpu_kernels=off", "ssl.threshold=0.5", "train.mu=3"])
def test_a_setting_of_any_section_that_is_proven_is_told_apart(setting):
    sections = {*selfcheck._SECTIONS, "data"}
    assert setting.partition(".")[0] in sections
    assert len(sections) == 8
    fingerprints = {selfcheck._fingerprint(load_config("digits", overrides)) for overrides in ([], [setting])}
    assert len(fingerprints) == 2


PATCHED = """
import sys
import fixmatch
from fixmatch import optimizer, process
assert process.can_fork() == (sys.platform == "linux")
optimizer.NO_DECAY = ("bias",)
fixmatch.train(fixmatch.load_config("digits", [*sys.argv[1:], "parity.enabled=true"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the check is a process that was started anew")
def test_what_a_program_changes_in_itself_is_what_is_checked(config, tmp_path):
    program = [sys.executable, "-c", PATCHED, *TINY, f"run.dir={tmp_path}/run"]
    done = subprocess.run(program, cwd=ROOT, env=tool_environment(), capture_output=True, text=True, check=False)
    assert "SelfCheckFailed" in done.stderr
    found = json.loads((tmp_path / "run/parity.json").read_text())
    assert "weight decay on batch norm" in found["verdict"]
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.long
def test_it_is_no_rank_of_a_launched_training(config, monkeypatch):
    for name, value in {"PADDLE_TRAINERS_NUM": "2", "PADDLE_TRAINER_ID": "0", "FLAGS_selected_gpus": "0",
                        "PADDLE_TRAINER_ENDPOINTS": "127.0.0.1:1,127.0.0.1:2"}.items():
        monkeypatch.setenv(name, value)
    assert check(config)["verdict"].startswith("PARITY PASS ")


PASSES = """
import json
json.dump({"verdict": "PARITY PASS x", "passed": True, "gate": 1e-11, "stages": []}, open("parity.json", "w"))
"""


def test_a_damaged_memory_is_not_believed(config, stand_in):
    stand_in(PASSES)
    assert check(config)["cached"] is False
    assert check(config)["cached"] is True
    file = next(selfcheck._cache_folder().iterdir())
    file.write_text('{"verdict": "PARITY PASS')
    assert check(config)["cached"] is False


@pytest.mark.parametrize(("program", "said"), [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    ("raise RuntimeError('no such operator')", "no such operator"),
    ("import sys; sys.exit(0)", "crashed"),  # says it is done and gives no verdict
    ("import json; json.dump({'verdict': 'PASS', 'passed': True}, open('parity.json', 'w')); raise SystemExit(1)",
     "crashed"),
])
def test_a_crash_is_a_failure(config, stand_in, program, said):
    stand_in(program)
    found = check(config)
    assert found["passed"] is False
    assert said in found["verdict"]


def test_a_hang_is_a_failure(config, stand_in):
    stand_in("import time; time.sleep(600)")
    found = check(dataclasses.replace(config, parity=ParityConfig(timeout=1.0)))
    assert found["passed"] is False
    assert "did not finish within 1 s" in found["verdict"]


FAILS = """
import json
json.dump({"verdict": "PARITY FAIL x", "passed": False, "stages": []}, open("parity.json", "w"))
raise SystemExit(1)
"""


def test_a_failure_is_not_remembered(config, stand_in):
    stand_in(FAILS)
    for _ in range(2):
        found = check(config)
        assert (found["passed"], found["cached"]) == (False, False)


def arguments(tmp_path, *more):
    (tmp_path / "tiny.yaml").write_text("model: {depth: 10, width: 1}\ntrain: {total_steps: 1, batch_size: 2, mu: 1}\n")
    return ["-c", str(tmp_path / "tiny.yaml"), "-o", f"run.dir={tmp_path}/run", *more]


def test_training_is_refused_after_a_failure(config, stand_in, tmp_path, capsys):
    stand_in(FAILS)
    assert cli.main(["train", *arguments(tmp_path)]) == 3
    assert "PARITY FAIL x" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/parity.json").read_text())["passed"] is False
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.long
def test_training_goes_on_knowingly(config, stand_in, tmp_path):
    stand_in(FAILS)
    assert cli.main(["train", *arguments(tmp_path, "parity.on_failure=warn")]) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["parity"] == "PARITY FAIL x"


def test_a_run_that_is_not_checked_says_so(config, tmp_path):
    assert cli.main(["train", *arguments(tmp_path, "parity.enabled=false")]) == 0
    assert "not checked" in json.loads((tmp_path / "run/result.json").read_text())["parity"]
