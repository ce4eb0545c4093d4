"""A second process that does its share: nothing of it is lost, and its end is noticed."""

import json
import multiprocessing.context
import os
import subprocess
import sys
import time

import generators
import pytest
from running import ROOT, runs, tool_environment

from fixmatch.data import DataError
from parity import goldens, prove, second_process, stages
from parity.compare import Row
from parity.second_process import Died, Turns, in_second_process

SHARE = """
import sys
from fixmatch import process
from parity import case, cli
assert process.can_fork() == (sys.platform == "linux")
case._LARGE = float(sys.argv[1])
sys.exit(cli.main(["--self-check", "--processes", "2", *sys.argv[2:]]))
"""
ON_TINY = ["-o", "model.depth=10", "model.width=4", "--json"]


def check(tmp_path, *arguments, large: float) -> tuple[int, dict]:
    """A self-check of two processes in a fresh one; networks of more than `large` weights are taken for large."""
    file = tmp_path / "parity.json"
    done = subprocess.run([sys.executable, "-c", SHARE, str(large), *arguments, *ON_TINY, str(file)],
                          cwd=ROOT, env=tool_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert file.exists(), done.stderr
    return done.returncode, json.loads(file.read_text())


@pytest.mark.parametrize("large", [pytest.param(5e6, marks=pytest.mark.long), 3e5])
def test_two_processes_do_all_of_the_self_check(large, tmp_path):
    code, found = check(tmp_path, large=large)
    assert code == 0, found["verdict"]
    left_out = ("scaler", *(stages.ABOUT_FILES if large == 3e5 else ()))
    assert [stage["stage"] for stage in found["stages"]] == [n for n in stages.SELF_CHECK if n not in left_out]
    backward = next(stage for stage in found["stages"] if stage["stage"] == "backward")
    assert (backward["tensors"] > 60) == (large == 3e5)  # of a large network and of the small one, which has 55


@pytest.mark.long
@pytest.mark.parametrize(("plant", "stage", "large"), [
    ("weight-decay-on-bn", "optimizer", 3e5), ("conv-weight-gradient-1x1-zero", "operators", 5e6),
    ("residual-missing", "forward", 3e5)])
def test_a_fault_is_named_by_whichever_process_sees_it(plant, stage, large, tmp_path):
    code, found = check(tmp_path, "--plant", plant, large=large)
    failed = [each for each in found["stages"] if each["verdict"] == "fail"]
    assert code == 1
    assert stage in {each["stage"] for each in failed}
    named = next(each for each in failed if each["first_divergence"]["tensor"] in found["verdict"])
    assert named["stage"] == stage


SOME = """
import sys
from parity import cli, stages
whole = stages.stages
some = ("config", "operators", "backward", "convert")
stages.stages = lambda *args, **more: {name: stage for name, stage in whole(*args, **more).items() if name in some}
sys.exit(cli.main(["--processes", "2", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("plant", "named"), [("conv-weight-gradient-1x1-zero", "operators"),
                                              pytest.param("mask-after-mean", "backward", marks=pytest.mark.long)])
def test_two_processes_do_all_stages(plant, named, tmp_path):
    """In the order of the table; a fault is named by the stage that sees it, in whichever process."""
    pytest.importorskip("torch")
    file = tmp_path / "parity.json"
    done = subprocess.run([sys.executable, "-c", SOME, "--plant", plant, "--json", str(file)], cwd=ROOT,
                          env=tool_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(file.read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["config", "operators", "backward", "convert"]
    failed = {stage["stage"] for stage in found["stages"] if stage["verdict"] == "fail"}
    assert named in failed
    tensor = next(stage["first_divergence"]["tensor"] for stage in found["stages"] if stage["stage"] == named)
    assert tensor in found["verdict"]


def test_it_goes_on_while_nobody_reads(tmp_path):
    done, patience = tmp_path / "done", time.monotonic() + 120
    with in_second_process(generators.counts, 5, 1 << 20, done) as second:
        while not done.exists():
            assert time.monotonic() < patience
            time.sleep(0.02)
        assert [number for number, _ in second] == [0, 1, 2, 3, 4]


def test_what_it_raises_is_raised_here():
    with in_second_process(generators.finds_a_damaged_file) as second:
        assert next(second) == 1
        with pytest.raises(DataError, match="damaged"):
            next(second)


@pytest.mark.parametrize("generator", [generators.dies, pytest.param(generators.cut_off, marks=pytest.mark.skipif(
    sys.platform == "win32", reason="writes to the pipe as POSIX does"))])
def test_its_death_is_noticed(generator):
    with in_second_process(generator) as second:
        assert next(second) == 1
        with pytest.raises(Died, match=r"SIGABRT|exit code"):
            next(second)


def test_it_does_not_outlive_the_block():
    with in_second_process(generators.never_ends) as second:
        pid = next(second)
        assert runs(pid)
    assert not runs(pid)


def test_what_it_has_started_does_not_outlive_the_block():
    with in_second_process(generators.starts_another) as second:
        pid = next(second)
        assert runs(pid)
    assert not runs(pid)


def passed(name: str, tensor: str) -> stages.StageResult:
    return stages.StageResult(name, "float32", "train", [Row(tensor, 0.0, 0.0, True)])


@pytest.mark.parametrize("delivered", [("first",), ("second",), ("first", "second")])
def test_what_a_process_has_not_delivered_has_not_passed(delivered, monkeypatch):
    """Nor is a side that nobody has asked for a result, as where production raises before the large network."""
    pytest.importorskip("torch")
    case, every = goldens.CASES["wideresnet-28-8"], stages.stages(thorough=False)
    first = [passed(name, "its") for name in stages.of_self_check("first", case)
             if name != "operators" or "first" in delivered]
    second = [[("step 0 losses", {})], *([passed("operators", "other")] if "second" in delivered else [])]
    monkeypatch.setattr(prove, "_share", lambda part, *_: iter(first))
    report = prove.self_check(case, every, True, iter(second))
    assert sorted(result.stage for result in report.results) == sorted(stages.of_self_check("all", case))
    failed = [result.stage for result in report.results if not result.passed]
    assert failed == ([] if len(delivered) == 2 else ["operators"])
    if not failed:
        shared = next(result for result in report.results if result.stage == "operators")
        assert [row.tensor for row in shared.rows] == ["other", "its"]


def test_of_a_stage_that_two_processes_share_the_first_fault_is_named():
    wrong = Row("conv2d 1x1 64->256, 5x9x6/weight gradient", 1.0, 1.0, False)
    first, second = passed("operators", "late"), passed("operators", "early")
    late = wrong._replace(tensor="conv2d 1x1 512->1024, 5x9x6/weight gradient")
    for result, row in ((first, late), (second, wrong)):
        result.rows.append(row)
        result.first_divergence = row
    one, = stages.merged([first, second])
    assert [row.passed for row in one.rows] == [True, False, True, False]
    assert one.first_divergence is wrong
    assert not one.passed
    assert "backward pass of this operator" in one.hint


def test_turns_are_taken_once_from_both_ends():
    """By two processes at the same time, and by one alone whose other has none left."""
    turns, mine = Turns(), []
    with in_second_process(generators.takes, turns, 400) as second:
        mine += turns.from_back(400)
        theirs = list(second)
    assert sorted(mine + theirs) == list(range(400))
    assert theirs == sorted(theirs)
    assert mine == sorted(mine, reverse=True)
    assert list(turns.from_front(400)) == list(turns.from_back(400)) == []
    assert list(Turns().from_back(3)) == [2, 1, 0]


def test_who_has_died_with_a_turn_in_hand_stops_nobody(monkeypatch):
    monkeypatch.setattr(second_process, "_PATIENCE", 0.1)
    turns = Turns()
    with in_second_process(generators.keeps, turns._taken.get_lock()) as second:
        assert next(second) == "kept"
    assert list(turns.from_back(3)) == []


def test_without_semaphores_the_second_process_takes_all_turns(monkeypatch):
    def none_left(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Array", none_left)
    turns = Turns()
    assert list(turns.from_back(3)) == []
    assert list(turns.from_front(3)) == [0, 1, 2]


FIRST_DIES = """
import os
import generators
from parity.second_process import in_second_process
with in_second_process(generators.endless, 1 << 20) as second:
    print(next(second), flush=True)
    os.abort()
"""


def test_it_does_not_outlive_the_first_process():
    done = subprocess.run([sys.executable, "-c", FIRST_DIES], cwd=ROOT, env=tool_environment() | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])},
        capture_output=True, text=True, timeout=120, check=False)
    assert "BrokenPipe" not in done.stderr
    pid, patience = int(done.stdout.split()[0]), time.monotonic() + 30
    while runs(pid):
        assert time.monotonic() < patience
        time.sleep(0.02)
