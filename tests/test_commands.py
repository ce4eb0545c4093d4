"""The commands as a user runs them: what they print, write, leave behind and return."""

import fcntl
import hashlib
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from cifar_archive import ARCHIVES, contents, write_archive
from running import ROOT, digits, tool_environment

from fixmatch import checkpoint, cli
from fixmatch.config import load_config
from fixmatch.data.sources.digits import load_digits
from fixmatch.data.split import load_split
from fixmatch.inputs import read_data
from fixmatch.signals import StopSignal

STEPS = 100


def lines_of(path: pathlib.Path) -> list[dict]:
    """metrics.jsonl, as strict JSON: NaN is none."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def arrays_of(run: pathlib.Path, which="latest") -> dict[str, np.ndarray]:
    return checkpoint.load(run / "checkpoints" / which).arrays


def assert_one_line(ran, code: int):
    assert ran.code == code, ran
    assert len(ran.stderr.splitlines()) == 1, ran.stderr
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def whole(place, run_tool):
    """A run of STEPS steps, never interrupted."""
    ran = run_tool("train", *digits("run.dir=whole", f"train.total_steps={STEPS}", "train.eval_every=40"), cwd=place)
    assert ran.code == 0, ran.stderr
    return place / "whole", ran


@pytest.fixture(scope="module")
def interrupted(place):
    """The same run, stopped by Ctrl-C after a few steps."""
    command = [sys.executable, ROOT / "tools/train.py",
               *digits("run.dir=broken", f"train.total_steps={STEPS}", "train.eval_every=40")]
    with subprocess.Popen([str(part) for part in command], cwd=place, env=tool_environment(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith("step 5/"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    shutil.copytree(place / "broken", place / "kept")
    return place / "kept", process.returncode, out, err


@pytest.fixture(scope="module")
def resumed(place, interrupted, run_tool):
    ran = run_tool("train", *digits("run.dir=broken", f"train.total_steps={STEPS}", "train.eval_every=40"), "--resume",
                   cwd=place)
    return place / "broken", ran


# --- a run


def test_a_run_leaves_the_files_it_promises(whole):
    run, ran = whole
    assert ran.stderr == ""
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "split.json", "train.log", "metrics.jsonl", "result.json",
                                               "vdl", "checkpoints"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "latest", "step-80"]
    assert list((run / "vdl").glob("vdlrecords*"))
    assert not list(run.rglob("*.tmp"))


def test_the_result_is_as_documented(whole):
    run, ran = whole
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == STEPS
    assert result["seconds"] > 0
    assert result["images_per_second"] >= STEPS * 20 / result["seconds"]  # without the evaluations
    evaluations = [line for line in lines_of(run / "metrics.jsonl") if line["kind"] == "eval"]
    for kind in ("raw", "ema"):
        top1 = [line[kind]["top1"] for line in evaluations]
        assert result["top1"][kind] == pytest.approx(
            {"last": top1[-1], "best": max(top1), "mean_last_20": np.mean(top1), "median_last_20": np.median(top1)})
    assert f"{result['top1']['ema']['last']:.2f}" in ran.stdout.splitlines()[-2]


def test_metrics_hold_every_step_and_evaluation(whole):
    lines = lines_of(whole[0] / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert train[0].keys() >= {"kind", "step", "loss", "loss_x", "loss_u", "mask", "lr", "images_per_second"}
    assert train[0]["lr"] == pytest.approx(0.03)
    assert train[-1]["lr"] == pytest.approx(0.03 * np.cos(7 * np.pi / 16 * (STEPS - 1) / STEPS))
    assert all(0 <= line["mask"] <= 1 for line in train)
    assert all(line["loss"] == pytest.approx(line["loss_x"] + line["loss_u"], rel=1e-5) for line in train)
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [40, 80, 100]
    for kind in ("raw", "ema"):
        assert 0 <= evaluations[0][kind]["top1"] <= evaluations[0][kind]["top5"] <= 100


def test_the_run_can_be_repeated_from_its_own_files(whole):
    run, _ = whole
    config = load_config(run / "config.yaml")
    assert (config.run.dir, config.model.depth, config.train.total_steps) == ("whole", 10, STEPS)
    split = load_split(run / "split.json", "digits", load_digits().train.labels, 40)
    assert split.sha256() == json.loads((run / "result.json").read_text())["split_sha256"]


def test_the_best_checkpoint_is_of_the_best_evaluation(whole):
    run, _ = whole
    evaluations = [line for line in lines_of(run / "metrics.jsonl") if line["kind"] == "eval"]
    best = max(evaluations, key=lambda line: line["ema"]["top1"])
    assert checkpoint.load(run / "checkpoints/best").manifest.step == best["step"]
    assert checkpoint.load(run / "checkpoints/latest").manifest.step == STEPS


def test_it_learns(whole):
    lines = [line for line in lines_of(whole[0] / "metrics.jsonl") if line["kind"] == "train"]
    assert np.mean([line["loss_x"] for line in lines[-20:]]) < 0.8 * np.mean([line["loss_x"] for line in lines[:20]])


def test_eval_prints_the_numbers_of_the_log(whole, run_here, place):
    run, _ = whole
    ran = run_here("eval", run, "--json", place / "eval.json", cwd=place)
    assert (ran.code, ran.stderr) == (0, "")
    logged = [line for line in (run / "train.log").read_text().splitlines() if line.startswith(f"eval {STEPS}/")][-1]
    figures = re.search(r"EMA top-1 .*?loss [\d.]+  \|  raw top-1 .*?loss [\d.]+", logged).group()
    assert figures in ran.stdout
    found, last = (json.loads(file.read_text()) for file in (place / "eval.json", run / "evaluation.json"))
    last = last["last"]
    assert np.sum(last["ema"]["confusion"]) == 500  # every test image
    assert {kind: found[kind] for kind in ("raw", "ema")} == {kind: last[kind] for kind in ("raw", "ema")}


# --- interruption and resume


def test_ctrl_c_saves_a_checkpoint(interrupted):
    run, code, out, err = interrupted
    assert (code, err) == (130, "")
    step = checkpoint.load(run / "checkpoints/latest").manifest.step
    assert 5 <= step < STEPS
    assert f"interrupted after step {step}" in out
    assert not (run / "result.json").exists()


def test_a_resumed_run_ends_in_exactly_the_same_weights(whole, resumed):
    run, ran = resumed
    assert (ran.code, ran.stderr) == (0, "")
    expected, found = arrays_of(whole[0]), arrays_of(run)
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not np.array_equal(expected[name], found[name])]


def test_a_resumed_run_logs_every_step_once_and_the_same(whole, resumed):
    def figures(run):
        return [{key: line.get(key) for key in ("kind", "step", "loss", "mask", "lr", "raw", "ema")}
                for line in lines_of(run / "metrics.jsonl")]
    assert figures(resumed[0]) == figures(whole[0])


def test_resume_with_other_settings_or_without_its_split_is_refused(whole, capsys, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    for override in ("optim.lr=0.01", "model.width=2", "run.seed=1", "ssl.threshold=0.9"):
        key, value = override.split("=")
        arguments = digits(f"run.dir={run}", f"train.total_steps={STEPS}", override)
        assert cli.main(["train", *map(str, arguments), "--resume"]) == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        assert key in message
        assert value in message
    (run / "split.json").unlink()
    assert cli.main(["train", *map(str, digits(f"run.dir={run}", f"train.total_steps={STEPS}")), "--resume"]) == 2
    assert "split.json" in capsys.readouterr().err


def test_resume_with_fewer_steps_than_are_done_is_refused(whole, capsys, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    assert cli.main(["train", *map(str, digits(f"run.dir={run}", "train.total_steps=50")), "--resume"]) == 2
    assert "train.total_steps" in capsys.readouterr().err


def test_resume_after_the_end_changes_nothing(whole, place, run_here, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    ran = run_here("train", *digits(f"run.dir={run}", f"train.total_steps={STEPS}", "train.eval_every=40"), "--resume",
                   cwd=place)
    assert (ran.code, ran.stderr) == (0, "")
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (whole[0], run))
    assert before["top1"] == after["top1"]
    assert lines_of(run / "metrics.jsonl") == lines_of(whole[0] / "metrics.jsonl")


def test_resume_up_to_the_step_reached_evaluates_there(interrupted, place, run_here, tmp_path):
    run = shutil.copytree(interrupted[0], tmp_path / "run")
    step = checkpoint.load(run / "checkpoints/latest").manifest.step
    arguments = *digits(f"run.dir={run}", f"train.total_steps={step}", "train.eval_every=40"), "--resume"
    for _ in range(2):  # once is enough
        ran = run_here("train", *arguments, cwd=place)
        assert (ran.code, ran.stderr) == (0, "")
        result, lines = json.loads((run / "result.json").read_text()), lines_of(run / "metrics.jsonl")
        evaluations = [line for line in lines if line["kind"] == "eval"]
        assert [line["step"] for line in evaluations] == [step]
        assert result["top1"]["ema"]["last"] == evaluations[0]["ema"]["top1"]
        assert checkpoint.load(run / "checkpoints/best").manifest.step == step


def test_resume_says_another_length_and_refuses_another_number_of_ranks(whole, place, run_here, tmp_path, capsys):
    run = shutil.copytree(whole[0], tmp_path / "run")
    arguments = *digits(f"run.dir={run}", f"train.total_steps={STEPS + 1}"), "--resume"
    assert f"train.total_steps: was {STEPS}, now {STEPS + 1};" in run_here("train", *arguments, cwd=place).stdout
    manifest = run / "checkpoints/latest/checkpoint.json"
    manifest.write_text(json.dumps(checkpoint.sealed(json.loads(manifest.read_text()) | {"world_size": 4})))
    assert cli.main(["train", *map(str, arguments)]) == 2
    assert "by 4 processes, now there are 1" in capsys.readouterr().err


def test_without_any_stream_it_trains_all_the_same(tmp_path):
    arguments = " ".join(map(str, digits("run.dir=run", "train.total_steps=2")))
    done = subprocess.run(f"{sys.executable} {ROOT}/tools/train.py {arguments} <&- >&- 2>&-", shell=True, cwd=tmp_path,
                          env=tool_environment(), check=False)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 2


def test_launchers_may_repeat_their_signal():
    stop = StopSignal()
    for _ in range(3):
        stop(signal.SIGTERM, None)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


# --- the run folder


def test_a_second_run_moves_the_first_aside_and_supervised_only_trains(place, run_here):
    arguments = digits("run.dir=twice", "train.total_steps=3", "train.eval_every=2", "ssl.mode=none")
    first, second = run_here("train", *arguments, "--resume", cwd=place), run_here("train", *arguments, cwd=place)
    assert (first.code, first.stderr, second.code, second.stderr) == (0, "", 0, "")
    assert "no checkpoint to resume" in first.stdout
    assert "twice.1" in second.stdout
    assert arrays_of(place / "twice.1").keys() == arrays_of(place / "twice").keys()
    assert all(np.array_equal(a, arrays_of(place / "twice.1")[name]) for name, a in arrays_of(place / "twice").items())
    train = [line for line in lines_of(place / "twice/metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3]
    assert all(line["loss"] == line["loss_x"] and not line.keys() & {"mask", "loss_u"} for line in train)
    assert not any(word in first.stdout for word in ("mask", "loss_u", "unlabeled"))


def test_a_folder_in_use_is_refused(whole, capsys):
    run, _ = whole
    before = sorted(run.rglob("*"))
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["train", *map(str, digits(f"run.dir={run}"))]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "another process" in message
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.tex", tmp_path / "thesis.tex/run"):
        assert cli.main(["train", *map(str, digits(f"run.dir={target}"))]) == 2
        assert str(target) in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.tex"]
    (tmp_path / "config.yaml").write_text("of: something else")
    assert cli.main(["train", *map(str, digits(f"run.dir={tmp_path}"))]) == 2
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "thesis.tex"]


@pytest.mark.long
def test_a_run_in_the_working_directory_is_moved_aside(tmp_path, run_here):
    (tmp_path / "run").mkdir()
    for _ in range(2):
        ran = run_here("train", *digits("run.dir=.", "train.total_steps=1"), cwd=tmp_path / "run")
        assert (ran.code, ran.stderr) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"]
    assert all((tmp_path / name / "result.json").exists() for name in ("run", "run.1"))


# --- what cannot be done


def _truncated(root):
    path = write_archive(root, contents())
    path.write_bytes(path.read_bytes()[:-5000])


def _hostile(root):
    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {root}/ran",)
    write_archive(root, contents() | {"test_batch": pickle.dumps({b"data": Touch()}, 2)})


CIFAR = ("data.name=cifar10", "data.download=false", "data.root=there")


@pytest.mark.parametrize(("prepare", "overrides", "said"), [
    (None, ["ssl.treshold=0.9"], "did you mean ssl.threshold"),
    (None, CIFAR, "data.download is false"),
    (_truncated, CIFAR, "damaged"),
    (_hostile, CIFAR, "refused"),
    (None, ["data.num_labeled=41"], "nearest: 40"),
    (lambda root: write_archive(root, contents()), [*CIFAR, "data.num_labeled=41"], "nearest: 40"),
])
def test_exit_2_one_line_and_nothing_left_behind(tmp_path, run_here, prepare, overrides, said):
    if prepare:
        prepare(tmp_path / "there")
    before = sorted(tmp_path.rglob("*"))
    ran = run_here("train", *digits(*overrides), cwd=tmp_path)
    assert_one_line(ran, 2)
    assert said in ran.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [
    ["-c", "nowhere.yaml"],
    ["-c", "no\nwhere.yaml"],
    ["-c", ROOT / "configs/digits.yaml", "-o", "trai\nn.mu=3"],
    ["-c", ROOT / "configs/digits.yaml", "-o", "data.split_file=none.json"],
    ["-c", ROOT / "configs/digits.yaml", "-o", "runtime.device=gpu"],
    ["-c", ROOT / "configs/digits.yaml", "-o", "parity.enabled=false", "data.root=" + "x" * 300, "data.name=cifar10"],
], ids=lambda arguments: str(arguments[-1])[:30])
def test_other_bad_input_is_one_line_and_leaves_nothing(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *map(str, arguments)]) in (1, 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_more_memory_than_there_is_is_one_line(tmp_path, capsys):
    assert cli.main(["train", *map(str, digits(f"run.dir={tmp_path}/run", "train.batch_size=100000000000"))]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["-c"], ["-c", "x.yaml", "--bogus"]])
def test_wrong_usage_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *arguments])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_eval_of_what_is_no_checkpoint(tmp_path, whole, capsys):
    assert cli.main(["eval", str(tmp_path)]) == 2
    run = shutil.copytree(whole[0], tmp_path / "run")
    arrays = next((run / "checkpoints/latest").glob("arrays-*"))
    arrays.write_bytes(arrays.read_bytes()[:-1])
    assert cli.main(["eval", str(run)]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 2
    assert "damaged" in messages[1]


@pytest.mark.parametrize("key", ["config", "mean", "step"])
def test_eval_of_a_manifest_without_what_it_needs(tmp_path, whole, capsys, key):
    run = shutil.copytree(whole[0], tmp_path / "run")
    manifest = run / "checkpoints/latest/checkpoint.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(checkpoint.sealed({k: v for k, v in content.items() if k != key})))
    assert cli.main(["eval", str(run)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("key", "value"), [("config", []), ("classes", 5), ("mean", "x"), ("std", [1]), ("step", {})])
def test_eval_of_a_manifest_with_what_it_cannot_use(tmp_path, whole, capsys, key, value):
    run = shutil.copytree(whole[0], tmp_path / "run")
    manifest = run / "checkpoints/latest/checkpoint.json"
    manifest.write_text(json.dumps(checkpoint.sealed(json.loads(manifest.read_text()) | {key: value})))
    assert cli.main(["eval", str(run)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"'{key}' cannot be {value!r}" in error


@pytest.fixture(scope="module")
def diverged(place, run_tool):
    settings = "run.dir=nan", "train.total_steps=20", "train.eval_every=1", "optim.lr=1e30"
    return place / "nan", run_tool("train", *digits(*settings), cwd=place)


def test_a_loss_that_is_no_number_stops_the_run(diverged):
    run, ran = diverged
    assert_one_line(ran, 4)
    assert re.search(r"loss\w* is (nan|inf) at step \d+", ran.stderr)
    failed = int(re.search(r"at step (\d+)", ran.stderr).group(1))
    saved = checkpoint.load(run / "checkpoints/latest")
    assert saved.manifest.step == failed - 1
    assert f"from step {failed - 1}" in ran.stderr
    assert all(np.isfinite(a).all() for a in saved.arrays.values())
    assert not (run / "result.json").exists()


def test_what_a_diverged_run_logged_is_still_json(diverged):
    assert lines_of(diverged[0] / "metrics.jsonl")


def test_a_full_disk_leaves_the_last_checkpoint(whole, run_tool, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    arguments = digits(f"run.dir={run}", f"train.total_steps={STEPS + 5}", "train.eval_every=40")
    ran = run_tool("train", *arguments, "--resume", cwd=tmp_path, preexec_fn=limit)
    assert_one_line(ran, 1)
    assert re.search(r"/checkpoints/\w+/arrays-\w+.safetensors: File too large", ran.stderr)
    saved = checkpoint.load(run / "checkpoints/latest")
    assert saved.manifest.step == STEPS
    assert not list(run.rglob("*.tmp"))


# --- other data, other processes


@pytest.mark.parametrize(("override", "flip"), [("augment.flip=null", False), ("augment.flip=true", True)])
def test_mirroring_is_the_data_sets_own_or_the_users(override, flip):
    assert read_data(load_config(ROOT / "configs/digits.yaml", [override])).flip is flip


def test_a_run_on_cifar_files(tmp_path, run_here):
    write_archive(tmp_path / "there", contents())
    ran = run_here("train", *digits(*CIFAR, "data.num_labeled=10", "train.total_steps=2", "run.dir=run"), cwd=tmp_path)
    assert (ran.code, ran.stderr) == (0, "")
    assert np.sum(json.loads((tmp_path / "run/evaluation.json").read_text())["last"]["ema"]["confusion"]) == 20


def test_a_run_on_real_cifar10(tmp_path, run_tool, real_cifar10):
    digest = hashlib.md5((real_cifar10 / ARCHIVES["cifar10"]).read_bytes()).hexdigest()
    ran = run_tool("train", *digits(*CIFAR[:2], f"data.root={real_cifar10}", "train.total_steps=2", "run.dir=run"),
                   cwd=tmp_path)
    assert (ran.code, ran.stderr) == (0, "")
    assert hashlib.md5((real_cifar10 / ARCHIVES["cifar10"]).read_bytes()).hexdigest() == digest


def test_two_ranks_end_as_one(tmp_path):
    """Under Paddle's launcher, with gloo: one run folder, one log line a step, and a proof that holds for both."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo",
               ROOT / "tools/train.py", *digits("train.total_steps=3", "train.eval_every=2", "run.dir=run",
                                                "parity.enabled=true")]
    environment = tool_environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 3
    lines = lines_of(tmp_path / "run/metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("run")] == ["run"]
    said = (tmp_path / "run/train.log").read_text()
    assert all(f"{what}: PARITY PASS" in said for what in ("self-check", "first steps"))
