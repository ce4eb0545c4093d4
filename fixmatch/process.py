"""Python in a process of its own, on any system: what it inherits, how it is ended, and what it died of."""

import os
import pathlib
import signal
import subprocess
import sys
from typing import IO

import psutil

ROOT = pathlib.Path(__file__).resolve().parent.parent  # where `fixmatch` and `parity` are found
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


def end(process: subprocess.Popen) -> None:
    """Kills the process, unless it has ended, with all that it started, and waits until it is gone."""
    if process.poll() is None:
        try:
            family = [*psutil.Process(process.pid).children(recursive=True), process]
        except psutil.NoSuchProcess:  # it has just ended
            family = []
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()


def cause(code: int) -> str:
    """What a process ended with, such as "SIGSEGV" or "exit code 1"; Windows has codes like 0xC0000005 for a crash."""
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}" if code < 256 else f"exit code 0x{code:X}"
