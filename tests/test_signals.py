"""Signals, readers that leave and threads that fail: one line, the right code, and nothing left running."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest
from running import ROOT, TINY, runs, tool_environment

import fixmatch
from fixmatch import cli, run, selfcheck
from fixmatch.data.loader import Loader
from fixmatch.log import LOGGER, printable, shown
from fixmatch.signals import stop_signal


class HangUp:
    """In the place of a recorder: the terminal is closed in the middle of the second step."""

    count, done = 0, False

    def before(self, *_):
        pass

    def after(self, *_):
        self.count += 1
        if self.count == 2:
            self.done = True
            signal.raise_signal(signal.SIGHUP)


def arguments(folder, *overrides):
    return ["-c", "digits", "-o", *TINY, f"run.dir={folder}/run", "train.total_steps=9", *overrides]


def test_a_terminal_that_is_closed_saves_a_checkpoint(tmp_path):
    with pytest.raises(run.Interrupted, match="interrupted after step 2; checkpoint saved"):
        fixmatch.train(fixmatch.load_config("digits", arguments(tmp_path)[3:]), recorder=HangUp())


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_that_comes_back_from_paddle_as_another_error_is_an_interrupt():
    def fail(signals: int):
        with stop_signal():
            try:
                for _ in range(signals):
                    signal.raise_signal(signal.SIGINT)
            finally:
                raise OSError("(External) at eager_functions.cc") from None
    for signals in (0, 1):
        with pytest.raises(OSError, match="External"):
            fail(signals)
    with pytest.raises(KeyboardInterrupt):
        fail(2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_whose_exception_is_lost_ends_the_run_before_its_first_step(number, tmp_path, monkeypatch, capsys):
    """As in numba's compiler, out of whose callbacks no exception comes."""
    lost, read = [], run.read_inputs
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    callback = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(number))

    def interrupted(*rest):
        callback()
        return read(*rest)

    monkeypatch.setattr(run, "read_inputs", interrupted)
    before = signal.getsignal(number)
    assert cli.main(["train", *arguments(tmp_path)]) == 130
    assert len(lost) == 1
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert signal.getsignal(number) is before
    with stop_signal() as stop:  # the next run begins afresh
        assert not stop.requested


# a file that the signal catches between its opening and its with block is closed by the garbage collector, which warns
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_during_the_self_check_ends_it_at_once(number, tmp_path, monkeypatch, capsys):
    (tmp_path / "root/parity").mkdir(parents=True)
    (tmp_path / "root/parity/__init__.py").touch()
    (tmp_path / "root/parity/__main__.py").write_text(
        f"import os, time; os.fork(); open('{tmp_path}/pid-' + str(os.getpid()), 'w'); time.sleep(600)")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(selfcheck, "_ROOT", tmp_path / "root")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def send():
        while len(list(tmp_path.glob("pid-*"))) < 2:
            if done.wait(0.05):
                return
        os.kill(os.getpid(), number)
    done = threading.Event()
    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert cli.main(["train", *arguments(tmp_path, "parity.enabled=true")]) == 130
    finally:
        done.set()
        sender.join()
    assert capsys.readouterr().err == "error: interrupted\n"
    assert list((tmp_path / "scratch").iterdir()) == []
    patience = time.monotonic() + 10
    while any(runs(int(file.name[4:])) for file in tmp_path.glob("pid-*")):
        assert time.monotonic() < patience
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="the self-check is no copy of the training")
def test_a_training_that_is_killed_takes_its_self_check_with_it(tmp_path):
    environment = tool_environment() | {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, ROOT / "tools/train.py", *arguments(tmp_path, "parity.enabled=true")]
    training = subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    patience, copies = time.monotonic() + 60, []
    while len(copies) < 2:
        assert training.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.01)
        copies = psutil.Process(training.pid).children(recursive=True)
    training.kill()
    training.wait()
    patience = time.monotonic() + 20
    while any(runs(copy.pid) for copy in copies):
        assert time.monotonic() < patience
        time.sleep(0.01)


@pytest.fixture
def without_reader():
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream  # at the end it is closed, which would raise what Python says at its exit


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_command_whose_reader_leaves_is_quiet(without_reader, monkeypatch, capsys, size):
    """Whether the pipe breaks while it prints, or when the rest is flushed at its end."""
    def list_much():
        print("x" * size)
        return 0
    monkeypatch.setattr(sys, "stdout", without_reader)
    assert cli.guarded(list_much) == 1
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_without_its_reader(without_reader, monkeypatch):
    monkeypatch.setattr(sys, "stdout", without_reader)
    with shown():
        for _ in range(3):
            LOGGER.info("step 1")


def test_a_loader_thread_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    right = Loader.batch

    def batch(self, step):
        if step == 3:
            raise IndexError("index 7 is out of bounds\nfor axis 0")
        return right(self, step)
    monkeypatch.setattr(Loader, "batch", batch)
    assert cli.main(["train", *arguments(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert err == ("error: the batch of step 4 could not be made (IndexError: index 7 is out of bounds for axis 0); "
                   "train.log has the traceback\n")
    assert "Traceback" not in out
    assert "Traceback" in (tmp_path / "run/train.log").read_text()


def test_what_cannot_be_printed_is_escaped(capsys):
    assert printable("caf\u00e9\n\x1b[31m\u202e") == "caf\u00e9\\n\\x1b[31m\\u202e"
    assert cli.fail("a\nb\x1b]0;x\x07", 2) == 2
    assert capsys.readouterr().err == "error: a\\nb\\x1b]0;x\\x07\n"
    with shown():
        LOGGER.info("two\nlines \x1b[2J")
    assert capsys.readouterr().out == "two\nlines \\x1b[2J\n"
