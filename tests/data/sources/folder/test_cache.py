"""The cache of decoded images: when it is built, and that it survives what it must."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import filelock
import numpy as np
import pytest
from data_errors import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import COMPLETE, RAMP, cache_files, levels, make_root, read, save, solid
from PIL import Image
from running import tool_environment

from fixmatch.data.sources import cache, writer
from fixmatch.data.sources.cache import cached_images
from fixmatch.data.sources.folder import decode

# --- when it is built


def built(logged) -> bool:
    return "images decoded in" in logged()


def test_the_second_load_decodes_nothing(root, monkeypatch):
    first = read(root, None)
    monkeypatch.setattr(Image, "open", None)
    second = read(root, None)
    assert np.array_equal(first.train.images, second.train.images)
    assert (first.mean, first.std) == (second.mean, second.std)
    assert cache_files(root) == COMPLETE


def _touch(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [
    lambda r: save(r / "labeled/cat/a.png", solid(5)),
    lambda r: save(r / "labeled/cat/c.png", solid(5)),
    lambda r: save(r / "unlabeled/new/c.png", solid(5)),
    lambda r: (r / "unlabeled/u.png").unlink(),
    lambda r: (r / "labeled/cat/b.png").rename(r / "labeled/dog/b.png"),
    lambda r: _touch(r / "test/dog/a.png"),
])
def test_a_changed_file_has_everything_decoded_anew(root, tmp_path, logged, change):
    read(root)
    before = {path.name for path in (root / ".fixmatch-cache").iterdir()}
    assert built(logged)
    change(root)
    read(root)
    assert built(logged)
    after = {path.name for path in (root / ".fixmatch-cache").iterdir()}
    assert len(before - after) == len(after - before) == 1  # the stale images are gone
    read(root)
    assert not built(logged)


def test_another_size_has_a_cache_of_its_own(root, logged):
    for size, expected in ((8, True), (16, True), (8, False), (16, False), (None, True)):
        read(root, size)
        assert built(logged) == expected


def test_the_cache_moves_with_the_data(root, logged):
    read(root)
    assert built(logged)
    read(root.rename(root.with_name("elsewhere")))
    assert not built(logged)


def _npy(root) -> pathlib.Path:
    return next((root / ".fixmatch-cache").glob("*.npy"))


def _manifest(root, change):
    path = root / ".fixmatch-cache/folder-8.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("damage", [
    lambda r: _npy(r).unlink(),
    lambda r: _npy(r).write_bytes(b""),
    lambda r: _npy(r).write_bytes(_npy(r).read_bytes()[:-1]),
    lambda r: _npy(r).write_bytes(b"x" * 2000),
    lambda r: np.save(_npy(r), np.zeros((6, 8, 8, 3))),
    lambda r: np.save(_npy(r), np.zeros((5, 8, 8, 3), np.uint8)),
    lambda r: (r / ".fixmatch-cache/folder-8.json").unlink(),
    lambda r: (r / ".fixmatch-cache/folder-8.json").write_bytes(b"\xff"),
    lambda r: (r / ".fixmatch-cache/folder-8.json").write_bytes(b""),
    lambda r: _manifest(r, lambda m: [m]),
    lambda r: _manifest(r, lambda m: m | {"fingerprint": "0" * 64}),
    lambda r: _manifest(r, lambda m: {k: v for k, v in m.items() if k != "facts"}),
])
def test_a_damaged_cache_is_built_anew(root, logged, damage):
    expected = read(root).train.images.copy()
    damage(root)
    logged()
    assert np.array_equal(read(root).train.images, expected)
    assert built(logged)
    assert cache_files(root) == COMPLETE


def test_images_stay_readable_while_their_cache_is_replaced(root):
    old = read(root)
    save(root / "unlabeled/u.png", solid(99))
    read(root)
    assert levels(old.train) == [10, 11, 20, 30]


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6), seed=st.integers(0, 99),
       high=st.integers(1, 256))
def test_images_and_statistics_do_not_depend_on_the_pieces(tmp_path_factory, counts, seed, high):
    root, rng = tmp_path_factory.mktemp("pieces"), np.random.default_rng(seed)
    pieces = [(rng.integers(0, high, (n, 3, 5, 3), np.uint8), counted) for n, counted in counts]

    def build(writer):
        writer.begin(3, 5, 30)
        for images, counted in pieces:
            writer.append(images, counted)
        return writer.statistics()

    images, facts = cached_images(root, "x", "ab" * 32, build)
    assert np.array_equal(images, np.concatenate([images for images, _ in pieces]))
    counted = np.concatenate([images for images, counted in pieces if counted] + [np.zeros((0, 3, 5, 3))]) / 255
    if len(counted):
        assert facts["mean"] == pytest.approx(counted.mean(axis=(0, 1, 2)))
        assert facts["std"] == pytest.approx(np.maximum(counted.std(axis=(0, 1, 2)), 1 / 255))
    assert np.array_equal(np.load(next((root / ".fixmatch-cache").glob("*.npy"))), images)

# --- where it lies


def test_a_root_that_cannot_be_written_to(root, tmp_path, monkeypatch, logged):
    (root / ".fixmatch-cache").touch()  # where the folder should be; a superuser may write to any folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = make_root(tmp_path / "other")
    (other / ".fixmatch-cache").touch()
    for place, expected in ((root, True), (other, True), (root, False), (other, False)):
        read(place)
        assert built(logged) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "labeled/cat/a.png"))
    message = error_of(read, root)
    assert "XDG_CACHE_HOME" in message
    assert str(root / ".fixmatch-cache") in message


def test_a_cache_in_a_folder_that_cannot_be_written_to_is_used(root, monkeypatch):
    read(root)
    monkeypatch.setattr(cache, "_acquired", None)
    read(root)

@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks available")])
def test_a_file_system_without_locks_is_passed_over(root, tmp_path, monkeypatch, error):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    acquire = filelock.FileLock.acquire

    def refuse(self, *arguments, **options):
        if str(tmp_path / "cache") not in self.lock_file:
            raise error
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert levels(read(root).train) == [10, 11, 20, 30]
    assert list((root / ".fixmatch-cache").iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert str(error.args[-1]) in error_of(read, root)


# --- builders that are killed, and two at once


# Paddle takes seconds to import, and nothing here needs it.
PROCESS = """
import sys, types
sys.modules["paddle"] = types.ModuleType("paddle")
import logging, os, resource, signal, time
from fixmatch.data import DataError
from fixmatch.data.sources import cache
from fixmatch.data.sources.folder import decode
from fixmatch.data.sources.folder.load import load_folder
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
def on_call(owner, name, number, act, after=False):
    original, calls = getattr(owner, name), []
    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == number and not after:
            act()
        result = original(*arguments, **options)
        if len(calls) == number and after:
            act()
        return result
    setattr(owner, name, wrapped)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
