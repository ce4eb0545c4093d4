"""Python in a process of its own, on any system: what it inherits, how it is ended, and what it died of."""

import contextlib
import ctypes
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import IO

import paddle
import psutil

ROOT = pathlib.Path(__file__).resolve().parent.parent  # where `fixmatch` and `parity` are found
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9  # of Linux' prctl.h and signal.h
_LAUNCHER = ("PADDLE_", "MASTER_", "FLAGS_selected_")  # variables that paddle.distributed.launch sets begin so


def environment(root: pathlib.Path = ROOT) -> dict[str, str]:
    """This process's, without what makes it a rank of a launched training, and with the packages in `root` first."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    return inherited | {"PYTHONPATH": path}


def start(arguments: list[str], variables: dict[str, str], output: IO, cwd: pathlib.Path | None = None
          ) -> subprocess.Popen:
    """Starts `python ARGUMENTS` with the environment `variables`; what it prints goes to the open file `output`.

    Ctrl-C on the terminal does not reach it: whoever started it ends it, with `end`.
    """
    return subprocess.Popen(  # noqa: S603
        [sys.executable, *arguments], cwd=cwd, env=variables, stdin=subprocess.DEVNULL, stdout=output,
        stderr=subprocess.STDOUT, start_new_session=True,  # which Windows has another word for
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))


def can_fork() -> bool:
    """Whether a copy of this process can go on where it is, which saves importing Paddle again.

    No thread may be running, and Paddle must not have talked to a GPU, as it does while it is imported.
    """
    return sys.platform == "linux" and not paddle.is_compiled_with_cuda() and psutil.Process().num_threads() == 1


def end_with_parent() -> None:
    """From now on this process is ended with the one that has started it, however that dies; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)


class Forked:
    """A copy of this process that does something else, where `can_fork`; in the rest as what `start` returns.

    Args:
        do: what it does, without coming back.
    """

    def __init__(self, do: Callable[[], None], variables: dict[str, str], output: IO, cwd: pathlib.Path):
        self._copy = multiprocessing.get_context("fork").Process(target=_apart, args=(do, variables, output, cwd))
        self._copy.start()
        self.pid, self.kill = self._copy.pid, self._copy.kill

    @property
    def returncode(self) -> int | None:
        return self._copy.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._copy.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._copy.name, timeout)
        return self.returncode


def _apart(do: Callable[[], None], variables: dict[str, str], output: IO, cwd: pathlib.Path) -> None:
    """Does it as a process that was started: with other variables and output, and without this one's signals."""
    if hasattr(os, "setsid"):  # Windows has not, where nothing is copied
        os.setsid()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    do()


def end(process: subprocess.Popen | Forked) -> None:
    """Kills the process, unless it has ended, with all that it started, and waits until it is gone."""
    if process.poll() is None:
        kill(process.pid)
    process.wait()


def kill(pid: int) -> None:
    """Kills a process with all that it started; one that has just ended is no error."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for member in [*first.children(recursive=True), first]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def cause(code: int) -> str:
    """What a process ended with, such as "SIGSEGV" or "exit code 1"; Windows has codes like 0xC0000005 for a crash."""
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}" if code < 256 else f"exit code 0x{code:X}"
