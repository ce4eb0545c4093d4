"""Several seeds and settings, one run after the other."""

import json

import pytest
from running import TINY, After

from fixmatch import cli, run, sweep
from fixmatch.commands.sweep import seeds
from fixmatch.config import ConfigError
from fixmatch.metrics import NonFinite

SHORT = [*TINY, "train.total_steps=1", "ssl.mode=none"]


@pytest.mark.parametrize(("text", "found"), [("0-4", [0, 1, 2, 3, 4]), ("3", [3]), ("7,1-2,2", [7, 1, 2])])
def test_seeds(text, found):
    assert seeds(text) == found


@pytest.mark.parametrize("text", ["", "4-0", "a", "-1", "1,,2", "0-99999", "1.5"])
def test_seeds_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="--seeds"):
        seeds(text)


def test_comma_lists_make_a_grid_and_brackets_stay_whole(tmp_path):
    folder, planned = sweep.plan("digits", [0, 1], ["optim.lr=0.01,0.03", "ssl.threshold=.9,.95", "data.std=[.2,.2,.2]",
                                                    f"run.dir={tmp_path}/x"])
    assert str(folder) == f"{tmp_path}/x-sweep"
    found = [(p.config.optim.lr, p.config.ssl.threshold, p.config.run.seed) for p in planned]
    assert found == [(lr, tau, seed) for lr in (0.01, 0.03) for tau in (0.9, 0.95) for seed in (0, 1)]
    assert all(p.config.data.std == (0.2, 0.2, 0.2) for p in planned)
    assert len({p.config.run.dir for p in planned}) == 8
    assert planned[0].setting == "optim.lr=0.01 ssl.threshold=.9"


def test_what_cannot_be_planned_is_said_before_anything_trains():
    for overrides, part in ((["optim.lr=0.1,-1"], "optim.lr"), (["optim.lr=1,1"], "the same"),
                            (["run.seed=1"], "--seeds"), (["optim.l=1,2"], "unknown key")):
        with pytest.raises(ConfigError, match=part):
            sweep.plan("digits", [0], overrides)


def test_a_sweep_trains_skips_resumes_and_reports(tmp_path, capsys):
    arguments = ["sweep", "-c", "digits", "--seeds", "0-1", "--dir", str(tmp_path), "-o", *SHORT, "optim.lr=0.01,0.03"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "A seed draws the labeled images" in said
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [(entry["setting"], len(entry["runs"])) for entry in found["settings"]] == [
        ("optim.lr=0.01", 2), ("optim.lr=0.03", 2)]
    for entry in found["settings"]:
        results = [tmp_path / f"{entry['setting']}_seed={seed}/result.json" for seed in (0, 1)]
        last = [json.loads(path.read_text())["top1"]["ema"]["last"] for path in results]
        assert entry["top1"]["ema"]["last"]["mean"] == pytest.approx(sum(last) / 2)
        assert entry["top1"]["ema"]["last"]["deviation"] == pytest.approx(abs(last[0] - last[1]) / 2**0.5)
    assert (tmp_path / "sweep.md").read_text() in said
    assert "± " in (tmp_path / "report.html").read_text()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    (tmp_path / "optim.lr=0.03_seed=1/result.json").unlink()  # as if it had been stopped before its end
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("has ended already") == 3
    assert "resuming after step 1" in said
    assert sum(path.stat().st_mtime_ns == before for path, before in times.items()) == 3
    assert cli.main([*arguments, "optim.momentum=0.5"]) == 2
    assert "was trained with optim.momentum=0.9, now it is 0.5" in capsys.readouterr().err


class Killed(BaseException):
    """In the place of SIGKILL: nothing is saved when it is raised."""


def test_a_run_killed_before_its_first_checkpoint_leaves_no_second_folder(tmp_path, monkeypatch, capsys):
    arguments = ["sweep", "-c", "digits", "--seeds", "0-1", "--dir", str(tmp_path), "-o", *SHORT]
    train = run.train

    def kill():
        raise Killed

    def killed(config, resume):
        return train(config, resume, recorder=After(1, kill) if config.run.seed == 1 else None)
    monkeypatch.setattr(run, "train", killed)
    with pytest.raises(Killed):
        cli.main(arguments)
    assert not (tmp_path / "seed=1/checkpoints").exists()
    monkeypatch.setattr(run, "train", train)
    assert cli.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["seed=0", "seed=1"]
    lines = [json.loads(line) for line in (tmp_path / "seed=1/metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("eval", 1)]
    assert "no checkpoint to resume; starting at step 0" in capsys.readouterr().out


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    tried = []

    def train(config, resume):
        tried.append(config.run.seed)
        raise NonFinite("loss is nan at step 3")
    monkeypatch.setattr(run, "train", train)
    assert cli.main(["sweep", "-c", "digits", "--seeds", "0,1", "--dir", str(tmp_path)]) == 4
    assert tried == [0, 1]
    assert "0: failed, 1: failed" in (tmp_path / "sweep.md").read_text()
    assert "no number" in capsys.readouterr().err
