"""Processes that train together, joined through gloo on this machine's CPU."""

import contextlib
import pathlib
import socket
import time
from collections.abc import Iterator

from fixmatch import process

RANKS = 2
TIMEOUT = 300  # seconds; a small network takes 4
TO_JOIN = 60  # seconds of that, until both have found each other


class DidNotRun(RuntimeError):
    """The processes have not come to an end; the message is one line."""


class _NotJoined(DidNotRun):
    """It ended before the ranks had found each other."""


def launch(module: str, folder: pathlib.Path) -> None:
    """Runs `python -m MODULE FOLDER` as every rank, to its end. Raises DidNotRun, with no process left behind.

    Rank R makes FOLDER/joined-R once it has joined the others; what it prints is in FOLDER/output-R.txt.
    """
    for last in (False, True):
        try:
            return _launch_once(module, folder)
        except _NotJoined as error:  # another program may have taken the port since it was chosen
            if last:
                raise DidNotRun(f"{RANKS} processes could not join through gloo: {error}") from None


def _launch_once(module: str, folder: pathlib.Path) -> None:
    for file in folder.glob("joined-*"):
        file.unlink()
    with contextlib.ExitStack() as cleanup:
        processes = []
        for rank, environment in enumerate(_environments()):
            output = cleanup.enter_context(open(folder / f"output-{rank}.txt", "w", encoding="utf-8"))
            processes.append(process.start(["-W", "ignore", "-m", module, str(folder)], environment, output))
            cleanup.callback(process.end, processes[-1])
        started = time.monotonic()
        while True:
            running = any(each.poll() is None for each in processes)
            joined = any((folder / f"joined-{rank}").exists() for rank in range(RANKS))  # one cannot alone
            failed = [rank for rank, each in enumerate(processes) if each.returncode]
            if failed:
                raise (DidNotRun if joined else _NotJoined)(_last_words(folder, processes, failed[0]))
            if not running:
                return
            limit = TIMEOUT if joined else TO_JOIN
            if time.monotonic() - started > limit:
                raise (DidNotRun if joined else _NotJoined)(f"not done within {limit} s")
            time.sleep(0.02)


def _environments() -> Iterator[dict[str, str]]:
    """Of each rank, as paddle.distributed.launch would set it."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(RANKS)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        endpoints = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for rank, endpoint in enumerate(endpoints):
        yield process.environment() | {
            "OMP_NUM_THREADS": "1", "PADDLE_TRAINER_ID": str(rank), "PADDLE_TRAINERS_NUM": str(RANKS),
            "PADDLE_CURRENT_ENDPOINT": endpoint, "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_DISTRI_BACKEND": "gloo"}


def _last_words(folder: pathlib.Path, processes: list, rank: int) -> str:
    code, said = processes[rank].returncode, (folder / f"output-{rank}.txt").read_text(errors="replace").split("\n")
    telling = [line.strip() for line in said if "Error" in line] or [line.strip() for line in said if line.strip()]
    return f"rank {rank} ended with {process.cause(code)}{': ' + telling[-1] if telling else ''}"
