"""The public Python interface: a run from its configuration to its result, and what it raises."""

import json
import os
import pty
import subprocess
import sys

import pytest
from running import ROOT, TINY, tool_environment

import fixmatch
from fixmatch import run, selfcheck
from fixmatch.checkpoint import CheckpointError
from fixmatch.config import ConfigError
from fixmatch.metrics import NonFinite


def tiny(folder, *overrides: str) -> fixmatch.Config:
    return fixmatch.load_config("digits", [*TINY, f"run.dir={folder}/run", "train.total_steps=6", "train.eval_every=3",
                                           *overrides])


def test_a_notebook_trains_in_three_lines_and_evaluates_in_one(tmp_path, capsys):
    result = fixmatch.train(tiny(tmp_path))
    said = capsys.readouterr().out
    assert result.top1 == json.loads((tmp_path / "run/result.json").read_text())["top1"]
    assert 0 <= result.top1["ema"]["last"] <= 100
    assert (result.steps, result.parity) == (6, "not checked: parity.enabled is false")
    assert said.splitlines()[-2].startswith("done: 6 steps")
    found = fixmatch.evaluate(tmp_path / "run")
    assert (found.step, found.ema.top1, found.raw.top1) == (6, result.top1["ema"]["last"], result.top1["raw"]["last"])
    assert found.ema_logits.shape == (500, 10)
    assert found.source.name == "digits"
    capsys.readouterr()


def test_result_json_is_the_result(tmp_path):
    result = fixmatch.train(tiny(tmp_path))
    content = json.loads((tmp_path / "run/result.json").read_text())
    assert content == json.loads(json.dumps(result.to_json()))
    assert content.keys() == {"steps", "seconds", "images_per_second", "top1", "parity", "versions", "commit",
                              "platform", "device", "build", "operators", "seed", "world_size", "config",
                              "split_sha256", "classes"}


def test_what_goes_wrong_is_raised(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such configuration"):
        fixmatch.load_config("nothing")
    with pytest.raises(CheckpointError):
        fixmatch.evaluate(tmp_path)
    with pytest.raises(NonFinite, match=r"at step \d+; .*a lower optim.lr may help"):
        fixmatch.train(tiny(tmp_path, "optim.lr=1e30"))
    failed = {"verdict": "PARITY FAIL x", "passed": False}
    monkeypatch.setattr(selfcheck.SelfCheck, "result", lambda self: failed)
    with pytest.raises(run.SelfCheckFailed, match=r"parity\.json"):
        fixmatch.train(tiny(tmp_path))


def test_a_run_leaves_no_handler_no_lock_and_no_signal_handler_behind(tmp_path):
    import logging
    import signal

    before = signal.getsignal(signal.SIGINT)
    fixmatch.train(tiny(tmp_path))
    assert logging.getLogger("fixmatch").handlers == []
    assert signal.getsignal(signal.SIGINT) is before
    fixmatch.train(tiny(tmp_path))  # the same process may use the folder again
    assert (tmp_path / "run.1/result.json").exists()


def test_the_public_names():
    assert set(fixmatch.__all__) >= {"train", "evaluate", "Config", "load_config"}
    assert all(getattr(fixmatch, name) is not None for name in fixmatch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fixmatch.trian


@pytest.mark.parametrize("terminal", [False, True])
def test_the_log_has_all_that_the_terminal_showed(tmp_path, terminal):
    """Step lines, too, although a terminal shows a bar in their place; and what the data sources say."""
    script = ("import logging, fixmatch; from fixmatch import inputs; read = inputs.load_source\n"
              "def told(config):\n"
              "    logging.getLogger('fixmatch.data.sources').info('said by a source')\n"
              "    return read(config)\n"
              "inputs.load_source = told\n"
              f"fixmatch.train(fixmatch.load_config('digits', {[*TINY, 'train.total_steps=4', 'run.dir=run']}))\n")
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=tool_environment() | {
            "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=slave if terminal else subprocess.PIPE) as process:
        os.close(slave)
        out = process.communicate(timeout=120)[0].decode()
    os.close(master)
    assert process.returncode == 0
    log = (tmp_path / "run/train.log").read_text().splitlines()
    assert set(out.splitlines()) <= set(log)
    assert "said by a source" in log
    assert [line.split()[1] for line in log if line.startswith("step ")] == ["1/4", "2/4", "3/4", "4/4"]
    assert any(line.startswith("step ") for line in out.splitlines()) != terminal
