"""Stage ranks: two processes that train together, the bugs that only they show, and processes that fail."""

import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from running import ROOT, first_of
from safetensors.numpy import load_file

from parity import launch, plants, ranks, ranks_worker
from parity.case import IDLE, small_case
from parity.plants import score
from parity.plants.ranks import PLANTS
from parity.small_run import small_source

# The first row that fails under each plant.
CAUGHT_BY = {
    "ranks-policy-of-own-images": "equal on all ranks: batch statistics step 0 thresholds/",
    "ranks-gradients-not-averaged": "equal on all ranks: batch statistics step 0 gradients/",
    "ranks-gradients-summed": "whole batch: constant statistics step 0 gradients/",
    "ranks-first-half-averaged": "equal on all ranks: batch statistics step 0 gradients/",
    "ranks-decayed-group-averaged": "equal on all ranks: batch statistics step 0 gradients/",
    "ranks-averaged-in-float16": "whole batch: constant statistics step 0 gradients/",
    "ranks-gradients-of-rank-0": "whole batch: constant statistics step 0 gradients/",
    "ranks-weights-averaged-instead": "equal on all ranks: batch statistics step 0 gradients/",
    "ranks-every-other-step": "equal on all ranks: batch statistics step 0 gradients/",
    "ranks-average-before-step": "equal on all ranks: batch statistics step 0 average/",
    "ranks-start-apart": "equal on all ranks: batch statistics step 0 start/",
    "ranks-same-share": "share of step 0/targets_x",
    "ranks-stop-of-this-rank": "rank 0 anywhere/flags",
    "ranks-stop-of-rank-0": "rank 0 anywhere/flags",
    "ranks-stop-of-all": "rank 0 anywhere/flags",
    "ranks-gather-float32": "rank 0 gather/float64",
    "ranks-own-part-first": "rank 1 gather/int64",
    "ranks-own-share-scored": "rank 0 evaluation/raw top1",
    "ranks-first-share-twice": "rank 0 evaluation/raw ",
    "ranks-last-share-dropped": "rank 0 evaluation/raw ",
    "ranks-shares-reversed": "rank 0 evaluation/raw ",
    "ranks-own-statistics": "rank 0 evaluation/raw ",
    "ranks-statistics-of-rank-1": "rank 0 evaluation/raw ",
    "ranks-statistics-averaged": "rank 0 evaluation/raw ",
    "ranks-checkpoint-of-each": "rank 1 of_rank_0/float64",
    "ranks-differences-unseen": "rank 0 difference/seen",
}


@pytest.fixture
def started(monkeypatch):
    """The processes that the stage starts."""
    found, popen = [], subprocess.Popen

    def record(*args, **options):
        found.append(popen(*args, **options))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", record)
    return found


def none_is_left(processes) -> bool:
    """Killed, or ended, and waited for."""
    return all(process.returncode is not None for process in processes) and not any(
        pathlib.Path(f"/proc/{process.pid}").exists() for process in processes)


@pytest.mark.parametrize("arch", first_of(["wideresnet", "resnext"], 1))
def test_clean_ranks_pass(arch, started):
    found = list(ranks.rows(small_case(arch, 0)))
    assert not [row.tensor for row in found if not row.passed]
    assert len(started) == 2
    assert none_is_left(started)
    whole = [row for row in found if row.tensor.startswith("whole batch")]
    parts = {row.tensor.split("/")[0].split()[-1] for row in whole}
    assert parts == {"gradients", "momentum", "weights", "average"}
    print(arch, "worst against the whole batch", max(row.relative for row in whole))


def test_every_plant_has_a_row_here():
    assert {plant.name for plant in PLANTS} == CAUGHT_BY.keys()
    assert {plant.stage for plant in PLANTS} == {"ranks"}


# A few of them: two processes are started for each. All of them: tools/parity.py --mutation-score.
SAMPLE = ("ranks-gradients-not-averaged", "ranks-gradients-summed", "ranks-start-apart", "ranks-stop-of-this-rank",
          "ranks-policy-of-own-images")


@pytest.mark.parametrize("name", first_of(SAMPLE, 1))
def test_a_plant_reaches_the_processes_and_is_caught(name):
    plant = plants.PLANTS[name]
    case = score.case_of(plant) if plant.settings else small_case("wideresnet", 0)
    with plants.planted(name):
        first = next(row for row in ranks.rows(case) if not row.passed)
    assert first.tensor.startswith(CAUGHT_BY[name]), first


def test_a_plant_is_named_only_while_it_is_in():
    assert plants.current is None
    with plants.planted("masked-mean"):
        assert plants.current == "masked-mean"
    assert plants.current is None


