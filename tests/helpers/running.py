"""Running the commands in processes of their own, and what tests hold them to."""

import contextlib
import gc
import os
import pathlib
import signal
import sys
from typing import NamedTuple

import numpy as np
import psutil
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TINY = ["model.depth=10", "model.width=1", "train.batch_size=4", "train.mu=2", "parity.enabled=false",
        "run.log_every=1", "run.report=false"]


class Ran(NamedTuple):
    code: int
    stdout: str
    stderr: str


def growth(work, calls: int, rounds: int) -> float:
    """Blocks of memory that Python keeps after `calls` calls of `work`: the median of rounds; at first caches fill."""
    held = []
    for _ in range(rounds):
        for _ in range(calls):
            work()
        gc.collect()
        held.append(sys.getallocatedblocks())
    return float(np.median(np.diff(held)))


def first_of(values, count: int) -> list:
    """Parameters of a test: the first `count` of `values` as they are, the others for make test-long."""
    values = list(values)
    return [*values[:count], *(pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.long)
                               for value in values[count:])]


class After:
    """In the place of a recorder: does something in the middle of a step, by default what a scheduler does.

    Args:
        step: how many steps of the session it waits for.
        do: is called once, then; by default it sends this process a SIGTERM.
    """

    def __init__(self, step: int, do=lambda: signal.raise_signal(signal.SIGTERM)):
        self.left, self.do, self.done = step, do, False

    def before(self, *_) -> None:
        pass

    def after(self, *_) -> None:
        self.left -= 1
        if not self.left:
            self.done = True
            self.do()


def train_again(*overrides: str) -> None:
    """Goes on with a tiny training on the digits, or begins it; for a process of its own."""
    import fixmatch

    fixmatch.train(fixmatch.load_config("digits", [*TINY, *overrides]), resume=True)


def tool_environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def digits(*overrides: str) -> list:
    """Arguments for a tiny training on the digits."""
    return ["-c", ROOT / "configs/digits.yaml", "-o", *TINY, *overrides]


def runs(pid: int) -> bool:
    """Whether a process does; one that has ended may be listed until somebody asks for its exit code."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
