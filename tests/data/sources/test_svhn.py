"""SVHN's MATLAB files: what is read right, and that no file but the official ones is parsed at all."""

import contextlib
import functools
import http.server
import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import scipy.io
from data_errors import error_of
from running import ROOT, tool_environment

from fixmatch.config import DataConfig
from fixmatch.data import load_source
from fixmatch.data.sources import svhn
from fixmatch.data.sources.svhn import load_svhn

FILES = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
COUNTS = 20, 12, 30


def arrays_of(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"X": rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
            "y": rng.integers(1, 11, (count, 1), dtype=np.uint8)}


def packed(arrays: dict, **options) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, arrays, **{"do_compression": True} | options)
    return file.getvalue()


def read(root, extra=False):
    return load_svhn(str(root), False, extra)


@pytest.fixture
def root(tmp_path):
    """A folder with the three files, of 20, 12 and 30 images, none of which is official."""
    for name, count in zip(FILES, COUNTS, strict=True):
        (tmp_path / name).write_bytes(packed(arrays_of(count, seed=count)))
    return tmp_path


@pytest.fixture
def make_official(monkeypatch):
    """make_official(folder) has the files that are in it now taken for the official ones."""
    def take(folder) -> None:
        found = {name: svhn.md5_of(folder / name) for name in FILES if (folder / name).exists()}
        monkeypatch.setattr(svhn, "_MD5", svhn._MD5 | found)
    return take


@pytest.fixture
def official(root, make_official):
    """The same folder, whose files are taken for the official ones."""
    make_official(root)
    return root


def assert_holds(dataset, *parts):
    images = np.concatenate([part["X"].transpose(3, 0, 1, 2) for part in parts])
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == [int(label) % 10 for part in parts for label in part["y"][:, 0]]
    assert (dataset.images.dtype, dataset.labels.dtype) == (np.uint8, np.int64)
    assert dataset.images.flags.c_contiguous


# --- what is read


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("folder", [".", "svhn"])
def test_images_and_labels(tmp_path, official, folder, extra):
    (tmp_path / "there" / folder).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (official / name).rename(tmp_path / "there" / folder / name)
    source = read(tmp_path / "there", extra)
    assert_holds(source.train, arrays_of(20, seed=20), *[arrays_of(30, seed=30)][:extra])
    assert_holds(source.test, arrays_of(12, seed=12))


def test_a_known_pixel_and_the_digit_0(tmp_path, make_official):
    images = np.zeros((32, 32, 3, 2), np.uint8)
    images[3, 9, 2, 1] = 200  # row 3, column 9, blue
    for name in FILES[:2]:
        (tmp_path / name).write_bytes(packed({"X": images, "y": np.array([[10], [9]], np.uint8)}))
    make_official(tmp_path)
    train = read(tmp_path).train
    assert np.argwhere(train.images).tolist() == [[1, 3, 9, 2]]
    assert train.labels.tolist() == [0, 9]


def test_what_is_known_of_the_data_set(official):
    source = load_source(DataConfig(name="svhn", root=str(official), download=False, extra=True))
    assert (source.name, source.classes, source.flip) == ("svhn", tuple("0123456789"), False)
    assert len(source.train) == 50
    assert source.mean == (0.4377, 0.4438, 0.4728)


@pytest.mark.parametrize("count", [1023, 1024, 1025])
def test_more_images_than_are_transposed_at_once(root, make_official, count):
    (root / FILES[0]).write_bytes(packed(arrays_of(count, seed=1)))
    make_official(root)
    assert_holds(read(root).train, arrays_of(count, seed=1))