def test_one_process_alone_learns_from_the_whole_batch(monkeypatch):
    """The reference of the comparison: weights move by it, and parameters without a gradient stay out."""
    case = small_case("wideresnet", 0)
    config, source = ranks._short(case), small_source(case)
    loader = ranks.inputs.build_loader(config, source, ranks.inputs.choose_split(config, source))
    with ranks.precision("float64"):
        found = dict(ranks_worker.steps_on(config, source, [loader.batch(0), loader.batch(1)], "constant"))
    names = {name.split("/")[1] for name in found if " step 0 start/" in name}
    assert {name.split("/")[1] for name in found if " step 0 gradients/" in name} == names - {*IDLE}
    for name in sorted(names - {*IDLE}):
        start, after = (found[f"constant statistics step {step} start/{name}"] for step in (0, 1))
        assert start.dtype == np.float64
        assert (start != after).any(), name


def failing_row(case):
    row, = ranks.rows(case)
    assert not row.passed
    assert row.tensor == "ranks/finished"
    assert len(row.why.splitlines()) == 1
    return row


# seconds; in the longer ones both processes have ended
@pytest.mark.long
@pytest.mark.parametrize("between", [0.02, 6.0])
def test_processes_that_cannot_join_are_one_line(monkeypatch, started, between):
    """With a backend that this build of Paddle or this machine has not."""
    sleep = launch.time.sleep
    monkeypatch.setattr(launch, "time", types.SimpleNamespace(
        monotonic=launch.time.monotonic, sleep=lambda _: sleep(between)))
    environments = launch._environments
    monkeypatch.setattr(launch, "_environments", lambda: [
        environment | {"PADDLE_DISTRI_BACKEND": "no such backend"} for environment in environments()])
    assert "could not join through gloo" in failing_row(small_case("wideresnet", 0)).why
    assert len(started) == 4  # tried twice
    assert none_is_left(started)


@pytest.mark.long
def test_ranks_that_wait_for_each_other_are_ended(monkeypatch, started):
    """Rank 1 is told that there is another master, and rank 0 waits for it in vain."""
    environments = launch._environments

    def apart():
        one, other = environments()
        return [one, other | {"PADDLE_TRAINER_ID": "0", "PADDLE_TRAINER_ENDPOINTS": "127.0.0.1:1,127.0.0.1:2"}]

    monkeypatch.setattr(launch, "_environments", apart)
    monkeypatch.setattr(launch, "TO_JOIN", 6)
    assert "not done within 6 s" in failing_row(small_case("wideresnet", 0)).why
    assert none_is_left(started)


def test_a_rank_that_fails_takes_the_other_with_it(monkeypatch, started):
    write = ranks._write_task

    def damaged(folder, config, source):
        write(folder, config, source)
        (folder / "images.safetensors").write_bytes(b"damaged")

    monkeypatch.setattr(ranks, "_write_task", damaged)
    assert "SafetensorError" in failing_row(small_case("wideresnet", 0)).why
    assert len(started) == 2
    assert none_is_left(started)


@pytest.mark.long
def test_training_that_takes_too_long_is_ended(monkeypatch, started):
    monkeypatch.setattr(launch, "TIMEOUT", 2)
    row = failing_row(small_case("resnext", 0))
    assert "not done within 2 s" in row.why or "exit code 1" in row.why, row.why
    assert none_is_left(started)


def test_a_launcher_around_the_proof_is_not_joined(monkeypatch, tmp_path):
    """Under paddle.distributed.launch this process is a rank itself; those of the stage have a group of their own."""
    for name, value in {"PADDLE_TRAINER_ID": "3", "PADDLE_TRAINERS_NUM": "4", "PADDLE_MASTER": "10.0.0.1:1",
                        "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    found = list(launch._environments())
    assert [environment["PADDLE_TRAINER_ID"] for environment in found] == ["0", "1"]
    assert {environment["PADDLE_TRAINERS_NUM"] for environment in found} == {"2"}
    assert not any(name in environment for environment in found for name in ("PADDLE_MASTER", "MASTER_ADDR"))
    assert len({environment["PADDLE_CURRENT_ENDPOINT"] for environment in found}) == 2
    assert os.environ["PADDLE_TRAINER_ID"] == "3"


@pytest.mark.long
def test_the_ranks_are_given_different_images(tmp_path):
    """What the processes wrote down: the second batch is another part of one shuffled order."""
    case = small_case("wideresnet", 0)
    ranks._write_task(tmp_path, ranks._short(case), small_source(case))
    assert json.loads((tmp_path / "task.json").read_text())["plant"] is None
    launch.launch(ranks_worker.__name__, tmp_path)
    one, other = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    for name in ("x", "u_w", "u_s"):
        assert (one[f"batch 0/{name}"] != other[f"batch 0/{name}"]).any()
    assert one["anywhere/flags"].tolist() == other["anywhere/flags"].tolist() == [False, True, True, True]
    assert one["gather/int64"].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13], [14, 15]]


def test_neither_the_stage_nor_the_plants_load_torch():
    """Which is not installed everywhere, and which every rank would load."""
    code = "import sys, parity.ranks, parity.ranks_worker, parity.plants; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=False).returncode == 0
