"""Processes: what they inherit, how they are ended with all that they started, what they died of."""

import os
import signal
import subprocess
import sys
import time

import pytest
from running import ROOT, runs, tool_environment

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
    while runs(int(said)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_has_a_thread_cannot_be_copied():
    program = ("import threading; from fixmatch import process, selfcheck; selfcheck.load_machine_code()\n"
               "print(process.can_fork())  # what is loaded before a copy is made has started none\n"
               "threading.Thread(target=threading.Event().wait, daemon=True).start(); print(process.can_fork())")
    done = subprocess.run([sys.executable, "-c", program], env=tool_environment(), cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == [str(sys.platform == "linux"), "False"]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="where a process can be copied")


@on_linux
@pytest.mark.parametrize(("do", "code"), [
    (lambda: os._exit(7), 7), (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM), (lambda: 1 / 0, 1)])
def test_a_copy_says_what_it_ended_with(do, code, tmp_path):
    with open(tmp_path / "out", "w") as output:
        copy = process.Forked(do, {}, output, tmp_path)
        assert copy.wait(60) == copy.poll() == copy.returncode == code
    assert ("ZeroDivisionError" in (tmp_path / "out").read_text()) == (code == 1)


@on_linux
def test_a_copy_is_apart_from_what_it_copies(tmp_path):
    def do():
        print(dict(os.environ), os.getcwd(), os.getsid(0) == os.getpid(),
              signal.getsignal(signal.SIGINT) == signal.SIG_DFL, flush=True)
        os._exit(0)

    with open(tmp_path / "out", "w") as output:
        assert process.Forked(do, {"A": "b"}, output, tmp_path).wait(60) == 0
    assert (tmp_path / "out").read_text() == f"{{'A': 'b'}} {tmp_path} True True\n"


@on_linux
def test_a_copy_that_does_not_end_is_ended(tmp_path):
    with open(tmp_path / "out", "w") as output:
        copy = process.Forked(lambda: time.sleep(60), {}, output, tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            copy.wait(0.05)
        assert copy.poll() is None
        process.end(copy)
    assert copy.returncode == -signal.SIGKILL
    assert not runs(copy.pid)


def test_what_it_died_of():
    assert process.cause(-11) == "SIGSEGV"
    assert process.cause(1) == "exit code 1"
    assert process.cause(0xC0000005) == "exit code 0xC0000005"  # Windows' access violation
