"""Kills at random moments cost no finished checkpoint and change no result; a long run does not grow.

docs/faults.md has the table of what was tried. `make test-long` runs the long versions.
"""

import itertools
import json
import multiprocessing
import os
import pathlib
import re
import signal
import time
from collections.abc import Iterable

import numpy as np
import pytest
from running import TINY, train_again

import fixmatch
from fixmatch import checkpoint, checkpoints
from fixmatch.checkpoint import Manifest
from fixmatch.monitor import Monitor


def times(few: int, many: int):
    return [few, pytest.param(many, marks=pytest.mark.long)]


def save_again_and_again(folder: pathlib.Path, steps: Iterable[int]) -> None:
    """What a trainer does after each evaluation, with arrays that are full of the step's number."""
    for step in steps:
        if checkpoint.exists(folder / "latest"):
            checkpoints.keep_latest(folder, step - 1)
        manifest = Manifest(step, {}, "digits", ("a",), (0.5,) * 3, (0.2,) * 3)
        checkpoint.save(folder / "latest", {"model/w": np.full(50_000, step, np.float32)}, manifest)
        checkpoints.drop_old(folder, step, 1)


@pytest.mark.parametrize("kills", times(8, 600))
def test_a_kill_while_a_checkpoint_is_written_costs_no_finished_one(tmp_path, kills):
    rng, last, file = np.random.default_rng(kills), -1, tmp_path / "latest/checkpoint.json"
    for _ in range(kills):
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = os.fork()
        if process == 0:
            save_again_and_again(tmp_path, itertools.count(last + 1))
        while not file.exists() or file.stat().st_mtime_ns == before:  # until one is saved
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))  # in the midst of the next ones
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        saved, fallback = checkpoints.newest(tmp_path)
        assert fallback == ""
        assert saved.manifest.step > last
        assert (saved.arrays["model/w"] == saved.manifest.step).all()
        last = saved.manifest.step
    save_again_and_again(tmp_path, [last + 1])  # what killed processes left is cleared away by the next that saves
    left = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*"))
    assert len(list(tmp_path.glob("latest/*"))) == 2
    # step-N may hold arrays of a save that was cut off beside its own, and goes with them
    assert sorted({re.sub("arrays-.*safetensors", "arrays", name) for name in left}) == [
        "latest/arrays", "latest/checkpoint.json", f"step-{last}/arrays", f"step-{last}/checkpoint.json"]


@pytest.mark.parametrize("kills", [pytest.param(200, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path, kills):
    """In processes forked from one that has loaded everything, so that a kill takes a second."""
    rng, processes = np.random.default_rng(kills), multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fixmatch.run", "visualdl"])
    settings = f"train.total_steps={8 * kills}", "train.eval_every=2", "run.log_every=3", "data.split_seed=1"
    saved = tmp_path / "killed/checkpoints/latest/checkpoint.json"

    def start(name: str):
        process = processes.Process(target=train_again, args=(f"run.dir={tmp_path}/{name}", *settings))
        process.start()
        return process
    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0
    for _ in range(kills):
        before, process = saved.stat().st_mtime_ns if saved.exists() else 0, start("killed")
        if rng.random() < 0.8:  # once it has gone further, else while it starts
            while process.is_alive() and (not saved.exists() or saved.stat().st_mtime_ns == before):
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(process.pid, rng.choice([signal.SIGKILL, signal.SIGTERM]))
        process.join()
    last = start("killed")
    last.join()
    assert last.exitcode == 0
    found, expected = (checkpoint.load(tmp_path / name / "checkpoints/latest") for name in ("killed", "whole"))
    assert found.arrays.keys() == expected.arrays.keys()
    assert all(np.array_equal(a, found.arrays[name]) for name, a in expected.arrays.items())
    assert found.manifest.history == expected.manifest.history
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("killed", "whole")]
    for one, other in zip(*lines, strict=True):
        assert {key for key in other if one[key] != other[key]} <= {"time", "images_per_second", "data_wait"}


@pytest.mark.parametrize("steps", [pytest.param(20_000, marks=pytest.mark.long)])
def test_a_long_run_does_not_grow(tmp_path, monkeypatch, steps):
    """Resident memory, handles, threads and the time of a step, after a tenth of the run and at its end."""
    seen, right, started = [], Monitor.record, time.perf_counter()

    def record(self, step, *rest):
        right(self, step, *rest)
        if step % (steps // 100) == 0:
            status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
            seen.append([int(status["VmRSS"].split()[0]), len(os.listdir("/proc/self/fd")), int(status["Threads"]),
                         time.perf_counter() - started])
    monkeypatch.setattr(Monitor, "record", record)
    fixmatch.train(fixmatch.load_config("digits", [
        *TINY, f"run.dir={tmp_path}/run", f"train.total_steps={steps}", f"train.eval_every={steps // 100}",
        "run.log_every=50"]))
    memory, handles, threads, clock = np.array(seen).T
    assert np.median(memory[-10:]) < 1.01 * np.median(memory[10:20])
    assert handles[-1] <= handles[10]
    assert threads[-1] <= threads[10]
    assert np.median(np.diff(clock)[-30:]) < 1.2 * np.median(np.diff(clock)[10:40])