exec(sys.argv[2])
try:
    source = load_folder(sys.argv[1], 8, 0)
except DataError as error:
    sys.exit(str(error))
print(source.train.images[:, 0, 0, 0].tolist())
"""


def start(root, hook: str) -> subprocess.Popen:
    """A process that loads `root` after `hook` was run in it."""
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(root), hook], text=True, env=tool_environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("hook", [
    "on_call(decode, 'decode_image', 1, die)",
    "on_call(decode, 'decode_image', 5, die)",
    "on_call(cache.Writer, 'append', 1, die, after=True)",
    "on_call(os, 'fsync', 1, die, after=True)",
    "on_call(os, 'replace', 1, die)",
    "on_call(os, 'replace', 1, die, after=True)",
    "on_call(os, 'fsync', 2, die)",
    "on_call(os, 'replace', 2, die)",
    "on_call(os, 'replace', 2, die, after=True)",
])
def test_a_killed_build_leaves_nothing_that_the_next_one_does_not_put_right(root, tmp_path, hook):
    read(root)
    save(root / "unlabeled/u.png", solid(31))  # so that there is a stale cache, too
    process = start(root, hook)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    clean = make_root(tmp_path / "clean")
    save(clean / "unlabeled/u.png", solid(31))
    source, expected = read(root), read(clean)
    assert np.array_equal(source.train.images, expected.train.images)
    assert np.array_equal(source.test.images, expected.test.images)
    assert (source.mean, source.std) == (expected.mean, expected.std)
    if "2, die, after" not in hook:  # then the new cache is in place, and nothing is left to do but to delete
        assert cache_files(root) == COMPLETE


def test_what_was_stale_when_the_builder_was_killed_goes_with_the_next_build(root):
    read(root)
    (root / ".fixmatch-cache/folder-8-0123456789abcdef.npy").touch()
    _touch(root / "unlabeled/u.png")
    read(root)
    assert cache_files(root) == COMPLETE


def test_two_processes_at_once_decode_once(root):
    slowly = "on_call(decode, 'decode_image', 1, lambda: time.sleep(0.5))"
    done = [(process, *process.communicate(timeout=60)) for process in [start(root, slowly), start(root, slowly)]]
    assert [process.returncode for process, _, _ in done] == [0, 0]
    assert [out.splitlines()[-1] for _, out, _ in done] == ["[10, 11, 20, 30]"] * 2
    assert sum("images decoded in" in out for _, out, _ in done) == 1
    assert cache_files(root) == COMPLETE


def test_a_second_builder_waits_and_says_so(tmp_path, logged):
    building, finish, results = threading.Event(), threading.Event(), []

    def build(writer):
        building.set()
        assert finish.wait(30)
        writer.begin(8, 8, 1)
        writer.append(RAMP[None], counted=True)
        return {}

    def run():
        results.append(cached_images(tmp_path, "x", "ab" * 32, build))

    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    assert building.wait(30)
    threads[1].start()
    said = ""
    for _ in range(3000):
        said += logged()
        if "waiting for another process" in said:
            break
        time.sleep(0.01)
    finish.set()
    for thread in threads:
        thread.join()
    assert (said + logged()).count("waiting for another process") == 1
    assert [images.tolist() for images, _ in results] == [[RAMP.tolist()]] * 2

def test_a_builder_that_waits_goes_on_when_the_holder_is_killed(root):
    """The holder is killed while it decodes, and the other one has said that it waits."""
    forever = "on_call(decode, 'decode_image', 1, lambda: (print('decoding', flush=True), time.sleep(600)))"
    holder, waiting = start(root, forever), None
    try:
        for line in holder.stdout:  # until it has the lock and decodes
            if line == "decoding\n":
                break
        waiting = start(root, "")
        assert "waiting for another process" in waiting.stdout.readline()
        assert waiting.poll() is None
        holder.kill()
        out, _ = waiting.communicate(timeout=60)
    finally:
        for process in (holder, waiting):
            if process and process.poll() is None:
                process.kill()
        holder.communicate()
    assert waiting.returncode == 0
    assert "waiting" not in out
    assert out.splitlines()[-1] == "[10, 11, 20, 30]"
    assert cache_files(root) == COMPLETE


# --- disks that are full, and interruptions


def test_a_full_disk(root):
    """The limit on the size of files stands in for it: writing fails half-way, with an errno."""
    process = start(root, "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))")
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "decoded images cannot be written: File too large; make room there" in message
    assert len(message.splitlines()) == 1
    assert cache_files(root) == [".lock"]
    assert levels(read(root).train) == [10, 11, 20, 30]


@pytest.mark.parametrize("call", range(1, 5))
def test_a_disk_that_is_full_at_any_moment(root, monkeypatch, call):
    """1: the images' fsync, 2: their replacement, 3 and 4: those of the JSON file."""
    calls = itertools.count(1)

    def full(original):
        def wrapped(*arguments):
            if next(calls) == call:
                raise OSError(28, "No space left on device")
            return original(*arguments)
        return wrapped

    monkeypatch.setattr(os, "fsync", full(os.fsync))
    monkeypatch.setattr(os, "replace", full(os.replace))
    assert "No space left on device; make room" in error_of(read, root)
    assert cache_files(root) == [".lock"]


def test_a_disk_that_will_be_full_is_known_before_decoding(root, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    monkeypatch.setattr(decode, "decode_image", None)
    assert "0.0 GB are needed, 0.0 GB are free" in error_of(read, root)
    assert cache_files(root) == [".lock"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing(root, monkeypatch, error):
    def interrupt(*arguments, **options):
        raise error

    monkeypatch.setattr(cache.Writer, "append", interrupt)
    with pytest.raises(error):
        read(root)
    assert cache_files(root) == [".lock"]