@pytest.mark.parametrize("labels", [np.uint8, np.int16, np.uint32, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("count", [2, 3, 20])  # a few labels are within their tag
@pytest.mark.parametrize("compressed", [True, False])
def test_every_way_to_store_the_same(root, make_official, labels, count, compressed):
    arrays = arrays_of(count, seed=3)
    stored = {"note": "a string", "y": arrays["y"].astype(labels), "cells": np.array([[1, "a"]], object),
              "X": arrays["X"], "z": np.eye(3) * 1j}
    (root / FILES[0]).write_bytes(packed(stored, do_compression=compressed))
    make_official(root)
    assert_holds(read(root).train, arrays)


def test_images_are_in_memory_once(root):
    (root / FILES[0]).write_bytes(packed({"X": np.zeros((32, 32, 3, 40_000), np.uint8), "y": np.ones((40_000, 1))}))
    code = ("import pathlib, resource; from fixmatch.data.sources import svhn\n"
            f"root = pathlib.Path({str(root)!r})\n"
            "svhn._MD5 = {path.name: svhn.md5_of(path) for path in root.glob('*.mat')}\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); svhn.load_svhn(str(root), False, False); print((peak() - before) * 1024)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=tool_environment(), text=True,
                          capture_output=True, check=True)
    assert int(done.stdout.split()[-1]) < 1.3 * 40_000 * 3072


# --- what is not there


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_and_no_download(official, name):
    (official / name).unlink()
    message = error_of(read, official, True)
    assert f"{official}: has no {name}" in message
    assert "data.download" in message


def test_nothing_there_and_no_download(tmp_path):
    assert "data.download" in error_of(read, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@contextlib.contextmanager
def served(folder):
    """The address at which `folder` is served."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_missing_files_are_downloaded_and_checked(root, tmp_path, monkeypatch, make_official, logged):
    monkeypatch.setenv("no_proxy", "*")
    here = tmp_path / "here"
    with served(root) as address:
        monkeypatch.setattr(svhn, "_HOST", address)
        message = error_of(load_svhn, str(here), True)
        assert f"{here / 'svhn' / FILES[0]}: download of {address}{FILES[0]} has MD5" in message
        assert "by hand" in message
        assert os.listdir(here / "svhn") == []
        make_official(root)
        load_svhn(str(here), True, False)
        assert sorted(os.listdir(here / "svhn")) == sorted(FILES[:2])
        logged()
        source = load_svhn(str(here), True, True)
    assert logged().count("\n") <= 1  # only the extra file is fetched now
    assert_holds(source.train, arrays_of(20, seed=20), arrays_of(30, seed=30))


def test_downloads_are_checked_by_tls():
    assert svhn._HOST.startswith("https://")


# --- what is not official


def flipped(blob: bytes, position: int) -> bytes:
    return blob[:position] + bytes([blob[position] ^ 255]) + blob[position + 1:]


GOOD = packed(arrays_of(20, seed=20))


@pytest.mark.parametrize("content", [
    packed(arrays_of(20, seed=21)), GOOD[:-1], GOOD[:len(GOOD) // 2], GOOD + b"\0", flipped(GOOD, 128),
    flipped(GOOD, 136), flipped(GOOD, len(GOOD) - 1), b"", b"<html>not found</html>" * 20,
    b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(384) + b"\x89HDF\r\n\x1a\n",
    packed(arrays_of(20, seed=20), do_compression=False),
], ids=["other images", "one byte short", "half of it", "one byte more", "another type", "another stream",
        "another checksum", "empty", "a page", "MATLAB 7.3", "not compressed"])
@pytest.mark.parametrize("name", FILES)
def test_an_unofficial_file_is_refused_and_never_parsed(official, monkeypatch, name, content):
    (official / name).write_bytes(content)
    loadmat, parsed = scipy.io.loadmat, []

    def recorded(path, **options):
        parsed.append(path.name)
        return loadmat(path, **options)

    monkeypatch.setattr(scipy.io, "loadmat", recorded)
    message = error_of(read, official, True)
    assert parsed == list(FILES[:FILES.index(name)])  # those before it, which are official
    assert message.startswith(f"{official / name}: not the official file of SVHN, or damaged: its MD5 is ")
    assert svhn.md5_of(official / name) in message
    assert svhn._MD5[name] in message
    assert message.endswith("; delete it and have it downloaded again, or put the official file there")


@pytest.mark.parametrize("name", FILES)
def test_a_refused_file_is_left_where_it_is(root, name):
    before = (root / name).read_bytes()
    error_of(read, root)
    assert (root / name).read_bytes() == before


def test_official_files_are_those_with_the_published_md5():
    assert svhn._MD5 == {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
                         "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
                         "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7"}


def test_a_file_that_cannot_be_read(official, monkeypatch):
    def fail(*arguments):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(svhn, "md5_of", fail)
    assert f"{official / FILES[0]}: cannot be read: Permission denied" in error_of(read, official)
