"""Kills at random moments in the writing of checkpoints cost no finished one.

docs/faults.md has the table of what was tried. `make test-long` runs the long versions.
"""

import itertools
import os
import pathlib
import signal
import time

import numpy as np
import pytest

from fixmatch import checkpoint, checkpoints
from fixmatch.checkpoint import Manifest


def times(few: int, many: int):
    return [few, pytest.param(many, marks=pytest.mark.long)]


def save_for_ever(folder: pathlib.Path, first: int) -> None:
    """What a trainer does after each evaluation, with arrays that are full of the step's number."""
    for step in itertools.count(first):
        if checkpoint.exists(folder / "latest"):
            checkpoints.keep_latest(folder, step - 1)
        manifest = Manifest(step, {}, "digits", ("a",), (0.5,) * 3, (0.2,) * 3)
        checkpoint.save(folder / "latest", {"model/w": np.full(50_000, step, np.float32)}, manifest)
        checkpoints.drop_old(folder, step, 1)


@pytest.mark.parametrize("kills", times(8, 600))
def test_a_kill_while_a_checkpoint_is_written_costs_no_finished_one(tmp_path, kills):
    rng, last, ends, file = np.random.default_rng(kills), -1, set(), tmp_path / "latest/checkpoint.json"
    for _ in range(kills):
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = os.fork()
        if process == 0:
            save_for_ever(tmp_path, last + 1)
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
        ends.add(len(list(tmp_path.rglob("*"))))
    assert max(ends) < 20  # what a killed process leaves is cleared away by the next
