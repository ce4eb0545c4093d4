"""Processes: what they inherit, how they are ended with all that they started, what they died of."""

import sys
import time

import psutil

from fixmatch import process


def test_a_process_is_no_rank_and_finds_the_packages(monkeypatch, tmp_path):
    for name in ("PADDLE_TRAINER_ID", "MASTER_ADDR", "FLAGS_selected_gpus"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "there")
    found = process.environment(tmp_path)
    assert not [name for name in found if name.startswith(("PADDLE_", "MASTER_", "FLAGS_selected_"))]
    assert found["PYTHONPATH"].split(":" if sys.platform != "win32" else ";") == [str(tmp_path), "there"]


def test_it_is_ended_with_all_that_it_started(tmp_path):
    program = ("import subprocess, sys, time\n"
               "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
               "print(child.pid, flush=True)\ntime.sleep(600)")
    with open(tmp_path / "out", "w+") as output:
        started = process.start(["-S", "-c", program], process.environment(), output)
        while not (said := (tmp_path / "out").read_text()).endswith("\n"):
            assert started.poll() is None
            time.sleep(0.01)
        process.end(started)
        process.end(started)  # once more does no harm
    assert started.returncode < 0 or sys.platform == "win32"
    deadline = time.monotonic() + 10  # a killed process that is no child of this one may take a moment to be gone
    while is_alive(int(said)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_it_died_of():
    assert process.cause(-11) == "SIGSEGV"
    assert process.cause(1) == "exit code 1"
    assert process.cause(0xC0000005) == "exit code 0xC0000005"  # Windows' access violation
