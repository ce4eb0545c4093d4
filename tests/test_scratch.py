"""Scratch folders: gone at the end, and after a kill with the next program that needs one, unless in use."""

import os
import subprocess
import sys
import tempfile

import pytest
from running import ROOT, tool_environment

from fixmatch import scratch

HOLDER = """
import sys
from fixmatch.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "big").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """In the place of the system's folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder(place):
    """A program that holds a scratch folder until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=tool_environment() | {"TMPDIR": str(place)})
    process.folder = place / os.path.basename(process.stdout.readline().strip())
    assert (process.folder / "big").exists()
    yield process
    process.kill()
    process.communicate()


def age(folder) -> None:
    os.utime(folder / ".lock", (0, 0))


def test_it_is_there_for_the_time_of_the_block(place):
    with scratch.scratch_folder() as one, scratch.scratch_folder() as other:
        (one / "file").write_text("x")
        assert one != other
    assert list(place.iterdir()) == []


def test_what_a_killed_program_has_left_is_removed(holder, place):
    holder.kill()
    holder.wait()
    with scratch.scratch_folder():  # it may be so young that its owner is about to lock it
        assert holder.folder.exists()
    age(holder.folder)
    with scratch.scratch_folder():
        assert not holder.folder.exists()


def test_what_is_in_use_stays(holder):
    age(holder.folder)
    with scratch.scratch_folder():
        assert (holder.folder / "big").exists()


def test_folders_of_others_stay(place):
    (place / "fixmatch-scratch-other").mkdir()  # without a lock
    (place / "else").mkdir()
    (place / "else/.lock").touch()
    age(place / "else")
    with scratch.scratch_folder():
        assert (place / "fixmatch-scratch-other").exists()
        assert (place / "else/.lock").exists()
